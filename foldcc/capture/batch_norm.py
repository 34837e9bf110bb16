"""Batch norms, in training over the samples of all ranks, as the model says: written as means, which types reduce.

y = batch_norm(x)          becomes          m = mean(x);  v = mean((x - m)²);  y = (x - m) / sqrt(v + eps) * weight + bias
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _own(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the variance of each channel, computed in float32 at least."""
    over = [d for d in range(x.dim()) if d != 1]
    whole = x.float() if x.element_size() < 4 else x
    mean = whole.mean(over, keepdim=True)
    return mean.flatten(), (whole - mean).square().mean(over)


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float) -> Any:
    """What a batch norm returns: the result, the mean, and by what it was multiplied."""
    channels = [-1, *[1] * (x.dim() - 2)]
    scale = (variance + eps).rsqrt()
    y = (x - mean.view(channels)) * scale.view(channels)
    y = y if weight is None else y * weight.view(channels)
    y = y if bias is None else y + bias.view(channels)
    return y.to(x.dtype), mean, scale


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
    mean, variance = _own(x)
    count = x.numel() // x.shape[1]
    new_mean = running_mean * (1 - momentum) + mean.detach() * momentum
    new_var = running_var * (1 - momentum) + variance.detach() * (momentum * count / (count - 1))
    new = new_mean.to(running_mean.dtype), new_var.to(running_var.dtype)
    return *_normed(x, weight, bias, mean, variance, eps), *new


def _without_state(x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float) -> Any:
    return _normed(x, weight, bias, *_own(x), eps)


def _evaluated(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> Any:
    y, _, _ = _normed(x, weight, bias, mean, var, eps)
    return y, x.new_empty(0), x.new_empty(0)


# What torch.export makes of a batch norm.
DECOMPOSED = {
    aten._native_batch_norm_legit_functional.default: _with_state,
    aten._native_batch_norm_legit.no_stats: _without_state,
    aten._native_batch_norm_legit_no_training.default: _evaluated,
}
