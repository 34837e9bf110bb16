"""Mistakes in a collective: left out, over other axes, of another kind, off by a factor.

What takes a collective's place keeps the shapes, so that what follows runs, or the mistake shows in an exception at once:

    all_reduce(x)               left out      x, its own term alone
    all_gather(x)               left out      the own shard in every rank's place
    reduce_scatter(x)           left out      the own part of the own term
    all_to_all(x)               left out      the rows stay where they are; repeated or cut, where the numbers differ
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import fx

from foldcc import ops
from foldcc.mesh import FoldedMesh
from foldcc.ops import record
from foldcc.ops.operator import Operator
from foldcc.testing.mutate.edits import before, instead, joined, place, wrap
from foldcc.testing.mutate.stand_ins import own_part, own_place, own_rows

aten = torch.ops.aten
Change = Callable[[fx.Node], None]
Mistakes = Iterator[tuple[str, Change]]  # what is done, in words, and the doing


def collective(node: fx.Node) -> Operator | None:
    """The record of a node that depends on the other ranks, or on this rank's place among them."""
    known = record(node.target)
    return known if known is not None and known.simulate is not None else None


def axes_of(node: fx.Node) -> str:
    """The axes of a collective, as its argument names them."""
    known = record(node.target)
    assert known is not None
    return str(known.arguments(node.args, dict(node.kwargs))["axes"])


def ranks_of(mesh: FoldedMesh, axes: str) -> int:
    """The number of ranks in a group over the axes."""
    return len(mesh.groups(tuple(axes.split(",")))[0])


def axes_of_both_views(mesh: FoldedMesh) -> list[str]:
    """The axes that have more than one rank."""
    names = [*mesh.axes("attention"), *mesh.axes("moe")]
    return [a for a in dict.fromkeys(names) if mesh.size(a) > 1]


# --- left out -----------------------------------------------------------------------------------------------------------


def left_out(node: fx.Node, mesh: FoldedMesh) -> Mistakes:
    known = collective(node)
    if known is not None and known not in (ops.axis_index, ops.shard):
        yield f"{known.name} over {axes_of(node)} is left out", lambda node: leave_out(node, mesh)


def leave_out(node: fx.Node, mesh: FoldedMesh) -> None:
    args: tuple[Any, ...] = node.args
    known = collective(node)
    if known in (ops.all_gather, ops.pad):
        alone = joined(node, [args[0]] * ranks_of(mesh, axes_of(node)), *args[1:3])
    elif known is ops.reduce_scatter:
        alone = before(node, ops.shard.overload, *args[:4], "R")
    elif known is ops.all_to_all_v:
        alone = before(node, own_rows, args[0], args[2])
    elif known is ops.all_gather_v:
        alone = before(node, own_rows, args[0], args[1])
    elif known is ops.reduce_scatter_v:
        alone = before(node, own_part, args[0], args[1], place(node, axes_of(node)))
    else:
        alone = before(node, aten.clone.default, args[0])
    instead(node, alone)


# --- other axes ---------------------------------------------------------------------------------------------------------

_ANY_SIZE = {ops.all_reduce, ops.all_reduce_max, ops.once, ops.axis_index}  # whose shapes do not depend on the group


def other_axes(node: fx.Node, mesh: FoldedMesh) -> Mistakes:
    """Over every other axis of either view that fits; where there are several, without one, and in another order."""
    known = collective(node)
    if known is None:
        return
    axes, found = axes_of(node), axes_of_both_views(mesh)
    mine = axes.split(",")
    if len(mine) > 1:
        found += [",".join(a for a in mine if a != left) for left in mine] + [",".join(reversed(mine))]
    for other in dict.fromkeys(found):
        if other != axes and (known in _ANY_SIZE or ranks_of(mesh, other) == ranks_of(mesh, axes)):
            yield f"{known.name} over {other} instead of {axes}", partial(_over, other)


def _over(axes: str, node: fx.Node) -> None:
    known = collective(node)
    assert known is not None
    node.update_arg([a.name for a in known.overload._schema.arguments].index("axes"), axes)


# --- another kind -------------------------------------------------------------------------------------------------------


