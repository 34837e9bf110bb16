"""What cp writes in the place of attention, where keys and values stay divided: a ring, or a halo around each rank's part."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.fx import Node

from foldcc.layout import VARYING, Layout, Shard, Symbol
from foldcc.ops.captured import Emit, Site
from foldcc.ops.collectives import axis_index
from foldcc.ops.halo import halo
from foldcc.ops.positions import first, scalar
from foldcc.ops.ring import attend_block, either, shift

aten = torch.ops.aten
Keys = tuple[Node | None, ...]  # keys, values, and which of them are there


@dataclass(frozen=True)
class _Ring:
    """Where a ring runs, and what is the same for all of its steps."""

    at: Site
    how: tuple[Any, ...]
    ranks: int
    rank: Node

    @classmethod
    def of(cls, at: Site, q: Node, how: tuple[Any, ...]) -> _Ring:
        rank = at.emit(axis_index, (at.axes, q.meta["val"].device), scalar(at.layout, at.axes))
        return cls(at, how, prod(at.layout.ranks[a] for a in at.axes.split(",")), rank)

    def number(self, target: Any, *args: Any) -> Node:
        """An operator on numbers of which each rank has one."""
        return self.at.emit(target, args, self.rank.meta["layout"])

    def source(self, step: int) -> Node:
        """The rank whose keys come in a step."""
        return self.number(aten.remainder.Scalar, self.number(aten.sub.Tensor, self.rank, step), self.ranks)

    def later(self, place: Node, than: Node, each: int) -> Node:
        """How far the first position of a block stands behind that of another."""
        return self.number(aten.mul.Tensor, self.number(aten.sub.Tensor, place, than), each)

    def sent(self, keys: Keys, step: int) -> Keys:
        """The keys of the rank that is so many places before; asked for again by the backward pass, so that none are kept."""
        if not step:
            return keys
        dims = (2, 2, 1)
        return tuple(
            x and self.at.emit(shift, (x, d, self.at.axes, step), x.meta["layout"]) for x, d in zip(keys, dims, strict=True)
        )

    def chosen(
        self, told: Node, these: Sequence[Node | None], others: Sequence[Node | None], by: Any = aten.where.self
    ) -> tuple[Any, ...]:
        """These on ranks where a condition holds, others where it does not; by `either`, they are not kept."""
        emit = self.at.emit
        return tuple(x and emit(by, (told, x, y), x.meta["layout"]) for x, y in zip(these, others, strict=True))


@dataclass(frozen=True)
class _Queries:
    """Some of a rank's queries, and what is carried for them: the sums over values, of weights, and the largest score."""

    ring: _Ring
    q: Node
    state: tuple[Node, ...]

    @classmethod
    def of(cls, ring: _Ring, q: Node, sinks: Node | None) -> _Queries:
        emit, layout, wide = ring.at.emit, q.meta["layout"], torch.promote_types(q.meta["val"].dtype, torch.float32)
        column = replace(layout, dims=(*layout.dims[:3], ()))
        columns = replace(layout, dims=(*layout.dims[:3], ring.at.layout.dims[3]))

        def filled(number: float, like: Layout) -> Node:
            return emit(aten.full.default, (list(like.shape), number), like, dtype=wide, device=q.meta["val"].device)

        values, total, largest = filled(0.0, columns), filled(0.0, column), filled(torch.finfo(wide).min, column)
        if sinks is not None:
            rows = emit(aten.view.default, (sinks, [1, -1, 1, 1]), replace(column, dims=((), column.dims[1], (), ())))
            sink = emit(aten.expand.default, (rows, list(column.shape)), column)
            sink = emit(aten._to_copy.default, (sink,), column, dtype=wide)
            largest = emit(aten.detach.default, (sink,), column)
            total = emit(aten.exp.default, (emit(aten.sub.Tensor, (sink, largest), column),), column)
        return cls(ring, q, (values, total, largest))

    def attend(self, keys: Keys, start: Node) -> _Queries:
        """The same with what they see of a block of keys, than which they stand `start` later."""
        emit, layouts = self.ring.at.emit, [x.meta["layout"] for x in self.state]
        values, total, largest = self.state
        state = (values, total, emit(aten.detach.default, (largest,), layouts[2]), start)
        found = emit(attend_block, (self.q, *keys, *state, *self.ring.how), layouts[0])
        return replace(self, state=tuple(emit(operator.getitem, (found, i), like) for i, like in enumerate(layouts)))

    @property
    def seen(self) -> Node:
        """The values that they see, in the dtype of queries."""
        emit, (values, total, _) = self.ring.at.emit, self.state
        columns, column = (x.meta["layout"] for x in (values, total))
        nothing = emit(aten.eq.Scalar, (total, 0), column)  # what a query among padding may attend to
        whole = emit(aten.masked_fill.Scalar, (total, nothing, 1.0), column)
        dtype = self.q.meta["val"].dtype
        return emit(aten._to_copy.default, (emit(aten.div.Tensor, (values, whole), columns),), columns, dtype=dtype)


def _ring(
    at: Site, q: Node, k: Node, v: Node, scale: float, causal: bool, window: int, softcap: float
) -> tuple[_Ring, Node, Node]:
    """The ring, and queries and keys; scaled where values are not as wide: so PyTorch does it then, and so do proofs."""
    if q.meta["layout"].shape[3] != v.meta["layout"].shape[3]:
        q, k = (at.emit(aten.mul.Tensor, (x, scale**0.5), x.meta["layout"]) for x in (q, k))
        scale = 1.0
    return _Ring.of(at, q, (scale, causal, window, softcap)), q, k


