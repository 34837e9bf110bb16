"""Transformers models, through the library's own extension points: for attention, masks and experts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foldcc.capture.masks import CARRIED, Mask, Pattern, as_patterns, changed, mask
from foldcc.capture.packing import at_positions
from foldcc.errors import FoldError
from foldcc.ops import attention, experts

_NAME = "foldcc"
# Arguments of an attention function that change nothing of what it computes.
_HARMLESS = {
    "position_ids", "cache_position", "past_key_values", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "position_embeddings", "num_items_in_batch", "labels", "logits_to_keep",
}  # fmt: skip


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention interface of Transformers: [b, h, q, d], [b, g, k, d], [b, g, k, e] -> [b, q, h, e].

    As in the library's own eager attention, the mask alone says who attends; without one, the module does.
    """
    used = {name: x for name, x in options.items() if name not in _HARMLESS and x is not None and x is not False}
    given = [f"{name}={x}" if isinstance(x, (bool, int, float, str)) else name for name, x in used.items()]
    if dropout:
        given.append(f"dropout={dropout}")
    valid = None
    if attention_mask is None:
        pattern = Pattern(bool(getattr(module, "is_causal", True) if is_causal is None else is_causal))
        if sliding_window:
            given.append(f"sliding_window={sliding_window} without a mask")
    elif isinstance(attention_mask, Mask):
        pattern, valid = attention_mask.pattern, attention_mask.valid
    else:
        pattern = Pattern(False)
        given.append(f"a mask of shape {list(attention_mask.shape)}")
    if query.shape[2] != key.shape[2] and (pattern.causal or pattern.window or valid is not None):
        given.append(f"a mask between {query.shape[2]} queries and {key.shape[2]} keys")
    elif valid is not None and valid.shape[1] != key.shape[2]:
        given.append(f"a mask of {valid.shape[1]} positions for {key.shape[2]} keys")
    if given:
        raise FoldError(
            f"{type(module).__name__} uses {', '.join(given)}, which foldcc's attention does not carry.",
            carries=f"scale, sinks, grouped heads, {CARRIED}",
        )
    if pattern.positions is not None:
        query = at_positions(query, pattern.positions)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    y = attention(query, key, value, s_aux, valid, float(scale), pattern.causal, pattern.window)
    return y, None


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    if module.has_post_expert_norm:
        raise FoldError(f"{type(module).__name__} normalises each expert's output, which foldcc's experts do not carry.")
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        getattr(module, up),
        module.down_proj,
        activation_fn=module._apply_gate if module.has_gate else module.act_fn,
        b_up=getattr(module, f"{up}_bias") if module.has_bias else None,
        b_down=module.down_proj_bias if module.has_bias else None,
        transposed=module.is_transposed,
        interleaved=not module.is_concatenated,
    )


def _is_transformers(model: nn.Module) -> bool:
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and any(isinstance(m, library.PreTrainedModel) for m in model.modules())


def _configurations(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


@contextmanager
def adapted(model: nn.Module) -> Iterator[None]:
    """Attention, masks and experts are foldcc's nodes inside this context, and nothing is changed after it."""
    if not _is_transformers(model):
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    changes = {
        "_attn_implementation_internal": _NAME,
        "_experts_implementation_internal": _NAME,
        "use_cache": False,
    }
    with ExitStack() as stack:
        stack.enter_context(changed(ALL_ATTENTION_FUNCTIONS._global_mapping, {_NAME: _attention}))
        stack.enter_context(changed(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, {_NAME: mask}))
        stack.enter_context(changed(ALL_EXPERTS_FUNCTIONS._global_mapping, {_NAME: _experts}))
        stack.enter_context(as_patterns())
        for config in _configurations(model):
            stack.enter_context(changed(config.__dict__, changes))
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                # The library does this in the first forward, under a lock, which Dynamo cannot trace.
                maybe_install_capturing_hooks(module)
        yield


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The model's own `dummy_inputs`, None if it has none."""
    found = getattr(model, "dummy_inputs", None)
    return found if isinstance(found, dict) else None
