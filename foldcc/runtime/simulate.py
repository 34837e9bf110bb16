"""Running a program on all virtual ranks in lock-step, in one process.

Every value is a list with one entry per rank. An operator runs on each rank by itself; a collective runs on each group of
ranks through its record's `simulate`. Nothing here ever sees a global tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from foldcc.ir.walk import follow
from foldcc.mesh import FoldedMesh
from foldcc.ops import record

Ranked = list[Any]  # one entry per rank


def simulate(mesh: FoldedMesh, graph: fx.GraphModule, inputs: Sequence[Ranked]) -> Ranked:
    """Runs a graph on every rank of the mesh.

    Args:
        inputs: for each placeholder, the value on each rank.

    Returns:
        For each rank, what the graph returns.
    """

    def value(node: fx.Node, values: Mapping[fx.Node, Ranked]) -> Ranked:
        if node.op == "output":
            return [_on(values, r, node.args[0]) for r in range(mesh.world_size)]
        if node.op == "call_module":
            return simulate(mesh, getattr(graph, str(node.target)), [values[a] for a in node.args])
        return _call(mesh, node, values)

    return follow(graph, list(inputs), value)


def _on(values: Mapping[fx.Node, Ranked], rank: int, argument: Any) -> Any:
    return fx.map_arg(argument, lambda n: values[n][rank])


def _call(mesh: FoldedMesh, node: fx.Node, values: Mapping[fx.Node, Ranked]) -> Ranked:
    calls = [(_on(values, r, node.args), _on(values, r, node.kwargs)) for r in range(mesh.world_size)]
    known = record(node.target)
    if known is None or known.simulate is None:
        return [node.target(*args, **kwargs) for args, kwargs in calls]
    results: Ranked = [None] * mesh.world_size
    axes = known.arguments(node.args, dict(node.kwargs))["axes"]
    for group in mesh.groups(tuple(axes.split(","))):
        found = known.simulate([calls[r][0] for r in group])
        for r, value in zip(group, found, strict=True):
            results[r] = value
    return results
