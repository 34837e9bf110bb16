"""Standard models by name, with their published dimensions and few layers, for tools that need no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from foldcc.errors import FoldError, listed

_QWEN = {"hidden_size": 2048, "vocab_size": 151_936}
_MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 8}
_GPT_OSS = {"hidden_size": 2880, "intermediate_size": 2880, "num_experts_per_tok": 4, "vocab_size": 201_088}
# Class name of a standard model in Transformers, without its ending, and its published dimensions for two layers.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-30B-A3B": (
        "Qwen3Moe",
        {**_QWEN, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "norm_topk_prob": True},
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        {"hidden_size": 7168, "intermediate_size": 18_432, "moe_intermediate_size": 2048, "n_routed_experts": 256}
        | {"num_experts_per_tok": 8, "first_k_dense_replace": 1, "vocab_size": 129_280},
    ),
    "Mixtral-8x7B": (
        "Mixtral",
        {**_MIXTRAL, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "vocab_size": 32_000},
    ),
    "Mixtral-8x22B": (
        "Mixtral",
        {**_MIXTRAL, "hidden_size": 6144, "intermediate_size": 16_384, "num_attention_heads": 48, "vocab_size": 32_768},
    ),
    "gpt-oss-20b": ("GptOss", {**_GPT_OSS, "num_local_experts": 32}),
    "gpt-oss-120b": ("GptOss", {**_GPT_OSS, "num_local_experts": 128}),
    "Qwen3-Next": (  # without its linear attention, whose loop over chunks unrolls; `--model qwen3_next --seq 64` has it
        "Qwen3Next",
        {**_QWEN, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts": 512}
        | {"num_experts_per_tok": 10, "layer_types": ["full_attention"] * 48},
    ),
    "OLMoE": (
        "Olmoe",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50_304}
        | {"num_attention_heads": 16},
    ),
}


def standard_model(name: str, layers: int = 2, device: str = "meta") -> nn.Module:
    """A standard model by its name, or one from a configuration of Transformers, in bfloat16.

    Args:
        name: one of `MODELS`, a configuration file or the folder that holds it, or a `model_type` of Transformers.

    Raises:
        FoldError: it is none of these.
    """
    import transformers

    if name in MODELS:
        family, published = MODELS[name]
        dimensions = {k: x[:layers] if isinstance(x, list) else x for k, x in published.items()}
        if not hasattr(transformers, f"{family}Config"):
            raise FoldError(f"Transformers {transformers.__version__} has no {family}.", valid=listed(MODELS))
        config = getattr(transformers, f"{family}Config")(**dimensions, num_hidden_layers=layers)
    elif Path(name).exists():
        config = transformers.AutoConfig.from_pretrained(name)
    elif name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name, num_hidden_layers=layers)
    else:
        raise FoldError(
            f"There is no model {name!r}.", valid=f"{listed(MODELS)}; a configuration file; a model_type of Transformers"
        )
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
