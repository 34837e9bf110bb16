"""A mesh of fewer ranks with the same axes, each of which crosses the others at the same places.

dp=64,tp=2|ep=8    the axes end after 2, 8 and 128 ranks     becomes     dp=4,tp=2|ep=4, where they end after 2, 4 and 8
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

from foldcc.errors import divisors
from foldcc.ir.program import Program
from foldcc.layout import Layout
from foldcc.mesh import ATTENTION, MOE, FoldedMesh
from foldcc.ops.layout import reshard


def fewer_ranks(mesh: FoldedMesh) -> FoldedMesh:
    """The smallest mesh in which the same axes have more than one rank, and the groups of two axes meet as they do in `mesh`.

    Between two places where an axis of either view ends, as many ranks are left as the smallest prime that divides them. A
    mesh whose views do not nest, as tp=3 against etp=2, is returned as it is.
    """
    ends = sorted({1} | {end for view in (ATTENTION, MOE) for end in _ends(mesh, view)})
    if any(outer % inner for inner, outer in pairwise(ends)):
        return mesh
    left = {1: 1}
    for inner, outer in pairwise(ends):
        left[outer] = left[inner] * divisors(outer // inner)[1]
    sizes = {}
    for view in (ATTENTION, MOE):
        inner = 1
        for axis, end in zip(reversed(view), _ends(mesh, view), strict=True):
            sizes[axis] = left[end] // left[inner]
            inner = end
    return FoldedMesh(mesh.device_type, tuple(sizes[axis] for axis in ATTENTION + MOE[1:]))


def _ends(mesh: FoldedMesh, view: tuple[str, ...]) -> list[int]:
    """After how many ranks each axis of a view ends, innermost first."""
    sizes = [mesh.size(axis) for axis in reversed(view)]
    return [prod(sizes[: i + 1]) for i in range(len(sizes))]


def on_mesh(program: Program, mesh: FoldedMesh) -> Program:
    """A sharded program with the same layouts over the axes of another mesh."""
    program = replace(program.copied(), mesh=mesh)
    for node in [*program.graph.graph.nodes, *(n for _, n in program.nodes())]:
        if isinstance(node.meta.get("layout"), Layout):
            node.meta["layout"] = _over(node.meta["layout"], mesh)
        if node.target is reshard:
            wanted: Any = node.args[1]
            node.args = (node.args[0], _over(wanted, mesh))
    stored = {name: _over(layout, mesh) for name, layout in program.plan.stored.items()}
    return replace(program, plan=replace(program.plan, stored=stored))


def _over(layout: Layout, mesh: FoldedMesh) -> Layout:
    return replace(layout, ranks={axis: mesh.size(axis) for axis in layout.ranks})