def other_kinds(node: fx.Node, mesh: FoldedMesh) -> Mistakes:
    """Every collective that fits in another's place: of another reduction, or of another type."""
    known = collective(node)
    if known is not None:
        for name, change in _KINDS.get(known.name, {}).items():
            yield f"{known.name} over {axes_of(node)} becomes {name}", change


def _becomes(target: Operator, *tail: Any) -> Change:
    """Another collective with the same leading arguments, and `tail` for its last ones."""
    count = len(target.overload._schema.arguments) - len(tail)
    return lambda node: instead(node, before(node, target.overload, *node.args[:count], *tail))


def _part_of_the_largest(node: fx.Node) -> None:
    x, dim, outer, axes = node.args
    largest = before(node, ops.all_reduce_max.overload, x, axes)
    instead(node, before(node, ops.shard.overload, largest, dim, outer, axes, "I"))


def _smallest(node: fx.Node) -> None:
    largest = before(node, ops.all_reduce_max.overload, before(node, aten.neg.default, node.args[0]), node.args[1])
    instead(node, before(node, aten.neg.default, largest))


def _in_their_place(node: fx.Node) -> None:
    instead(node, before(node, own_place, node.args[0], node.args[1], place(node, axes_of(node))))


def _way_back(node: fx.Node) -> None:
    x, send, receive, *rest = node.args
    node.args = (x, receive, send, *rest)


def _other_way(node: fx.Node) -> None:
    node.update_arg(3, -node.args[3])


_KINDS: dict[str, dict[str, Change]] = {
    "all_reduce": {"once": _becomes(ops.once, "I"), "all_reduce_max": _becomes(ops.all_reduce_max)},
    "all_reduce_max": {"all_reduce": _becomes(ops.all_reduce, "I"), "the smallest value": _smallest},
    "all_gather": {"pad": _becomes(ops.pad)},
    "reduce_scatter": {"the part of the largest term": _part_of_the_largest},
    "shard": {"reduce_scatter": _becomes(ops.reduce_scatter)},
    "pad": {"all_gather": _becomes(ops.all_gather, "R")},
    "once": {"all_reduce": _becomes(ops.all_reduce, "I")},
    "all_gather_v": {"the own rows in their place": _in_their_place},
    "all_to_all_v": {"its own way back": _way_back},
    "shift": {"the other way around": _other_way},
}


# --- other blocks -------------------------------------------------------------------------------------------------------

_IN_BLOCKS = {ops.all_gather, ops.reduce_scatter, ops.shard, ops.pad}


def other_blocks(node: fx.Node, mesh: FoldedMesh) -> Mistakes:
    """The parts of a fused dimension, such as gate and up, cut or joined as if they were one; one part as if it were two."""
    known = collective(node)
    if known in _IN_BLOCKS:
        assert known is not None
        dim, outer = node.args[1:3]
        parts = node.args[0].meta["val"].shape[dim]
        parts = parts if known in (ops.all_gather, ops.pad) else parts // ranks_of(mesh, axes_of(node))
        other = 1 if outer > 1 else 2
        if parts % other == 0:
            yield f"{known.name} over {axes_of(node)} takes {outer} blocks for {other}", lambda node: node.update_arg(2, other)


# --- off by a factor ----------------------------------------------------------------------------------------------------


def scaled(node: fx.Node, mesh: FoldedMesh) -> Mistakes:
    """Times the size of each axis, and divided by it. Scaling what goes in is the same: each of them commutes with it."""
    known = collective(node)
    if known is None or known is ops.axis_index:
        return
    for size in dict.fromkeys(mesh.size(a) for a in axes_of_both_views(mesh)):
        told = f"{known.name} over {axes_of(node)}"
        yield f"{told} times {size}", partial(_multiply, size)
        yield f"{told} divided by {size}", partial(_divide, size)


def _multiply(size: int, node: fx.Node) -> None:
    wrap(node, aten.mul.Tensor, size)


def _divide(size: int, node: fx.Node) -> None:
    if node.meta["val"].is_floating_point():
        wrap(node, aten.div.Tensor, size)
    else:
        wrap(node, aten.div.Tensor_mode, size, rounding_mode="floor")
