"""Embedding: PyTorch's own operator, whose rows may be divided. A rank looks up the rows that it has; the others are zero."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from foldcc.layout import Layout
from foldcc.ops.captured import Captured, Division, Index, Site, registered
from foldcc.ops.positions import looked_up, within

aten = torch.ops.aten


def _rows(at: Site, weight: Node, indices: Node, padding_idx: int, **rest: Any) -> Node:
    like: Layout = indices.meta["layout"]
    column, emit = replace(like, dims=(*like.dims, ())), at.emit
    mine, inside = within(emit, at.axes, weight.meta["layout"].shape[0], indices, like)
    places = looked_up(emit, mine, inside, indices, weight.meta["layout"].global_shape[0], like)
    looked = at.local(weight=weight, indices=places)
    if padding_idx >= 0:
        # The row of the padding token is read, and gets no gradient.
        told = emit(aten.unsqueeze.default, (emit(aten.ne.Scalar, (indices, padding_idx), like), -1), column)
        fixed = emit(aten.detach.default, (looked,), at.layout)
        looked = emit(aten.where.self, (told, looked, fixed), at.layout)
    mask = emit(aten.unsqueeze.default, (inside, -1), column)
    return emit(aten.mul.Tensor, (looked, mask), at.layout)


embedding = registered(
    Captured(
        overload=aten.embedding.default,
        local=aten.embedding.default,
        meaning="rows of a table",
        defined=None,
        rule="vocab hidden, ... -> ... hidden ; linear 0",
        divisions=(Division(("vocab",), stretch=True, lower=_rows),),
        index=Index(operand="indices", table="weight", dim=0, padding="padding_idx"),
    )
)
