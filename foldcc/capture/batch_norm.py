"""Batch norms in training, over the samples of all ranks, as the model says: written as means, which types reduce.

    y = batch_norm(x)          becomes          m = mean(x);  v = mean((x - m)²);  y = (x - m) / sqrt(v + eps) * weight + bias
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the mean and the variance of each channel, computed in float32 at least."""
    over, whole = [d for d in range(x.dim()) if d != 1], x.float() if x.element_size() < 4 else x
    mean = whole.mean(over, keepdim=True)
    centred = whole - mean
    variance = centred.square().mean(over, keepdim=True)
    y = centred * (variance + eps).rsqrt()
    y = y if weight is None else y * weight.view_as(mean)
    y = y if bias is None else y + bias.view_as(mean)
    return y.to(x.dtype), mean.flatten(), variance.flatten()


def _with_state(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    y, mean, variance = _normed(x, weight, bias, eps)
    count = x.numel() // x.shape[1]
    new_mean = running_mean * (1 - momentum) + mean.detach() * momentum
    new_var = running_var * (1 - momentum) + variance.detach() * (momentum * count / (count - 1))
    return y, mean, (variance + eps).rsqrt(), new_mean.to(running_mean.dtype), new_var.to(running_var.dtype)


def _without_state(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, variance = _normed(x, weight, bias, eps)
    return y, mean, (variance + eps).rsqrt()


# What torch.export makes of a batch norm in training. In evaluation it treats samples alone.
DECOMPOSED = {
    aten._native_batch_norm_legit_functional.default: _with_state,
    aten._native_batch_norm_legit.no_stats: _without_state,
}
