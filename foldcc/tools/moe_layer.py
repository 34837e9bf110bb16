"""A layer of experts of a standard shape, as the tuner and the benchmarks time it: a router, and what it chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foldcc

SHAPES = {  # H, I, E, K
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "DeepSeek-V3": (7168, 2048, 256, 8),
    "Mixtral-8x7B": (4096, 14_336, 8, 2),
    "gpt-oss-20b": (2880, 2880, 32, 4),
    "Qwen3-Next": (2048, 512, 512, 10),
    "OLMoE": (2048, 1024, 64, 8),
}
TOKENS = (8192, 256)  # experts of these shapes have many rows, and few


def gated(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


def folded_experts(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return foldcc.ops.experts(x, ids, weights, up, down, activation_fn=gated)


class Moe(nn.Module):
    """A router over experts that a function computes."""

    def __init__(self, gate: nn.Parameter, up: nn.Parameter, down: nn.Parameter, chosen: int, experts: Callable[..., Any]):
        super().__init__()
        self.gate, self.up, self.down, self.chosen, self.experts = gate, up, down, chosen, experts

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, ids = F.linear(tokens, self.gate).softmax(-1, dtype=torch.float32).topk(self.chosen)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        return self.experts(tokens, ids, weights, self.up, self.down).view_as(x)


class Shifted(nn.Module):
    """A layer after one with a parameter, so that the gradient of what comes in is computed."""

    def __init__(self, layer: nn.Module, hidden: int):
        super().__init__()
        like = next(layer.parameters())
        self.layer, self.shift = layer, nn.Parameter(torch.zeros(hidden, device=like.device, dtype=like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x + self.shift)
        return y[0] if isinstance(y, tuple) else y


def random_weights(
    hidden: int, width: int, experts: int, device: str, dtype: torch.dtype
) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Weights of a router and of its experts, up and down."""

    def weight(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, device=device, dtype=dtype).mul_(shape[-1] ** -0.5))

    return weight(experts, hidden), weight(experts, 2 * width, hidden), weight(experts, hidden, width)


def example(name: str, tokens: int, device: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A layer of a standard shape, and what goes in."""
    hidden, width, experts, chosen = SHAPES[name]
    weights = random_weights(hidden, width, experts, device, dtype)
    x = torch.randn(1, tokens, hidden, device=device, dtype=dtype)
    return Shifted(Moe(*weights, chosen, folded_experts), hidden), x
