"""Bucket: the small parameter gradients of a block that are summed over the same axes travel together.

    da = all_reduce(x, "dp", "I")                        sums = all_reduce(cat([flatten(x), flatten(y)]), "dp", "I")
    db = all_reduce(y, "dp", "I")       becomes          da, db = split(sums), each in its shape
    return da, db                                        return da, db

A small all-reduce costs its latency, not its bytes. A gradient of more than `small` bytes goes alone: copying it into a
bucket would cost more than it saves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from foldcc import ops
from foldcc.errors import FoldError
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program

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
            for reductions in self.alike(name, block.graph):
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
    with graph.inserting_before(output):
        emit = _emitter(graph, reductions[0])
        flat = [emit(aten.reshape.default, (t, [-1]), v.numel()) for t, v in zip(terms, values, strict=True)]
        joined = emit(aten.cat.default, (flat,), sum(sizes))
        joined = emit(ops.all_reduce.overload, (joined, *reductions[0].args[1:]), sum(sizes))
        parts = graph.call_function(aten.split_with_sizes.default, (joined, sizes))
        with values[0].fake_mode:
            parts.meta["val"] = joined.meta["val"].split(sizes)
        for i, (old, value) in enumerate(zip(reductions, values, strict=True)):
            part = emit(operator.getitem, (parts, i), sizes[i])
            whole = emit(aten.reshape.default, (part, list(value.shape)), *value.shape)
            whole.meta = dict(old.meta)
            old.replace_all_uses_with(whole)
            graph.erase_node(old)


def _emitter(graph: fx.Graph, like: fx.Node) -> Callable[..., fx.Node]:
    """A function that adds a call with a result of the given shape, and the provenance of `like`."""
    value = like.args[0].meta["val"]
    about = {k: x for k, x in like.meta.items() if k not in ("layout", "types")}

    def emit(target: Any, args: tuple[Any, ...], *shape: int) -> fx.Node:
        new = graph.call_function(target, args)
        with value.fake_mode:
            new.meta = {**about, "val": torch.empty(shape, dtype=value.dtype, device=value.device)}
        return new

    return emit
