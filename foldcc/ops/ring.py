"""Attention around a ring: keys and values travel, block by block, and a rank never has those of the whole sequence.

    state = none yet
    for step in range(ranks):
        state = attend_block(q, k, v, valid, *state, start)      what the queries see of one block is added
        k, v, valid = shift(k), shift(v), shift(valid)           the block of the rank before comes in
    y = values / total

The state is, for each query, the largest score so far, the sum of exponentials of the scores less it, and the sum of the
values that are weighed by these. A backward pass computes the scores of a block again (Liu et al. 2023, arXiv 2310.01889).

Shapes: q [b, h, q, d], k [b, g, k, d], v [b, g, k, e], valid [b, k]; values [b, h, q, e], total and largest [b, h, q, 1].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from foldcc.ops.groups import index, process_group, size
from foldcc.ops.operator import Operator, operator

_QUERIES = 512  # whose scores are there at a time, so that memory grows with the keys alone
Three = tuple[Tensor, Tensor, Tensor]


def _shifted(x: Tensor, axes: str, by: int) -> Tensor:
    group, ranks, place = process_group(axes), size(axes), index(axes)
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    to, source = ((place + step) % ranks for step in (by, -by))
    sends = dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=to)
    receives = dist.P2POp(dist.irecv, result, group=group, group_peer=source)
    for request in dist.batch_isend_irecv([sends, receives]):
        request.wait()
    return result


shift: Operator = operator(
    "shift(Tensor x, int dim, str axes, int by) -> Tensor",
    meaning="the part along dim of the rank that is `by` places before this one, around the ring",
    types="V -> V",
    eager=lambda x, dim, axes, by: _shifted(x, axes, by),
    shape=lambda x, dim, axes, by: torch.empty_like(x),
    transpose=lambda grad, x, dim, axes, by: shift(grad, dim, axes, -by),
    simulate=lambda calls: [calls[(i - c[3]) % len(calls)][0] for i, c in enumerate(calls)],
    sent=lambda x, y, ranks: x,
    moves=True,
    again=True,
)


either: Operator = operator(
    "either(Tensor told, Tensor x, Tensor y) -> Tensor",
    meaning="x on ranks where a condition holds, y on others",
    eager=torch.where,
    shape=lambda told, x, y: torch.empty_like(x),
    transpose=lambda grad, told, x, y: (None, *(torch.where(own, grad, 0) for own in (told, ~told))),
    again=True,
)


def allowed_pairs(q: Tensor, k: Tensor, valid: Tensor | None, causal: bool, window: int, start: Tensor | None) -> Tensor:
    """Boolean mask of the pairs (query, key) that may attend; queries stand `start` positions later than keys."""
    own = torch.arange(q.shape[2], device=q.device)
    distance = (own if start is None else own + start)[:, None] - torch.arange(k.shape[2], device=q.device)
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        allowed = allowed & (distance < window) & (distance > -window)
    allowed = allowed[None, None]
    return allowed if valid is None else allowed & valid[:, None, None].to(torch.bool)


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """[b, h, q, d] as [b, g, r * q, d]: the queries of one key/value head."""
    return x.reshape(x.shape[0], k.shape[1], -1, x.shape[3])


def _weights(
    q: Tensor, k: Tensor, valid: Tensor | None, largest: Tensor, start: Tensor,
    scale: float, causal: bool, window: int, softcap: float,
) -> Three:  # fmt: skip
    """Of each pair the exponential of its score less the largest one so far, the scores, and the largest."""
    scores = (_by_group(q, k) @ k.transpose(-1, -2)).view(*q.shape[:3], k.shape[2]).to(largest.dtype) * scale
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    allowed = allowed_pairs(q, k, valid, causal, window, start)
    masked = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    now = torch.maximum(largest, masked.amax(-1, True))
    return (masked - now).exp() * allowed, scores, now


def _block(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, values: Tensor, total: Tensor, largest: Tensor, start: Tensor,
    *how: Any,
) -> Three:  # fmt: skip
    parts = zip(*(x.split(_QUERIES, 2) for x in (q, values, total, largest)), strict=True)
    found = [_some(x, k, v, valid, a, b, c, start + i * _QUERIES, *how) for i, (x, a, b, c) in enumerate(parts)]
    values, total, largest = (torch.cat(x, 2) for x in zip(*found, strict=True))
    return values, total, largest


def _some(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    values: Tensor,
    total: Tensor,
    largest: Tensor,
    start: Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Three:
    """A part of the queries."""
    weights, _, now = _weights(q, k, valid, largest, start, scale, causal, window, softcap)
    before = (largest - now).exp()
    seen = (_by_group(weights.to(v.dtype), k) @ v).view(values.shape)
    return values * before + seen, total * before + weights.sum(-1, True), now


def _back(
    to_values: Tensor, to_total: Tensor,
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, largest: Tensor, start: Tensor,
    *how: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, values and total: the largest score cancels out, so it has none."""
    ends, of_k, of_v = [], *(torch.zeros_like(x, dtype=largest.dtype) for x in (k, v))
    parts = zip(*(x.split(_QUERIES, 2) for x in (to_values, to_total, q, largest)), strict=True)
    for i, (values, total, x, most) in enumerate(parts):
        of_q, more_k, more_v, *of_state = _some_back(values, total, x, k, v, valid, most, start + i * _QUERIES, *how)
        of_k, of_v = of_k + more_k, of_v + more_v
        ends.append((of_q, *of_state))
    of_q, of_values, of_total = (torch.cat(x, 2) for x in zip(*ends, strict=True))
    return of_q, of_k.to(k.dtype), of_v.to(v.dtype), of_values, of_total


