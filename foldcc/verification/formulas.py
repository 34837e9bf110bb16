"""Of an operator that has several implementations the formula, with which a module and its capture run over a field."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from foldcc.verification.reference import least

_ATTENTION = (torch.nn.functional.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)

_NORMS = (torch.nn.functional.rms_norm, torch.rms_norm)


class Formulas(TorchFunctionMode):
    """Of an operator that has several implementations the formula, on both sides: one of attention's takes the scale apart.

    What depends on the type of an operand depends on the type of the parameters, for elements have no other.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _ATTENTION:
            return attend(*args, **kwargs)
        if func in _NORMS:
            return self.rms_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def rms_norm(self, input: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return torch.rms_norm(input, shape, weight, least(self.dtype) if eps is None else eps)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None:
        allowed = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if allowed else scores + attn_mask
    return torch.dropout(torch.ops.aten._safe_softmax.default(scores, -1), dropout_p, True) @ v
