"""Reading the text of a stage back: the layouts that it prints, so that they can be held against what ranks hold."""

from __future__ import annotations

import re
from dataclasses import dataclass

import sympy

from foldcc.layout import Layout
from foldcc.mesh import FoldedMesh

_VALUE = re.compile(
    r"  %(?P<name>\w+) +(?:: (?P<dtype>[a-z]+\d*)(?P<layout>\[.*?\](?: [RPIV]\([^)]*\))*)? *)?= (?P<operation>.*)"
)
_PLAIN = re.compile(r"\[[u\d*]+(x[u\d*]+)*\]")


@dataclass(frozen=True)
class Line:
    """One value of a printed stage.

    Attributes:
        block: the heading that it stands under, without the number of calls, such as `block1` or `block1 backward`.
        name: of the value.
        dtype: short, such as `f32`; empty for what is no tensor.
        layout: None where the text has none, or has plain sizes.
        sizes: the plain sizes on one rank, None where the text has a layout; one that is data is a name.
        operation: what computes it, as printed.
    """

    block: str
    name: str
    dtype: str
    layout: Layout | None
    sizes: tuple[int | str, ...] | None
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
        plain = None
        if told is not None and _PLAIN.fullmatch(told):
            plain = tuple(int(n) if n.isdigit() else n for n in told[1:-1].split("x"))
        layout = Layout.parse(told, sizes, ranks) if told is not None and plain is None else None
        found.append(Line(block, match["name"], match["dtype"] or "", layout, plain, match["operation"].rstrip()))
    return found
