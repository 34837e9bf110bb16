"""Recompute: what a block keeps for its backward pass, and what its backward pass computes again.

    h = grouped_linear(x, w)            kept: h                     h32 = to(x, float32)           kept: x
    y = silu(h[:, :I]) * h[:, I:]       again: y                    r = rsqrt(mean(h32 ** 2))      kept: r
    z = grouped_linear(y, v)                                        n = h32 * r                    again: h32, n

Of all choices that suffice, the one with the fewest bytes is made: a minimum cut between what cannot be computed again and
what is read (Chen et al. 2016, arXiv 1604.06174, for the trade; the cut as in PyTorch's partitioner). Pointwise operators are
computed again, where kernels read their result, and views are taken again. Sums, choices, products and what came from other
ranks are not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import networkx
import torch
from torch import Tensor, fx

from foldcc import ops
from foldcc.ir.joint import Joint
from foldcc.ir.node import name_of
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program
from foldcc.rules.kinds import is_pointwise, is_view

_COPIES = {"aten.cat", "aten.clone", "aten._to_copy", "aten.index", "aten.index_select", "foldcc.permute"}
_SLOW = {"aten.sin", "aten.cos"}  # in a table of positions, which is small
_KERNELS = {"aten.sum", "foldcc.grouped_linear", "foldcc.grouped_outer"}  # beside pointwise operators
_DATA = 4096  # what a size that data decide is taken to be


@dataclass(frozen=True, kw_only=True)
class Recompute(Pass):
    """For programs whose pointwise operators are kernels. What is kept is said in the plan, which may have said it before."""

    requires = frozenset({"joint"})
    provides = frozenset({"kept"})

    def run(self, program: Program) -> Program:
        kept = {name: _kept(block) for name, block in program.blocks.items() if name not in program.plan.kept}
        return replace(program, plan=replace(program.plan, kept={**kept, **program.plan.kept}))


def _kept(block: fx.GraphModule) -> tuple[str, ...]:
    joint = Joint.of(block)
    free = {*joint.results, *(n for n in joint.formals if n.meta["parameter"])}
    return tuple(n.name for n in least(joint.read, joint.late, free))


def least(wanted: Iterable[fx.Node], backward: Collection[fx.Node], free: Iterable[fx.Node]) -> list[fx.Node]:
    """What is kept, so that everything that is wanted can be computed of it.

    Args:
        wanted: the values that a backward pass reads; backward: its nodes.
        free: values that are there anyway, and cost nothing to keep.
    """
    wanted = list(dict.fromkeys(_base(n) for n in wanted))
    free = {_base(n) for n in free}
    fixed = {n for n in wanted if not all(_in_kernel(u) for u in _readers(n, backward))}
    flow = networkx.DiGraph()
    flow.add_edges_from(((n, "value"), "read") for n in wanted)
    left: list[fx.Node] = list(wanted)
    while left:
        node = left.pop()
        if flow.has_edge((node, "made"), (node, "value")):
            continue
        flow.add_edge((node, "made"), (node, "value"), capacity=0 if node in free else _bytes(node))
        sources = [] if node in fixed or not _is_pointwise(node) else [_base(x) for x in node.all_input_nodes]
        flow.add_edges_from(((x, "value"), (node, "made")) for x in sources)
        if not sources:
            flow.add_edge("there", (node, "made"))
        left += sources
    if not wanted:
        return []
    _, (_, near) = networkx.minimum_cut(flow, "there", "read")  # of equal cuts, the one nearest to what is read
    return [n for n in wanted[0].graph.nodes if (n, "value") in near and (n, "made") not in near]


def _base(node: fx.Node) -> fx.Node:
    """The value that a node is a view of."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _is_view(node: fx.Node) -> bool:
    source: Any = node.args[0] if "getitem" in str(node.target) else node
    return node.op == "call_function" and (is_view(source.target) or source.target is ops.retype.overload)


def _is_pointwise(node: fx.Node) -> bool:
    """Whether a kernel can compute a node wherever it is read."""
    return is_pointwise(node.target) and _named(node) not in _SLOW or _named(node) in _COPIES


def _in_kernel(node: fx.Node) -> bool:
    return _is_pointwise(node) or _named(node) in _KERNELS


def _named(node: fx.Node) -> str:
    return name_of(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""


def _readers(node: fx.Node, backward: Collection[fx.Node]) -> list[fx.Node]:
    """What reads a value in the backward pass, also by way of views."""
    found = []
    for user in node.users:
        if _is_view(user):
            found += _readers(user, backward)
        elif user in backward or user.op == "output":
            found.append(user)
    return found


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    if not isinstance(value, Tensor):  # a size, or what several results are taken from
        return 0
    return math.prod(s if isinstance(s, int) else _DATA for s in value.shape) * value.element_size()
