"""Attention over grouped heads, as one node. Its meaning is PyTorch's own scaled_dot_product_attention.

A query that may attend to nothing, which happens among padding, gets zeros there, and so does it here. With a `softcap` c,
scores s become c * tanh(s / c), before the mask. Queries may stand later than keys, from the position `start` on. With a
`dropout` p, the weights that `keep` does not keep are zero, and the others are divided by 1 - p. A bool `mask` says who
attends; any other is added to the scores, after the cap.

Shapes: q [b, h, q, d], k [b, g, k, d], v [b, g, k, e], sinks [h], valid [b, k], start [], keep [b, h, q, k],
mask [b, h, q, k] or what broadcasts to it -> [b, q, h, e], where h = g * r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import scaled_dot_product_attention

from foldcc.layout import VARYING, Layout, Shard, letter
from foldcc.ops.captured import Division, Positions, Site, captured
from foldcc.ops.positions import first, scalar
from foldcc.ops.random import gain
from foldcc.ops.ring import allowed_pairs
from foldcc.ops.sequences import around, halves, ring, turned, zigzag_ring

aten = torch.ops.aten


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    valid: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float = 0.0,
    start: Tensor | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    if window >= k.shape[2]:
        window = 0
    alone = valid is None and window == 0 and (start is None or not causal)  # causality decides alone, or nothing does
    alone = alone and not (causal and mask is not None)
    allowed = None if alone else allowed_pairs(q, k, valid, causal, window, start)
    added = None
    if mask is not None and mask.dtype == torch.bool:
        allowed = mask if allowed is None else allowed & mask
    else:
        added = mask
    grouped = q.shape[1] != k.shape[1]
    if sinks is None and not softcap and keep is None and added is None:
        y = scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=causal and allowed is None, scale=scale, enable_gqa=grouped
        )
        return y.transpose(1, 2)
    if allowed is None:
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        allowed = allowed.tril() if causal else allowed
    if grouped:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    if added is not None:
        scores = scores + added
    scores = scores.masked_fill(~allowed, float("-inf"))
    wide = torch.promote_types(q.dtype, torch.float32)
    if sinks is None:
        weights = torch._safe_softmax(scores.to(wide), -1).to(q.dtype)
    else:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], -1).to(wide).softmax(-1).to(q.dtype)[..., :-1]
    if keep is not None:
        weights = weights * keep * gain(dropout)
    return (weights @ v).transpose(1, 2)


def _selected(at: Site, q: Node, k: Node, v: Node, **rest: Any) -> Node:
    """Key/value heads are fewer than parts of the queries: each rank takes, of all, those that its query heads use."""
    layout: Layout = k.meta["layout"]
    queries: Layout = q.meta["layout"]
    # Axes that divide the query heads and not those of keys; of several, the inner ones divide what the outer ones leave.
    axes = [a for a, s in queries.states.items() if isinstance(s, Shard) and s.dim == 1 and letter(layout.states[a]) != VARYING]
    mine, shared, dim = queries.shape[1], layout.shape[1], queries.dims[1]
    group = mine * prod(layout.ranks[a] for a in axes) // shared  # query heads for each key/value head
    divided: dict[str, Any] = {a: queries.states[a] for a in axes}
    one = scalar(layout, ",".join(axes))
    each = replace(one, dims=(dim,), states={**one.states, **{a: replace(s, dim=0) for a, s in divided.items()}})
    start = first(at.emit, ",".join(axes), mine, k)
    own = at.emit(aten.arange.default, (mine,), each, device=k.meta["val"].device)
    used = at.emit(aten.add.Tensor, (own, start), each)
    used = at.emit(aten.div.Tensor_mode, (used, group), each, rounding_mode="floor")

    def repeated(x: Node) -> Node:
        whole: Layout = x.meta["layout"]
        heads = replace(whole, dims=(whole.dims[0], dim, *whole.dims[2:]), states={**whole.states, **divided})
        return at.emit(aten.index_select.default, (x, 1, used), heads)

    return at.local(q=q, k=repeated(k), v=repeated(v), **rest)


def _gathered(at: Site, q: Node, k: Node, v: Node, **rest: Any) -> Node:
    """Each rank attends with its queries to all keys: it has to know how far its first query stands from the first key."""
    return at.local(q=q, k=k, v=v, **{**rest, "start": first(at.emit, at.axes, q.meta["layout"].shape[2], q)})


def _gathered_zigzag(at: Site, q: Node, k: Node, v: Node, valid: Node | None, keep: Node | None, **rest: Any) -> Node:
    """The same where a rank has a block from each end: its front queries stand in the first half, and see no key behind it."""
    emit, dim = at.emit, 2
    front, back = halves(emit, q, dim)
    masks = (None, None) if keep is None else halves(emit, keep, dim)
    near = {name: x and halves(emit, x, d)[0] for name, x, d in (("k", k, dim), ("v", v, dim), ("valid", valid, 1))}
    near["keep"] = masks[0] and halves(emit, masks[0], 3)[0]
    each, ranks = front.meta["layout"].shape[dim], prod(at.layout.ranks[a] for a in at.axes.split(","))
    start = first(emit, at.axes, each, q)
    last = emit(aten.rsub.Scalar, (start, (2 * ranks - 1) * each), start.meta["layout"])
    parts = [
        at.local(**{**rest, **near, "q": front, "start": start}),
        at.local(**{**rest, "q": back, "k": k, "v": v, "valid": valid, "keep": masks[1], "start": last}),
    ]
    like = turned(front.meta["layout"])
    for x in parts:
        x.meta["layout"] = replace(like, dims=(*like.dims[:3], at.layout.dims[3]))
    return emit(aten.cat.default, (parts, 1), at.layout)


# Parts of the query heads, and what a rank does for the key/value heads that they use: it has them, or is given all of them.
_BY_HEADS = {("kv_heads",): None, ("group",): None, ("kv_heads", "group"): _selected}


def _rule(q: Node, k: Node, mask: Node | None, **_: Any) -> str:
    """A dimension of a mask that broadcasts is a letter of its own."""
    (b, h, queries, _d), keys = q.meta["val"].shape, k.meta["val"].shape[2]
    given = () if mask is None else mask.meta["val"].shape
    places = list(zip(("b", "(kv_heads group)", "[q]", "[k]"), (b, h, queries, keys), "wxyz", strict=True))
    dims = [x if n == m else other for n, (x, m, other) in zip(given, places[4 - len(given) :], strict=True)]
    return (
        "b (kv_heads group) [q] [head_dim], b kv_heads [k] [head_dim], b kv_heads [k] [value_dim], (kv_heads group), b [k], ,"
        f" b (kv_heads group) [q] [k], {' '.join(dims)} -> b [q] (kv_heads group) [value_dim] ; linear 2"
    )


def _no_ring(ranks: int, *, start: Node | None, keep: Node | None, mask: Node | None, **_: Any) -> str:
    """Why keys and values cannot stay divided."""
    if start is not None:
        return "queries stand elsewhere than keys"
    if mask is not None:
        return "a mask says who attends"
    return "dropout draws a mask for all keys" if keep is not None else ""


def _sent_around(ranks: int, **_: Any) -> tuple[Mapping[str, float], int]:
    """Keys and values go around once forward and once backward, and their gradients once."""
    return dict.fromkeys("kv", 3 * (ranks - 1) / ranks), 6 * (ranks - 1)


def _no_zigzag(ranks: int, *, q: Node, k: Node, causal: bool, start: Node | None, **_: Any) -> str:
    """Why queries that stand at both ends have no less to do."""
    if start is not None or q.meta["val"].shape[2] != k.meta["val"].shape[2]:
        return "queries stand elsewhere than keys"
    return "" if causal else "queries see keys behind them"


def _no_zigzag_ring(ranks: int, **given: Any) -> str:
    return _no_zigzag(ranks, **given) or _no_ring(ranks, **given)


def _of_half(ranks: int, **_: Any) -> float:
    """One block of two sees all keys, the other one the first half of them."""
    return 3 / (4 * ranks)


def _of_pairs(ranks: int, **_: Any) -> float:
    """Three pairs of blocks in the first step, and two in each other one, of all pairs of 2 n blocks."""
    return (2 * ranks + 1) / (2 * ranks) ** 2


def _whole(ranks: int, *, k: Node, valid: Node | None, causal: bool, window: int, **_: Any) -> float:
    """PyTorch's kernels leave out what causality alone masks."""
    alone = causal and valid is None and not 0 < window < k.meta["val"].shape[2]
    return 1 / (2 * ranks if alone else ranks)


