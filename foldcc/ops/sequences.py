"""What cp writes in the place of attention, where keys and values stay divided: a ring, or a halo around each rank's part."""

from __future__ import annotations

import operator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch.fx import Node

from foldcc.layout import VARYING, Layout, Shard, Symbol
from foldcc.ops.captured import Site
from foldcc.ops.collectives import axis_index
from foldcc.ops.halo import halo
from foldcc.ops.positions import first, scalar
from foldcc.ops.ring import attend_block, shift

aten = torch.ops.aten


def ring(
    at: Site, q: Node, k: Node, v: Node, sinks: Node | None, valid: Node | None, scale: float, causal: bool, window: int,
    softcap: float, **_: Any,
) -> Node:  # fmt: skip
    """Each rank attends to its own block of keys, then to that of the rank before, and so on; `valid` travels with them."""
    emit, axes, layout = at.emit, at.axes, at.layout
    one, columns = scalar(layout, axes), _turned(layout)
    column = replace(columns, dims=(*columns.dims[:3], ()))
    device, wide = q.meta["val"].device, torch.promote_types(q.meta["val"].dtype, torch.float32)
    each, ranks = q.meta["layout"].shape[2], prod(layout.ranks[a] for a in axes.split(","))

    def filled(number: float, like: Layout) -> Node:
        return emit(aten.full.default, (list(like.shape), number), like, dtype=wide, device=device)

    values, total, largest = filled(0.0, columns), filled(0.0, column), filled(torch.finfo(wide).min, column)
    if sinks is not None:
        rows = emit(aten.view.default, (sinks, [1, -1, 1, 1]), replace(column, dims=((), column.dims[1], (), ())))
        sink = emit(aten.expand.default, (rows, list(column.shape)), column)
        sink = emit(aten._to_copy.default, (sink,), column, dtype=wide)
        largest = emit(aten.detach.default, (sink,), column)
        total = emit(aten.exp.default, (emit(aten.sub.Tensor, (sink, largest), column),), column)
    if q.meta["layout"].shape[3] != v.meta["layout"].shape[3]:  # PyTorch scales both factors then, and so do proofs
        q, k = (emit(aten.mul.Tensor, (x, scale**0.5), x.meta["layout"]) for x in (q, k))
        scale = 1.0
    rank = emit(axis_index, (axes, device), one)
    for step in range(ranks):
        block = emit(aten.remainder.Scalar, (emit(aten.sub.Tensor, (rank, step), one), ranks), one)
        start = emit(aten.mul.Tensor, (emit(aten.sub.Tensor, (rank, block), one), each), one)
        state = (values, total, emit(aten.detach.default, (largest,), column), start)
        found = emit(attend_block, (q, k, v, valid, *state, scale, causal, window, softcap), columns)
        values, total, largest = (emit(operator.getitem, (found, i), x) for i, x in enumerate((columns, column, column)))
        if step + 1 < ranks:
            k, v = (emit(shift, (x, 2, axes, 1), x.meta["layout"]) for x in (k, v))
            valid = None if valid is None else emit(shift, (valid, 1, axes, 1), valid.meta["layout"])
    nothing = emit(aten.eq.Scalar, (total, 0), column)  # what a query among padding may attend to
    whole = emit(aten.masked_fill.Scalar, (total, nothing, 1.0), column)
    y = emit(aten._to_copy.default, (emit(aten.div.Tensor, (values, whole), columns),), columns, dtype=q.meta["val"].dtype)
    return emit(aten.transpose.int, (y, 1, 2), layout)


def reach(at: Layout, window: int) -> int:
    """How many keys before its own a rank's queries see."""
    whole, each = at.global_shape[2], at.shape[2]
    assert isinstance(whole, int) and isinstance(each, int)
    return min(window - 1, whole - each)


def around(at: Site, q: Node, k: Node, v: Node, valid: Node | None, window: int, **rest: Any) -> Node:
    """Each rank attends to its own block of keys and to as many before it as the window reaches."""
    emit, axes = at.emit, at.axes
    one, device = scalar(k.meta["layout"], axes), k.meta["val"].device
    each, before = k.meta["layout"].shape[2], reach(k.meta["layout"], window)
    seen = Symbol("seen", integer=True, positive=True)

    def longer(layout: Layout, dim: int) -> Layout:
        dims = tuple((seen,) if d == dim else factors for d, factors in enumerate(layout.dims))
        states = {**layout.states, **dict.fromkeys(axes.split(","), VARYING)}
        return replace(layout, dims=dims, states=states, sizes={**layout.sizes, seen: before + each})

    if valid is None:
        keys = longer(replace(one, dims=((), ())), 1)
        start = emit(aten.sub.Tensor, (first(emit, axes, each, k), before), one)
        positions = emit(aten.add.Tensor, (emit(aten.arange.default, (before + each,), keys, device=device), start), keys)
        there = emit(aten.unsqueeze.default, (emit(aten.ge.Scalar, (positions, 0), keys), 0), keys)
    else:
        there = emit(halo, (valid, 1, axes, before), longer(valid.meta["layout"], 1))
    k, v = (emit(halo, (x, 2, axes, before), longer(x.meta["layout"], 2)) for x in (k, v))
    start = emit(aten.full.default, ([], before), one, dtype=torch.int64, device=device)
    return at.local(**{**rest, "q": q, "k": k, "v": v, "valid": there, "window": window, "start": start})


def _turned(layout: Layout) -> Layout:
    """The layout of a value with its dimensions 1 and 2 exchanged."""
    dims, there = layout.dims, {1: 2, 2: 1}
    states = {a: replace(s, dim=there.get(s.dim, s.dim)) if isinstance(s, Shard) else s for a, s in layout.states.items()}
    return replace(layout, dims=(dims[0], dims[2], dims[1], dims[3]), states=states)
