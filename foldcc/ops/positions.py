"""Where a rank's part of a divided dimension stands in the whole: the first position, and which positions are in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from foldcc.layout import INVARIANT, VARYING, Layout
from foldcc.ops.captured import Emit
from foldcc.ops.collectives import axis_index

aten = torch.ops.aten


def scalar(like: Layout, axes: str) -> Layout:
    """One number for each rank of the axes."""
    return replace(like, dims=(), states={a: VARYING if a in axes.split(",") else INVARIANT for a in like.states})


def first(emit: Emit, axes: str, local: Any, like: Node) -> Node:
    """The first position that a rank has, of a dimension that is divided over axes in parts of `local` positions."""
    one = scalar(like.meta["layout"], axes)
    return emit(aten.mul.Tensor, (emit(axis_index, (axes, like.meta["val"].device), one), local), one)


def looked_up(emit: Emit, mine: Node, inside: Node, ids: Node, whole: Any, like: Layout, ignored: int | None = None) -> Node:
    """Where a rank looks for positions of a table of `whole` rows that ranks divide: at its first, for those that others have.

    A position that no rank has stays what it is, which is none here either: it raises, as in one process.
    """
    known = emit(aten.eq.Tensor, (emit(aten.clamp.default, (ids, 0, whole - 1), like), ids), like)
    if ignored is not None:
        known = emit(aten.logical_or.default, (known, emit(aten.eq.Scalar, (ids, ignored), like)), like)
    return emit(aten.where.self, (known, emit(aten.mul.Tensor, (mine, inside), like), ids), like)


def within(emit: Emit, axes: str, local: Any, ids: Node, like: Layout) -> tuple[Node, Node]:
    """Positions counted from the first that a rank has, and whether it has them."""
    mine = emit(aten.sub.Tensor, (ids, first(emit, axes, local, ids)), like)
    inside = emit(aten.ge.Scalar, (mine, 0), like)
    return mine, emit(aten.logical_and.default, (inside, emit(aten.lt.Scalar, (mine, local), like)), like)
