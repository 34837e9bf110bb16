"""Mistakes about places: two ranks in each other's role, and slices that start one further."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from foldcc import ops
from foldcc.mesh import FoldedMesh
from foldcc.testing.mutate.collectives import Mistakes, axes_of, collective, ranks_of
from foldcc.testing.mutate.edits import before, exchanged, feed, instead, place, wrap
from foldcc.testing.mutate.stand_ins import exchanged_index, exchanged_rows

aten = torch.ops.aten
_ORDERLESS = {ops.all_reduce, ops.all_reduce_max}
_BY_PLACE = {ops.exchange, ops.shift, ops.halo, ops.halo_sum}  # what a rank is sent depends on its own place alone


def swapped(node: fx.Node, mesh: FoldedMesh) -> Mistakes:
    """The first rank of a group with the second, and with the last."""
    known = collective(node)
    if known is None or known in _ORDERLESS | _BY_PLACE:
        return
    ranks = ranks_of(mesh, axes_of(node))
    for other in dict.fromkeys((1, ranks - 1)):
        if other:
            told = f"ranks 0 and {other} of {axes_of(node)} change places in {known.name}"
            yield told, partial(_swap, ranks, 0, other)


def _swap(ranks: int, first: int, second: int, node: fx.Node) -> None:
    args: tuple[Any, ...] = node.args
    known = collective(node)
    if known is ops.axis_index:
        wrap(node, exchanged_index, first, second)
    elif known is ops.once:
        mine = before(node, aten.eq.Scalar, place(node, axes_of(node)), second)
        instead(node, before(node, aten.mul.Tensor, args[0], mine))
    elif known in (ops.all_gather, ops.pad):
        readers = list(node.users)
        new = exchanged(node.next, node, args[1], args[2], ranks, first, second)
        new.meta = dict(node.meta)
        for reader in readers:
            reader.replace_input_with(node, new)
    elif known in (ops.reduce_scatter, ops.shard):
        node.update_arg(0, exchanged(node, args[0], args[1], args[2], ranks, first, second))
    elif known is ops.all_to_all:
        node.update_arg(0, exchanged(node, args[0], 0, 1, ranks, first, second))
    elif known is ops.reduce_scatter_v:
        feed(node, exchanged_rows, args[1], first, second)
    else:
        sizes = args[2] if known is ops.all_to_all_v else args[1]
        wrap(node, exchanged_rows, sizes, first, second)


_CUTS = {aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, ops.shard.overload}
_PUTS = {aten.slice_backward.default: 2, aten.slice_scatter.default: 2}  # with the position of their dim


def shifted(node: fx.Node, mesh: FoldedMesh) -> Mistakes:
    """Every slice, part, offset and range, one further; what would fall off the end comes in at the beginning."""
    name = str(node.target).split(".")[1] if isinstance(node.target, torch._ops.OpOverload) else ""
    if node.target in _CUTS:
        dim = _dim(node)
        if node.args[0].meta["val"].shape[dim] != 1:
            yield f"{name} starts one further in dimension {dim}", lambda node: feed(node, aten.roll.default, [-1], [dim])
    elif node.target in _PUTS:
        dim = node.args[_PUTS[node.target]]
        yield f"{name} puts one further in dimension {dim}", lambda node: wrap(node, aten.roll.default, [1], [dim])
    elif node.target is aten.arange.default:
        yield "arange starts at one", lambda node: wrap(node, aten.add.Scalar, 1)
    elif node.target is ops.axis_index.overload:
        ranks = ranks_of(mesh, axes_of(node))
        yield f"the next rank's coordinate on {axes_of(node)}", lambda node: _next(node, ranks)
    elif node.target is aten.mul.Tensor and getattr(node.args[0], "target", None) is ops.axis_index.overload:
        yield "this rank's part starts one further", lambda node: wrap(node, aten.add.Scalar, 1)


def _dim(node: fx.Node) -> int:
    if node.target in (aten.slice.Tensor, ops.shard.overload):
        dim = node.args[1] if len(node.args) > 1 else 0
    else:
        dim = node.args[2] if len(node.args) > 2 else 0
    return int(dim) % node.args[0].meta["val"].dim()


def _next(node: fx.Node, ranks: int) -> None:
    wrap(node, _following, ranks)


def _following(index: torch.Tensor, ranks: int) -> torch.Tensor:
    return (index + 1) % ranks
