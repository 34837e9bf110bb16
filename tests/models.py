"""Small random models of the eight Transformers families that the tests fold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

_BASE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_CHOICE = {"num_experts_per_tok": 2}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_GROUPED = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 1}

# Class name of the model, without its ending, and what its configuration has besides _BASE.
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, **_CHOICE}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, **_CHOICE},
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, **_CHOICE}),
    "olmoe": ("Olmoe", {"num_experts": 8, **_CHOICE}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            **_GROUPED,
            **_LATENT,
            **_CHOICE,
        },
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 8, "head_dim": 8, "sliding_window": 4, **_CHOICE}),
}
FAMILIES = tuple(_FAMILIES)
LAYER_KINDS = {family: 2 if family in ("deepseek_v3", "gpt_oss") else 1 for family in FAMILIES}
WITH_AUX_LOSS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")


def crossed(rows: Sequence[Any], columns: Sequence[Any], *more: Any) -> list[Any]:
    """All pairs, for `parametrize`: each row with one of the columns in turn, the other pairs and more columns marked slow."""
    return [
        pytest.param(row, column, marks=() if i % len(columns) == j else pytest.mark.slow)
        for i, row in enumerate(rows)
        for j, column in enumerate((*columns, *more))
    ]


def tiny_model(family: str, *, aux_loss: bool = False, seed: int = 0, **changes: Any) -> nn.Module:
    """A random causal language model of a family, its norms and biases random as well.

    Args:
        aux_loss: adds the router's load-balancing loss, for the families in `WITH_AUX_LOSS`.
        changes: of the configuration.
    """
    import transformers

    name, own = _FAMILIES[family]
    router = {"output_router_logits": True} if aux_loss else {}
    config = getattr(transformers, f"{name}Config")(**{**_BASE, **own, **router, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


class FusedAttention(nn.Module):
    """A layer of attention whose queries, keys and values are one projection: [b, s, 16] -> a number."""

    def __init__(self, *, causal: bool):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.causal = nn.Linear(16, 48), nn.Linear(16, 16), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        return (x + self.out(y)).square().mean()


def token_batch(batch: int, length: int = 16, *, vocabulary: int = 128, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens [batch, length] and their labels, in which samples have different numbers of valid tokens."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (batch, length), generator=random)
    labels = ids.clone()
    labels[0, : length // 2 + 1] = -100
    labels[-1, 3:5] = -100
    return {"input_ids": ids, "labels": labels}
