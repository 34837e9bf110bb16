"""A small language model in plain PyTorch, dense or with experts, with a choice of what such models are built from.

It is material for tests: it needs no Transformers, builds in milliseconds, and no weight in it is constant or zero.

Shapes: ids and labels [B, S]; logits [B, S, V]; routing [B, S, E], see `foldcc.testing.Routing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldcc.ops import experts
from foldcc.testing.configs import DecoderConfig, ExpertsConfig


class DecoderOutput(NamedTuple):
    """What a `Decoder` returns. Without labels there is no loss."""

    loss: Tensor | None
    logits: Tensor


class Decoder(nn.Module):
    """The language model that a `DecoderConfig` describes.

    `forward(ids, labels=None, routing=None)`: `labels[b, s]` is the token after `ids[b, s]`, or -100 where none is asked
    for. `routing`, [B, S, E] integers, says which experts are preferred, in place of the router's own scores; how much
    each chosen expert weighs is the router's business all the same.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(config.seed)
            self.embedding = nn.Embedding(config.vocab, config.hidden)
            self.layers = nn.ModuleList(_Layer(config, number) for number in range(config.layers))
            self.norm = _norm(config, config.hidden)
            self.head = nn.Linear(config.hidden, config.vocab, bias=False)
            if config.tied:
                self.head.weight = self.embedding.weight
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)  # norms and biases start constant otherwise

    def forward(self, ids: Tensor, labels: Tensor | None = None, routing: Tensor | None = None) -> DecoderOutput:
        x = self.embedding(ids)
        aux_losses = []
        for layer in self.layers:
            x, aux_loss = layer(x, routing)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
        logits = self.head(self.norm(x))
        if labels is None:
            return DecoderOutput(None, logits)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return DecoderOutput(sum(aux_losses, start=loss), logits)

    def __repr__(self) -> str:
        return f"Decoder({self.config})"


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig, number: int):
        super().__init__()
        routed = config.moe is not None and number >= config.moe.first
        self.before_attention, self.before_mlp = _norm(config, config.hidden), _norm(config, config.hidden)
        self.attention = _Attention(config)
        self.mlp = _Experts(config) if routed else _Mlp(config, config.width)

    def forward(self, x: Tensor, routing: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = x + self.attention(self.before_attention(x))
        y, aux_loss = self.mlp(self.before_mlp(x), routing)
        return x + y, aux_loss


class _Attention(nn.Module):
    frequencies: Tensor  # of the rotary embedding, [head_dim / 2]

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        wide, narrow = (n * config.head_dim for n in (config.heads, config.kv_heads))
        self.q = nn.Linear(config.hidden, wide, bias=config.biased)
        if config.fused:
            self.kv = nn.Linear(config.hidden, 2 * narrow, bias=config.biased)
        else:
            self.k, self.v = (nn.Linear(config.hidden, narrow, bias=config.biased) for _ in range(2))
        self.out = nn.Linear(wide, config.hidden, bias=config.biased)
        half = config.head_dim // 2
        self.register_buffer("frequencies", 100.0 ** -(torch.arange(half) / half), persistent=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = _norm(config, config.head_dim), _norm(config, config.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        pair = self.kv(x).chunk(2, -1) if self.config.fused else (self.k(x), self.v(x))
        q, k, v = (y.unflatten(-1, (-1, self.config.head_dim)) for y in (self.q(x), *pair))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (_turned(y.transpose(1, 2), self.frequencies) for y in (q, k))
        y = F.scaled_dot_product_attention(
            q, k, v.transpose(1, 2), is_causal=True, enable_gqa=self.config.heads != self.config.kv_heads
        )
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def _turned(x: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary embeddings of [B, heads, S, head_dim] (RoFormer, arXiv 2104.09864)."""
    angles = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class _Mlp(nn.Module):
    def __init__(self, config: DecoderConfig, width: int):
        super().__init__()
        self.gated, self.fused = config.gated, config.fused
        wide = 2 * width if config.gated and config.fused else width
        self.up = nn.Linear(config.hidden, wide, bias=config.biased)
        if config.gated and not config.fused:
            self.gate = nn.Linear(config.hidden, width, bias=config.biased)
        self.down = nn.Linear(width, config.hidden, bias=config.biased)

    def forward(self, x: Tensor, routing: Tensor | None = None) -> tuple[Tensor, None]:
        if not self.gated:
            y = F.gelu(self.up(x))
        elif self.fused:
            y = _one_after_the_other(self.up(x))
        else:
            y = F.silu(self.gate(x)) * self.up(x)
        return self.down(y), None


class _Experts(nn.Module):
    """A router, its experts, and the expert that all tokens share."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        assert config.moe is not None
        self.config = moe = config.moe
        wide = 2 * moe.width if moe.gated else moe.width
        self.router = nn.Linear(config.hidden, moe.experts, bias=False)
        self.w_up = _weight(moe, wide, config.hidden)
        self.w_down = _weight(moe, config.hidden, moe.width)
        self.b_up = nn.Parameter(torch.zeros(moe.experts, wide)) if moe.biased else None
        self.b_down = nn.Parameter(torch.zeros(moe.experts, config.hidden)) if moe.biased else None
        self.shared = _Mlp(config, moe.shared) if moe.shared else None

    def forward(self, x: Tensor, routing: Tensor | None) -> tuple[Tensor, Tensor | None]:
        moe, tokens = self.config, x.flatten(0, 1)
        logits = self.router(tokens)
        scores = logits.softmax(-1) if moe.scoring == "softmax" else logits.sigmoid()
        ids = (scores if routing is None else routing.flatten(0, 1)).topk(moe.chosen).indices
        weights = scores.gather(-1, ids)
        if moe.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        y = experts(
            tokens, ids, weights, self.w_up, self.w_down, activation_fn=_ACTIVATIONS[moe.gated, moe.interleaved],
            b_up=self.b_up, b_down=self.b_down, transposed=moe.transposed,
            interleaved=moe.interleaved, capacity=moe.capacity,
        )  # fmt: skip
        if self.shared is not None:
            y = y + self.shared(tokens)[0]
        if not moe.aux_loss:
            return y.view_as(x), None
        share = F.one_hot(ids, moe.experts).sum(1).to(scores.dtype).mean(0)
        return y.view_as(x), moe.aux_loss * moe.experts * (share * scores.mean(0)).sum()


def _weight(moe: ExpertsConfig, outputs: int, inputs: int) -> nn.Parameter:
    shape = (inputs, outputs) if moe.transposed else (outputs, inputs)
    return nn.Parameter(torch.randn(moe.experts, *shape) / inputs**0.5)


def _one_after_the_other(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _alternating(x: Tensor) -> Tensor:
    return F.silu(x[..., ::2]) * x[..., 1::2]


# By whether there is a gate, and whether it alternates with the up projection.
_ACTIVATIONS: dict[tuple[bool, bool], Callable[[Tensor], Tensor]] = {
    (False, False): F.gelu,
    (True, False): _one_after_the_other,
    (True, True): _alternating,
}


def _norm(config: DecoderConfig, width: int) -> nn.Module:
    return nn.RMSNorm(width) if config.norm == "rms" else nn.LayerNorm(width)
