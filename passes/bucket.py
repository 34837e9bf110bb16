"""Bucket: the small parameter gradients of a block that are summed over the same axes travel together.

    da = all_reduce(x, "dp", "I")                        sums = all_reduce(cat([flatten(x), flatten(y)]), "dp", "I")
    db = all_reduce(y, "dp", "I")       becomes          da, db = split(sums), each in its shape
    return da, db                                        return da, db

A small all-reduce costs its latency, not its bytes. A gradient of more than `small` bytes goes alone: copying it into a
bucket would cost more than it saves. The output of a block names the reductions that were joined.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from foldcc import ops
from foldcc.errors import FoldError
from foldcc.ir.pipeline import Pass
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
        for name, block in program.backward.named_children() if program.backward is not None else ():
            assert isinstance(block, fx.GraphModule)
            found = self.alike(name, block.graph)
            block.graph.output_node().meta["buckets"] = tuple(tuple(n.name for n in reductions) for reductions in found)
            for reductions in found:
                _join(block.graph, reductions)
            block.recompile()
        return program

    def alike(self, block: str, graph: fx.Graph) -> list[list[fx.Node]]:
        """The small reductions whose result is a gradient and nothing else, those of equal axes and type together."""
        (output,) = graph.find_nodes(op="output")
        found: dict[Any, list[fx.Node]] = {}
        for node in graph.find_nodes(op="call_function", target=ops.all_reduce.overload):
            value = node.args[0].meta["val"]
            size = value.numel() * value.element_size()
            if set(node.users) == {output} and isinstance(size, int) and size <= self.small:
                found.setdefault((node.args[1:], value.dtype, value.device), []).append(node)
        return [nodes for nodes in found.values() if len(nodes) > 1]


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
