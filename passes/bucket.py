"""Bucket: small parameters of a block, and their gradients, that go over the same axes travel together.

    da = all_reduce(x, "dp", "I")                        sums = all_reduce(cat([flatten(x), flatten(y)]), "dp", "I")
    db = all_reduce(y, "dp", "I")       becomes          da, db = split(sums), each in its shape
    return da, db                                        return da, db

So do the gathers of a block that unshards parameters, and the reduce-scatters of their gradients: in a row for each rank, and
over each axis where there are several, one behind the other.

    a = all_gather(x, 0, 1, "dp", "R")  becomes          rows = reshape(all_gather(cat([flatten(x), flatten(y)])), [ranks, -1])
    b = all_gather(y, 1, 1, "dp", "R")                   a, b = split(rows, dim=1), the ranks' parts put together in each

A small collective costs its latency, not its bytes. What has more than `small` bytes goes alone: copying it into a bucket would
cost more than it saves. The plan names the collectives that were joined, or says which are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from foldcc import ops
from foldcc.errors import FoldError
from foldcc.ir.node import argument_or
from foldcc.ir.pipeline import Pass
from foldcc.ir.plan import UnfitPlan
from foldcc.ir.program import Program, unshards
from foldcc.ir.rewrite import emit
from foldcc.ir.walk import FORWARD
from foldcc.layout import PARTIAL
from foldcc.ops.groups import active

aten = torch.ops.aten
Add = Callable[..., fx.Node]


@dataclass(frozen=True, kw_only=True)
class Bucket(Pass):
    """Attributes:
    small: bytes up to which a parameter, gathered, or its gradient is joined with others.
    """

    requires = frozenset({"lowered"})
    provides = frozenset({"bucketed"})
    small: int = 4 << 20

    def __post_init__(self) -> None:
        if self.small < 0:
            raise FoldError(f"Bucket(small={self.small}) is no number of bytes.", valid="0 or more")

    def run(self, program: Program) -> Program:
        said, together = program.plan.together, {}
        for main in program.mains:
            for name, block in main.named_children():
                assert isinstance(block, fx.GraphModule)
                key = name if main is program.backward else f"{name}_{FORWARD}"
                alike = _alike(block.graph, unshards=unshards(name))
                groups = _said(key, alike, said[key]) if key in said else self._small(alike)
                if groups or main is program.backward or unshards(name):  # of a smaller program too, that none are joined
                    together[key] = tuple(tuple(n.name for n in nodes) for nodes in groups)
                with active(program.mesh):
                    for nodes in groups:
                        _join(block.graph, nodes)
                block.recompile()
        return replace(program, plan=replace(program.plan, together=together))

    def _small(self, alike: list[list[fx.Node]]) -> list[list[fx.Node]]:
        """Of each group those of few bytes, where there are several."""
        found = [[n for n in nodes if _bytes(n) <= self.small] for nodes in alike]
        return [nodes for nodes in found if len(nodes) > 1]


def _alike(graph: fx.Graph, *, unshards: bool) -> list[list[fx.Node]]:
    """The collectives that may be one, those of equal axes and types together, and of terms of sums over the same axes.

    Reductions of whose results, or of casts of them, nothing is made but gradients of a known size. In blocks that unshard
    parameters gathers too, as many steps behind arguments, and reductions as many steps before gradients.
    """
    found: dict[Any, list[fx.Node]] = {}
    behind, before = _steps(graph.nodes, lambda n: n.all_input_nodes), _steps(reversed(graph.nodes), lambda n: [*n.users])
    for node in graph.nodes:
        told = _TOLD.get(node.target)
        if told is None:
            continue
        gather, value = node.target is ops.all_gather.overload, node.args[0].meta["val"]
        readers = {user for x in node.users for user in (x.users if x.target is aten._to_copy.default else [x])}
        apart = unshards or (not gather and readers == {graph.output_node()})
        in_order = (argument_or(node, "outer") or 1) > 0
        if apart and in_order and isinstance(value.numel(), int):
            terms = frozenset(axis for axis, t in node.args[0].meta.get("types", {}).items() if t.letter == PARTIAL)
            steps = (behind if gather else before)[node]
            key = (node.target, told(*node.args), terms, value.dtype, value.device, steps)
            found.setdefault(key, []).append(node)
    return list(found.values())


def _steps(nodes: Iterable[fx.Node], near: Callable[[fx.Node], list[fx.Node]]) -> dict[fx.Node, int]:
    """How many collectives stand between each node and where it comes from, or where it goes."""
    found: dict[fx.Node, int] = {}
    for node in nodes:
        found[node] = max((found[x] + (x.target in _TOLD) for x in near(node)), default=0)
    return found


# Collectives that may be one, and what they then have in common.
_TOLD = {
    ops.all_reduce.overload: lambda x, axes, dst: (axes, dst),
    ops.reduce_scatter.overload: lambda x, dim, outer, axes: axes,
    ops.all_gather.overload: lambda x, dim, outer, axes, dst: (axes, dst),
}


def _bytes(node: fx.Node) -> int:
    """Of the larger side, which is copied into a bucket or out of it."""
    ends = (node.meta["val"], node.args[0].meta["val"])
    return max(x.numel() * x.element_size() for x in ends)


def _said(block: str, alike: list[list[fx.Node]], groups: tuple[tuple[str, ...], ...]) -> list[list[fx.Node]]:
    """The collectives that the plan has travel together."""
    found = []
    for names in groups:
        there = [n for nodes in alike for n in nodes if n.name in names]
        if [n.name for n in there] != list(names) or not any(set(there) <= set(nodes) for nodes in alike):
            raise UnfitPlan(
                f"The plan has {' '.join(names)} of {block} travel together, which are not alike.",
                valid=", or ".join(" ".join(n.name for n in nodes) for nodes in alike),
            )
        found.append(there)
    return found


def _join(graph: fx.Graph, several: list[fx.Node]) -> None:
    """Replaces collectives by one, at the end of the graph, where all that they read is there."""
    output = graph.output_node()
    before = set(graph.nodes)
    made = list(_JOINED[several[0].target](partial(emit, output, about=several[0]), several))
    late = {*graph.nodes} - before
    for old, new in zip(several, made, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    for node in list(graph.nodes):  # what reads them stands behind them
        if node not in late and node is not output and not late.isdisjoint(node.all_input_nodes):
            output.prepend(node)
            late.add(node)


def _reduced(add: Add, several: list[fx.Node]) -> Iterator[fx.Node]:
    terms: list[Any] = [n.args[0] for n in several]
    flat = add(aten.cat.default, [add(aten.reshape.default, x, [-1]) for x in terms])
    whole = add(ops.all_reduce.overload, flat, *several[0].args[1:])
    parts = add(aten.split_with_sizes.default, whole, [x.meta["val"].numel() for x in terms])
    for i, x in enumerate(terms):
        yield add(aten.reshape.default, add(operator.getitem, parts, i), list(x.meta["val"].shape))


def _gathered(add: Add, several: list[fx.Node]) -> Iterator[fx.Node]:
    shards: list[Any] = [n.args[0] for n in several]
    flat = add(aten.cat.default, [add(aten.reshape.default, x, [-1]) for x in shards])
    whole = add(ops.all_gather.overload, flat, 0, 1, *several[0].args[3:])
    ranks = whole.meta["val"].numel() // flat.meta["val"].numel()
    rows = add(aten.reshape.default, whole, [ranks, -1])
    parts = add(aten.split_with_sizes.default, rows, [x.meta["val"].numel() for x in shards], 1)
    for i, (node, x) in enumerate(zip(several, shards, strict=True)):
        _, dim, outer, *_ = node.args
        first, each, rest = x.meta["val"].shape[:dim], x.meta["val"].shape[dim] // outer, x.meta["val"].shape[dim + 1 :]
        part = add(aten.reshape.default, add(operator.getitem, parts, i), [ranks, *first, outer, each, *rest])
        places = list(range(part.meta["val"].dim()))
        there = add(aten.permute.default, part, [*places[1 : dim + 2], 0, *places[dim + 2 :]])
        yield add(aten.reshape.default, there, list(node.meta["val"].shape))


def _scattered(add: Add, several: list[fx.Node]) -> Iterator[fx.Node]:
    rows = []
    for node in several:
        x, dim, outer, *_ = node.args
        shape, each = x.meta["val"].shape, node.meta["val"].shape[dim] // outer
        ranks = shape[dim] // (outer * each)
        part = add(aten.reshape.default, x, [*shape[:dim], outer, ranks, each, *shape[dim + 1 :]])
        places = list(range(part.meta["val"].dim()))
        there = add(aten.permute.default, part, [dim + 1, *places[: dim + 1], *places[dim + 2 :]])
        rows.append(add(aten.reshape.default, there, [ranks, -1]))
    flat = add(aten.reshape.default, add(aten.cat.default, rows, 1), [-1])
    whole = add(ops.reduce_scatter.overload, flat, 0, 1, *several[0].args[3:])
    parts = add(aten.split_with_sizes.default, whole, [n.meta["val"].numel() for n in several])
    for i, node in enumerate(several):
        yield add(aten.reshape.default, add(operator.getitem, parts, i), list(node.meta["val"].shape))


_JOINED = {ops.all_reduce.overload: _reduced, ops.all_gather.overload: _gathered, ops.reduce_scatter.overload: _scattered}
