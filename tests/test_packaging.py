"""What a wheel installs, what `import foldcc` costs, and that neither needs Transformers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKED = "import sys; sys.modules['transformers'] = sys.modules['triton'] = None\n"
ROUNDS = 2


def python(program: str, *, folder: Path, cwd: Path) -> str:
    """What a fresh Python prints, with `folder` first on its path."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def pip(*arguments: object) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "-q", *map(str, arguments)], capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a wheel is installed, alone. It is built from a copy, for setuptools leaves files behind."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for part in ("foldcc", "passes", "codegen"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip("wheel", source, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", wheels)
    (wheel,) = wheels.iterdir()
    pip("install", wheel, "--no-deps", "--no-index", "--target", target)
    return target


def test_a_wheel_installs_one_name(installed: Path) -> None:
    names = {re.sub(r"-.*", "", path.name) for path in installed.iterdir()}
    assert names == {"foldcc"}


def test_a_wheel_holds_every_module(installed: Path) -> None:
    def modules(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*.py")}

    inside = modules(installed / "foldcc")
    beside = {Path(part) / path for part in ("passes", "codegen") for path in modules(ROOT / part)}
    assert inside == modules(ROOT / "foldcc") | beside


def test_a_wheel_holds_the_table_of_tiles(installed: Path, tmp_path: Path) -> None:
    where = "from foldcc.codegen import tiles; print(tiles.PATH); print(tiles.table(), end='')"
    path, table = python(where, folder=installed, cwd=tmp_path).split("\n", 1)
    assert path == str(installed / "foldcc/codegen/tiles.json") and table == (ROOT / "codegen/tiles.json").read_text()


def test_foldcc_imports_and_the_readme_runs_from_a_wheel_without_transformers(installed: Path, tmp_path: Path) -> None:
    block = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    where = "\nimport foldcc.passes; foldcc.register_experts\nprint(foldcc.__file__, foldcc.passes.__file__, sep='\\n')"
    printed = python(BLOCKED + block + where, folder=installed, cwd=tmp_path).splitlines()
    assert printed[-2:] == [str(installed / "foldcc" / name) for name in ("__init__.py", "passes/__init__.py")]


def test_importing_foldcc_costs_little_next_to_torch(tmp_path: Path) -> None:
    def seconds(module: str) -> float:
        timed = f"import time; start = time.process_time(); import {module}; print(time.process_time() - start)"
        return float(python(timed, folder=ROOT, cwd=tmp_path))

    ours, torchs = zip(*((seconds("foldcc"), seconds("torch")) for _ in range(ROUNDS)), strict=True)
    assert min(ours) < 1.5 * min(torchs)


def test_foldcc_imports_no_transformers(tmp_path: Path) -> None:
    added = """
        import sys, torch
        before = set(sys.modules)
        import foldcc
        foldcc.parallelize, foldcc.register_experts, foldcc.clip_grad_norm_, foldcc.ops, foldcc.mesh
        print(*{name.split(".")[0] for name in set(sys.modules) - before})
    """
    tops = python("if True:" + added, folder=ROOT, cwd=tmp_path).split()
    assert "foldcc" in tops and "transformers" not in tops  # torch imports triton by itself, where it is there