def _some_back(
    to_values: Tensor, to_total: Tensor,
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, largest: Tensor, start: Tensor,
    scale: float, causal: bool, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of a part of the queries."""
    weights, scores, now = _weights(q, k, valid, largest, start, scale, causal, window, softcap)
    before = (largest - now).exp()
    rows = _by_group(to_values, k).to(v.dtype)
    of_scores = weights * ((rows @ v.transpose(-1, -2)).view(weights.shape) + to_total)
    if softcap:
        of_scores = of_scores * (1 - (scores / softcap).square())
    of_scores = _by_group((of_scores * scale).to(q.dtype), k)
    of_k = of_scores.transpose(-1, -2) @ _by_group(q, k)
    of_v = _by_group(weights.to(v.dtype), k).transpose(-1, -2) @ rows
    return (of_scores @ k).view(q.shape), of_k, of_v, to_values * before, to_total * before


_PAIRS, _HOW = "Tensor q, Tensor k, Tensor v, Tensor? valid", "float scale, bool causal, int window, float softcap"

attend_block_backward: Operator = operator(
    f"attend_block_backward(Tensor to_values, Tensor to_total, {_PAIRS}, Tensor largest, Tensor start, {_HOW}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    meaning="the transpose of attend_block",
    eager=_back,
    shape=lambda to_values, to_total, q, k, v, *_: tuple(map(torch.empty_like, (q, k, v, to_values, to_total))),
)


def _transposed(
    to_values: Tensor, to_total: Tensor, to_largest: Tensor,
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, values: Tensor, total: Tensor, *rest: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    of_q, of_k, of_v, *of_state = attend_block_backward(to_values, to_total, q, k, v, valid, *rest)
    return (of_q, of_k, of_v, *([] if valid is None else [None]), *of_state)


attend_block: Operator = operator(
    f"attend_block({_PAIRS}, Tensor values, Tensor total, Tensor largest, Tensor start, {_HOW}) -> (Tensor, Tensor, Tensor)",
    meaning="values, total and largest, with what the queries see of one block of keys; queries stand `start` later than these",
    eager=_block,
    shape=lambda q, k, v, valid, values, total, largest, *_: tuple(map(torch.empty_like, (values, total, largest))),
    transpose=_transposed,
)