def _no_halo(ranks: int, *, k: Node, causal: bool, window: int, **rest: Any) -> str:
    if not causal:
        return "queries see keys behind them"
    return _no_ring(ranks, **rest) if 0 < window < k.meta["val"].shape[2] else "no window bounds how far queries see"


def _sent_before(ranks: int, *, k: Node, window: int, **_: Any) -> tuple[Mapping[str, float], int]:
    """As many positions as queries see before their own part, forward, and their gradients backward."""
    return dict.fromkeys("kv", 2 * min((window - 1) / k.meta["val"].shape[2], 1 - 1 / ranks)), 4


def _products(q: Any, k: Any, v: Any, **_: Any) -> tuple[tuple[float, tuple[str, ...], tuple[str, ...]], ...]:
    pairs = 2 * prod(q[:3]) * k[2]
    return (pairs * q[3], ("q",), ("k",)), (pairs * v[3], ("q", "k"), ("v",))


attention = captured(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? valid, float scale, bool causal, int window, "
    "float softcap=0.0, Tensor? start=None, Tensor? keep=None, float dropout=0.0, Tensor? mask=None) -> Tensor",
    meaning="scaled_dot_product_attention over grouped heads",
    eager=_attend,
    shape=lambda q, k, v, *_: q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]),
    narrow={"q", "k", "v"},
    rule=_rule,
    divisions=(
        Division(("q",), stretch=True, only="cp", way="gathered", lower=_gathered),
        Division(("q",), zigzag=True, only="cp", way="gathered", unfit=_no_zigzag, share=_of_half, lower=_gathered_zigzag),
        Division(("q",), stretch=True, beside=("k",), only="cp", way="ring", unfit=_no_ring, sent=_sent_around, lower=ring),
        Division(
            ("q",),
            zigzag=True,
            beside=("k",),
            only="cp",
            way="ring",
            unfit=_no_zigzag_ring,
            sent=_sent_around,
            share=_of_pairs,
            lower=zigzag_ring,
        ),
        Division(("q",), stretch=True, beside=("k",), only="cp", way="halo", unfit=_no_halo, sent=_sent_before, lower=around),
        *(Division(x, stretch=True, only="cp", way="ulysses", share=_whole, lower=how) for x, how in _BY_HEADS.items()),
        Division(("kv_heads", "group"), stretch=True, lower=_selected),  # wraps what is written for the sequence
    ),
    products=_products,
    degree=lambda read: 1 + max(read),
    alike=("head_dim", "value_dim"),  # whether queries and values are equally wide decides how it is computed
    positions=Positions(queries="q", keys="k", dim=2, window="window", valid="valid", pairs="mask"),
).overload
