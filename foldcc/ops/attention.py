"""Attention over grouped heads, as one node. Its meaning is PyTorch's own scaled_dot_product_attention.

A query that may attend to nothing, which happens among padding, gets zeros there, and so does it here.

Shapes: q [b, h, q, d], k [b, g, k, d], v [b, g, k, e], sinks [h], valid [b, k] -> [b, q, h, e], where h = g * r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foldcc.ops.autocast import computes_in_autocast_dtype
from foldcc.ops.operator import LIBRARY, without_gradient


def _allowed(q: Tensor, k: Tensor, valid: Tensor | None, causal: bool, window: int) -> Tensor | None:
    """Boolean mask of the pairs (query, key) that may attend, None when causality alone decides."""
    if valid is None and window == 0:
        return None
    distance = torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(k.shape[2], device=q.device)
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        allowed = allowed & (distance < window) & (distance > -window)
    allowed = allowed[None, None]
    return allowed if valid is None else allowed & valid[:, None, None].to(torch.bool)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    valid: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> Tensor:
    if window >= k.shape[2]:
        window = 0
    allowed = _allowed(q, k, valid, causal, window)
    grouped = q.shape[1] != k.shape[1]
    if sinks is None:
        y = scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=causal and allowed is None, scale=scale, enable_gqa=grouped
        )
        return y.transpose(1, 2)
    if allowed is None:
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        allowed = allowed.tril() if causal else allowed
    if grouped:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, float("-inf"))
    sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return (weights @ v).transpose(1, 2)


# The captured node must stay one node and the local one must dissolve into ATen, so the same meaning is registered twice.
_ARGUMENTS = "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? valid, float scale, bool causal, int window) -> Tensor"
LIBRARY.define("attention" + _ARGUMENTS)
LIBRARY.define("local_attention" + _ARGUMENTS)
LIBRARY.impl("attention", _attend, "CompositeExplicitAutograd")
LIBRARY.impl("local_attention", _attend, "CompositeImplicitAutograd")


@torch.library.register_fake("foldcc::attention", lib=LIBRARY)
def _shape(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


without_gradient("attention")
attention = torch.ops.foldcc.attention.default
computes_in_autocast_dtype(attention, {"q", "k", "v"})
local_attention = torch.ops.foldcc.local_attention.default
