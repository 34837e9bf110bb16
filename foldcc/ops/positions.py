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


def within(emit: Emit, axes: str, local: Any, ids: Node, like: Layout) -> tuple[Node, Node]:
    """Positions counted from the first that a rank has, and whether it has them."""
    mine = emit(aten.sub.Tensor, (ids, first(emit, axes, local, ids)), like)
    inside = emit(aten.ge.Scalar, (mine, 0), like)
    return mine, emit(aten.logical_and.default, (inside, emit(aten.lt.Scalar, (mine, local), like)), like)
