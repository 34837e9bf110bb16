"""Reading the text of a stage back: the layouts that it prints, so that they can be held against what ranks hold."""

from __future__ import annotations

import re
from dataclasses import dataclass

import sympy

from foldcc.layout import VARYING, Layout
from foldcc.mesh import FoldedMesh

_VALUE = re.compile(
    r"  %(?P<name>\w+) +(?:: (?P<dtype>[a-z]+\d*)(?P<layout>\[.*?\](?: (?:[RPIV0?]|V\|P)\([^)]*\))*)? *)?= (?P<operation>.*)"
)
_PLAIN = re.compile(r"\[[u\d*]+(x[u\d*]+)*\]")
_TYPED = re.compile(r"\[((?:[u\d][u\d*+ ]*(?:@[^\]\s]+)?(?:, )?)*)\]((?: \S+\([^)]*\))*)")


@dataclass(frozen=True)
class Line:
    """One value of a printed stage.

    Attributes:
        block: the heading that it stands under, without the number of calls, such as `block1` or `block1 backward`.
        name: of the value.
        dtype: short, such as `f32`; empty for what is no tensor.
        layout: None where the text has none, or has sizes.
        sizes: the sizes on one rank, None where the text has a layout; one that is data is a name.
        types: letters by axis, where they were inferred, V of a size that is divided.
        operation: what computes it, as printed.
    """

    block: str
    name: str
    dtype: str
    layout: Layout | None
    sizes: tuple[int | str, ...] | None
    types: dict[str, str] | None
    operation: str


def parse(text: str) -> list[Line]:
    """The values of a printed stage, in order.

    Raises:
        ValueError: the text is no stage.
    """
    lines = text.splitlines()
    if len(lines) < 2 or not lines[0].startswith("program ") or not lines[1].startswith("factors"):
        raise ValueError("The text of a stage starts with the lines 'program …' and 'factors …'.")
    mesh = FoldedMesh.parse(lines[0].split(" · ")[2])
    ranks = {a: mesh.size(a) for view in ("attention", "moe") for a in mesh.axes(view)}
    pairs = [pair.split("=") for pair in lines[1].split()[1:]]
    sizes = {sympy.Symbol(name, integer=True, positive=True): int(n) for name, n in pairs}
    found, block = [], ""
    for line in lines[2:]:
        if line and not line.startswith(" "):
            block = line.split(" ×")[0]
        match = _VALUE.fullmatch(line)
        if match is None:
            continue
        told = match["layout"]
        plain, types = _sizes(told) if told is not None else (None, None)
        layout = Layout.parse(told, sizes, ranks) if told is not None and plain is None else None
        found.append(Line(block, match["name"], match["dtype"] or "", layout, plain, types, match["operation"].rstrip()))
    return found


def _sizes(told: str) -> tuple[tuple[int | str, ...] | None, dict[str, str] | None]:
    """The sizes in the text of a type, and the letters beside them; None where it is a layout."""
    if _PLAIN.fullmatch(told):
        return tuple(map(_size, told[1:-1].split("x"))), None
    match = _TYPED.fullmatch(told)
    if match is None:
        return None, None
    dims = [dim.partition("@") for dim in re.split(r", (?![^(]*\))", match[1])] if match[1] else []
    types = {axis: VARYING for _, _, over in dims for axis in over.strip("()").split(",") if over}
    for letter, axes in re.findall(r" (\S+)\(([^)]*)\)", match[2]):
        types |= dict.fromkeys(axes.split(","), letter)
    return tuple(_size(dim) for dim, _, _ in dims), types


def _size(text: str) -> int | str:
    return int(text) if text.isdigit() else text