def ring(at: Site, q: Node, k: Node, v: Node, sinks: Node | None, valid: Node | None, **how: Any) -> Node:
    """Each rank attends to its own block of keys, then to that of the rank before, and so on; `valid` travels with them."""
    around, q, k = _ring(at, q, k, v, *(how[x] for x in ("scale", "causal", "window", "softcap")))
    queries = _Queries.of(around, q, sinks)
    for step in range(around.ranks):
        start = around.later(around.rank, around.source(step), q.meta["layout"].shape[2])
        queries = queries.attend(around.sent((k, v, valid), step), start)
    return at.emit(aten.transpose.int, (queries.seen, 1, 2), at.layout)


def zigzag_ring(at: Site, q: Node, k: Node, v: Node, sinks: Node | None, valid: Node | None, **how: Any) -> Node:
    """The same where a rank has a block from each end: of four pairs of blocks in a step, the two that causality allows.

    Back queries see the front block of every rank. Beside that, front queries see the front block of a rank before theirs,
    and back queries the back block of one behind.
    """
    around, q, k = _ring(at, q, k, v, *(how[x] for x in ("scale", "causal", "window", "softcap")))
    each = q.meta["layout"].shape[2] // 2
    front, back = (_Queries.of(around, x, sinks) for x in halves(at.emit, q, 2))
    ends = [(None, None) if x is None else halves(at.emit, x, dim) for x, dim in ((k, 2), (v, 2), (valid, 1))]
    first_keys, last_keys = (tuple(x[i] for x in ends) for i in (0, 1))
    own = around.source(0)
    last = around.number(aten.rsub.Scalar, own, 2 * around.ranks - 1)
    front = front.attend(first_keys, around.later(own, own, each))
    back = back.attend(first_keys, around.later(last, own, each)).attend(last_keys, around.later(last, last, each))
    for step in range(1, around.ranks):
        source, there, behind = around.source(step), around.sent(first_keys, step), around.sent(last_keys, step)
        back = back.attend(there, around.later(last, source, each))
        earlier = around.number(aten.lt.Tensor, source, own)
        (queries,) = around.chosen(earlier, [front.q], [back.q], either)
        some = _Queries(around, queries, around.chosen(earlier, front.state, back.state))
        apart = around.number(aten.abs.default, around.later(own, source, each))
        some = some.attend(around.chosen(earlier, there, behind, either), apart)
        front = replace(front, state=around.chosen(earlier, some.state, front.state))
        back = replace(back, state=around.chosen(earlier, back.state, some.state))
    y = at.emit(aten.cat.default, ([front.seen, back.seen], 2), turned(at.layout))
    return at.emit(aten.transpose.int, (y, 1, 2), at.layout)


def halves(emit: Emit, x: Node, dim: int) -> tuple[Node, Node]:
    """The two blocks of a rank that has one from each end of a dimension; of a whole dimension the first half, and the rest."""
    layout: Layout = x.meta["layout"]
    whole, each = int(layout.global_shape[dim]), int(layout.shape[dim]) // 2
    half = Symbol(f"half_{layout.dims[dim][0].name}", integer=True, positive=True)
    dims = tuple((half,) if d == dim else factors for d, factors in enumerate(layout.dims))
    states = {a: Shard(dim, 0, 1) if isinstance(s, Shard) and s.dim == dim else s for a, s in layout.states.items()}
    like = replace(layout, dims=dims, states=states, sizes={**layout.sizes, half: whole // 2})
    first, last = (emit(aten.slice.Tensor, (x, dim, i * each, (i + 1) * each), like) for i in (0, 1))
    return first, last


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

    if valid is None:
        keys = longer(replace(one, dims=((), ())), 1, axes, before + each - 1)
        start = emit(aten.sub.Tensor, (first(emit, axes, each, k), before), one)
        positions = emit(aten.add.Tensor, (emit(aten.arange.default, (before + each,), keys, device=device), start), keys)
        there = emit(aten.unsqueeze.default, (emit(aten.ge.Scalar, (positions, 0), keys), 0), keys)
    else:
        there = emit(halo, (valid, 1, axes, before), longer(valid.meta["layout"], 1, axes, before))
    k, v = (emit(halo, (x, 2, axes, before), longer(x.meta["layout"], 2, axes, before)) for x in (k, v))
    start = emit(aten.full.default, ([], before), one, dtype=torch.int64, device=device)
    return at.local(**{**rest, "q": q, "k": k, "v": v, "valid": there, "window": window, "start": start})


def longer(layout: Layout, dim: int, axes: str, by: int) -> Layout:
    """The layout of what a rank has with more positions than its own."""
    seen = Symbol("seen", integer=True, positive=True)
    dims = tuple((seen,) if d == dim else factors for d, factors in enumerate(layout.dims))
    states = {**layout.states, **dict.fromkeys(axes.split(","), VARYING)}
    return replace(layout, dims=dims, states=states, sizes={**layout.sizes, seen: int(layout.shape[dim]) + by})


def turned(layout: Layout) -> Layout:
    """The layout of a value with its dimensions 1 and 2 exchanged."""
    dims, there = layout.dims, {1: 2, 2: 1}
    states = {a: replace(s, dim=there.get(s.dim, s.dim)) if isinstance(s, Shard) else s for a, s in layout.states.items()}
    return replace(layout, dims=(dims[0], dims[2], dims[1], dims[3]), states=states)
