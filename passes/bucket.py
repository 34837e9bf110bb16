"""Bucket: the small parameter gradients of a block that are summed over the same axes travel together.

    da = all_reduce(x, "dp", "I")                        sums = all_reduce(cat([flatten(x), flatten(y)]), "dp", "I")
    db = all_reduce(y, "dp", "I")       becomes          da, db = split(sums), each in its shape
    return da, db                                        return da, db

A small all-reduce costs its latency, not its bytes. A gradient of more than `small` bytes goes alone: copying it into a
bucket would cost more than it saves. The plan names the reductions that were joined, or says which are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from foldcc import ops
from foldcc.errors import FoldError
from foldcc.ir.pipeline import Pass
from foldcc.ir.plan import UnfitPlan
from foldcc.ir.program import Program
from foldcc.ir.rewrite import emit

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Bucket(Pass):
    """Attributes:
    small: bytes up to which a gradient is joined with others.
    """

    requires = frozenset({"lowered"})
    provides = frozenset({"bucketed"})
    small: int = 4 << 20

    def __post_init__(self) -> None:
        if self.small < 0:
            raise FoldError(f"Bucket(small={self.small}) is no number of bytes.", valid="0 or more")

    def run(self, program: Program) -> Program:
        said, together = program.plan.together, {}
        for name, block in program.backward.named_children() if program.backward is not None else ():
            assert isinstance(block, fx.GraphModule)
            alike = _alike(block.graph)
            groups = _said(name, alike, said[name]) if name in said else self._small(alike)
            together[name] = tuple(tuple(n.name for n in nodes) for nodes in groups)
            for nodes in groups:
                _join(block.graph, nodes)
            block.recompile()
        return replace(program, plan=replace(program.plan, together=together))

    def _small(self, alike: list[list[fx.Node]]) -> list[list[fx.Node]]:
        """Of each group those of few bytes, where there are several."""
        found = [[n for n in nodes if _bytes(n) <= self.small] for nodes in alike]
        return [nodes for nodes in found if len(nodes) > 1]


def _alike(graph: fx.Graph) -> list[list[fx.Node]]:
    """The reductions whose result is a gradient of a known size and nothing else, those of equal axes and type together."""
    found: dict[Any, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=ops.all_reduce.overload):
        value = node.args[0].meta["val"]
        if set(node.users) == {graph.output_node()} and isinstance(value.numel(), int):
            found.setdefault((node.args[1:], value.dtype, value.device), []).append(node)
    return list(found.values())


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel() * value.element_size())


def _said(block: str, alike: list[list[fx.Node]], groups: tuple[tuple[str, ...], ...]) -> list[list[fx.Node]]:
    """The reductions that the plan has travel together."""
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


def _join(graph: fx.Graph, reductions: list[fx.Node]) -> None:
    """Replaces reductions by one, at the end of the graph, where all that they read is there."""
    (output,) = graph.find_nodes(op="output")
    terms: list[Any] = [n.args[0] for n in reductions]
    values = [t.meta["val"] for t in terms]
    sizes = [v.numel() for v in values]
    add = partial(emit, output, about=reductions[0])
    flat = [add(aten.reshape.default, term, [-1]) for term in terms]
    joined = add(ops.all_reduce.overload, add(aten.cat.default, flat), *reductions[0].args[1:])
    parts = add(aten.split_with_sizes.default, joined, sizes)
    for i, (old, value) in enumerate(zip(reductions, values, strict=True)):
        whole = add(aten.reshape.default, add(operator.getitem, parts, i), list(value.shape))
        whole.meta = dict(old.meta)
        old.replace_all_uses_with(whole)
        graph.erase_node(old)
