"""The house: which room may import which, so that an idea is found in one place and nothing runs in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parent.parent
# From the ground up. What stands on a floor imports from lower floors only, inside functions too.
FLOORS = (
    ("errors", "changed", "tables", "factors"),
    ("mesh", "hooks", "precision"),
    ("layout", "tree", "wrappers"),
    ("ops",),
    ("ir",),
    ("rules", "samples"),
    ("runtime",),
    ("capture", "inspect", "codegen"),
    ("call", "plan", "checkpoints"),
    ("types", "taps", "varying"),
    ("passes",),
    ("cache",),
    ("verification",),
    ("programs",),
    ("compiler",),
    ("resizing",),
    ("reports",),
    ("module",),
    ("api", "saving"),
    ("trainers",),
    ("testing",),
    ("tools",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
_PLACES = {"foldcc": ROOT / "foldcc", "foldcc.passes": ROOT / "passes", "foldcc.codegen": ROOT / "codegen"}


def modules(places: dict[str, Path] = _PLACES) -> dict[str, Path]:
    """Every file by the name that it is imported by."""
    found = {}
    for package, folder in places.items():
        for path in folder.rglob("*.py"):
            parts = [p for p in path.relative_to(folder).with_suffix("").parts if p != "__init__"]
            found[".".join([package, *parts])] = path
    return found


def test_every_file_of_passes_is_a_pass() -> None:
    for path in _PLACES["foldcc.passes"].glob("*.py"):
        classes = [c for c in ast.parse(path.read_text()).body if isinstance(c, ast.ClassDef)]
        passes = [c.name for c in classes if any(isinstance(b, ast.Name) and b.id == "Pass" for b in c.bases)]
        assert len(passes) == (path.name != "__init__.py"), f"{path.name} defines the passes {passes}"


def test_every_pass_is_tested_beside_it() -> None:
    passes = {path.stem for path in _PLACES["foldcc.passes"].glob("*.py")} - {"__init__"}
    assert passes == {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "passes").glob("test_*.py")}


def test_what_nodes_carry_is_written_down_where_programs_are() -> None:
    used: set[str] = set()
    for path in modules().values():
        text = path.read_text()
        used |= set(re.findall(r"""meta(?:\.get\(|\.pop\(|\[)["'](\w+)["']""", text))
        used |= {key for group in re.findall(r"meta \|?= \{([^}]*)\}", text) for key in re.findall(r'"(\w+)":', group)}
    told = (ROOT / "foldcc" / "ir" / "program.py").read_text().split('"""')[1]
    assert {"val", "types", "layout"} <= used
    assert {key for key in used if not re.search(rf"\b{key}\b", told)} == set()


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """The modules that a file imports, and whether it does so inside a function; those for type checkers alone are none."""

    def read(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((a.name, inside) for a in child.names if a.name in known)
            if isinstance(child, ast.ImportFrom) and child.module:
                names = [f"{child.module}.{a.name}" for a in child.names]
                yield from ((name if name in known else child.module, inside) for name in names)
            yield from read(child, inside or isinstance(child, ast.FunctionDef))

    return ((name, inside) for name, inside in read(ast.parse(path.read_text()), False) if name in known)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


KNOWN = modules()


@pytest.mark.parametrize("module", [m for m in KNOWN if m != "foldcc"])
def test_imports_point_down(module: str) -> None:
    for name, _ in imports(KNOWN[module], KNOWN):
        if name != "foldcc" and room(name) != room(module):
            assert FLOOR[room(name)] < FLOOR[room(module)], f"{module} imports {name}"
        assert name != "foldcc" or FLOOR[room(module)] >= FLOOR["verification"], f"{module} imports the whole package"


def test_there_is_no_circle() -> None:
    edges = [(m, name) for m, path in KNOWN.items() for name, inside in imports(path, KNOWN) if not inside and m != "foldcc"]
    circles = [c for c in networkx.strongly_connected_components(networkx.DiGraph(edges)) if len(c) > 1]
    assert circles == []


def test_every_room_stands_on_a_floor() -> None:
    assert {room(m) for m in KNOWN} - {""} == set(FLOOR)


def test_imports_inside_functions_and_of_packages_are_read(tmp_path: Path) -> None:
    for name, text in {
        "a": "def f():\n    from foldcc.b import x\n",
        "b": "from foldcc import a, c\nimport foldcc.a\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    known = modules({"foldcc": tmp_path})
    found = {m: list(imports(path, known)) for m, path in known.items()}
    assert found == {"foldcc.a": [("foldcc.b", True)], "foldcc.b": [("foldcc.a", False), ("foldcc.a", False)]}
