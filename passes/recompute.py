"""Recompute: what a block keeps for its backward pass, and what its backward pass computes again.

    h = grouped_linear(x, w)            kept: h                     h32 = to(x, float32)           kept: x
    y = silu(h[:, :I]) * h[:, I:]       again: y                    r = rsqrt(mean(h32 ** 2))      kept: r
    z = grouped_linear(y, v)                                        n = h32 * r                    again: h32, n

Of all choices that suffice, the one with the fewest bytes is made: a minimum cut between what cannot be computed again and
what is read (Chen et al. 2016, arXiv 1604.06174, for the trade; the cut as in PyTorch's partitioner). A policy says what may be
computed again:

    none         nothing: all that is read is kept
    kernels      pointwise operators where kernels read their result, and views
    selective    pointwise operators and views
    blocks       all but what came from other ranks, and choices such as the experts of a token
    0 < f < 1    of what none keeps, the share f of the bytes: as blocks does, but what costs most to compute again is kept

The plan says what is kept, and may have said it before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import networkx
import torch
from torch import Tensor, fx

from foldcc import ops
from foldcc.errors import FoldError
from foldcc.inspect.flops import flops_of
from foldcc.ir.joint import Joint
from foldcc.ir.node import name_of
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program
from foldcc.ir.sizes import Sizes
from foldcc.ops import record
from foldcc.rules.kinds import CREATORS, is_pointwise, is_view

POLICIES = ("none", "kernels", "selective", "blocks")
_COPIES = {"aten.cat", "aten.clone", "aten._to_copy", "aten.index", "aten.index_select", "foldcc.permute"}
_SLOW = {"aten.sin", "aten.cos"}  # in a table of positions, which is small
_KERNELS = {"aten.sum", "foldcc.grouped_linear", "foldcc.grouped_outer"}  # beside pointwise operators
_TRIED = 32  # values of a block, the dearest first, that are tried to be kept within a budget
_DATA = 4096  # what a size that data decide is taken to be


@dataclass(frozen=True, kw_only=True)
class Recompute(Pass):
    """Attributes:
    policy: what may be computed again, or the share of bytes that may be kept.
    """

    requires = frozenset({"joint"})
    provides = frozenset({"kept"})
    policy: str | float = "kernels"

    def __post_init__(self) -> None:
        known = self.policy in POLICIES or (isinstance(self.policy, float) and 0 < self.policy < 1)
        if not known:
            raise FoldError(
                f"recompute={self.policy!r} is no policy.",
                valid=f"{', '.join(POLICIES)}, or the share of the activations' bytes that is kept, such as 0.5",
            )

    def run(self, program: Program) -> Program:
        blocks = {name: Joint.of(b) for name, b in program.blocks.items() if name not in program.plan.kept}
        if isinstance(self.policy, str):
            kept = {name: _kept(joint, self.policy) for name, joint in blocks.items()}
        else:
            kept = _within(program, blocks, self.policy)
        names = {name: tuple(n.name for n in found) for name, found in kept.items()}
        return replace(program, plan=replace(program.plan, kept={**names, **program.plan.kept}))


def _kept(joint: Joint, policy: str, forced: Collection[fx.Node] = ()) -> list[fx.Node]:
    free = {*joint.results, *(n for n in joint.formals if n.meta["parameter"])}
    if policy == "none":
        return joint.kept
    if policy == "kernels":
        read = {_base(n) for n in joint.kept}
        forced = {n for n in read if not all(_in_kernel(u) for u in _readers(n, joint.late))}
    may = _may_again if policy == "blocks" else _is_pointwise
    return least(joint.kept, free, lambda n: n not in forced and may(n))


def _within(program: Program, blocks: dict[str, Joint], share: float) -> dict[str, list[fx.Node]]:
    """What blocks keep, within a share of the bytes of what they would keep if nothing were computed again.

    Raises:
        FoldError: more than that has to be kept.
    """
    most = {name: _size(joint.kept) for name, joint in blocks.items()}
    fewest = {name: _size(_kept(joint, "blocks")) for name, joint in blocks.items()}
    times = {name: program.count(name) for name in blocks}
    every, least_of_all = (sum(times[n] * of[n] for n in blocks) for of in (most, fewest))
    if least_of_all > share * every:
        raise FoldError(
            f"recompute={share} would keep {share * every:.0f} of {every} bytes, and {least_of_all} are needed.",
            valid=f"{math.ceil(100 * least_of_all / every) / 100} or more",
        )
    extra = (share * every - least_of_all) / max(1, every - least_of_all)
    budgets = {name: fewest[name] + extra * (most[name] - fewest[name]) for name in blocks}
    return {name: _dearest(joint, budgets[name], Sizes(program.mesh)) for name, joint in blocks.items()}


def _dearest(joint: Joint, budget: float, sizes: Sizes) -> list[fx.Node]:
    """What a block keeps within some bytes: what costs most for its bytes to compute again, as much as there is room for."""
    for node in joint.early:
        sizes.learn(node)
    cost = {
        n: flops_of(n, sizes) / max(1, _bytes(n)) for n in joint.early if isinstance(n.meta["val"], Tensor) and _may_again(n)
    }
    forced: set[fx.Node] = set()
    for node in sorted(cost, key=lambda n: -cost[n])[:_TRIED]:
        if _size(_kept(joint, "blocks", {*forced, node})) <= budget:
            forced.add(node)
    return _kept(joint, "blocks", forced)


def _size(nodes: Iterable[fx.Node]) -> int:
    """Bytes that some values hold together, parameters aside; views hold none of their own."""
    return sum(_bytes(n) for n in {_base(n) for n in nodes} if not n.meta.get("parameter"))


def least(wanted: Iterable[fx.Node], free: Iterable[fx.Node], may: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """What is kept, in the fewest bytes, so that everything that is wanted can be computed of it.

    Args:
        wanted: the values that a backward pass reads.
        free: values that are there anyway, and cost nothing to keep.
        may: whether a node may be computed again.
    """
    wanted = list(dict.fromkeys(_base(n) for n in wanted))
    free = {_base(n) for n in free}
    flow = networkx.DiGraph()
    flow.add_edges_from(((n, "value"), "read") for n in wanted)
    left: list[fx.Node] = list(wanted)
    while left:
        node = left.pop()
        if flow.has_edge((node, "made"), (node, "value")):
            continue
        flow.add_edge((node, "made"), (node, "value"), capacity=0 if node in free else _bytes(node))
        sources = [_base(x) for x in node.all_input_nodes] if may(node) else []
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
    if node.op != "call_function":  # a saved value may be called getitem
        return False
    source: Any = node.args[0] if "getitem" in str(node.target) else node
    return is_view(source.target) or source.target is ops.retype.overload


def _is_pointwise(node: fx.Node) -> bool:
    """Whether a kernel can compute a node wherever it is read."""
    return is_pointwise(node.target) and _named(node) not in _SLOW or _named(node) in _COPIES


def _may_again(node: fx.Node) -> bool:
    """Whether a node gives the same again, and asks no other rank: neither a choice, nor a collective."""
    if "getitem" in str(node.target):
        return _may_again(node.args[0])
    known = record(node.target)
    if node.op != "call_function" or (known is not None and known.simulate is not None):
        return known is not None and known.again
    values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
    chosen = any(isinstance(x, Tensor) and x.dim() and not x.is_floating_point() and x.dtype != torch.bool for x in values)
    drawn = node.target is ops.random_bits.overload  # a function of its key
    return drawn or _is_pointwise(node) or _is_view(node) or _named(node) in CREATORS or not chosen


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
    each = [x for x in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(x, Tensor)]  # a size has none
    return sum(math.prod(s if isinstance(s, int) else _DATA for s in x.shape) * x.element_size() for x in each)
