"""Transformers models, through the library's own extension points: for attention, masks and experts."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from foldcc.capture.masks import as_patterns, mask
from foldcc.changed import changed
from foldcc.errors import FoldError
from foldcc.ops import attention, experts

_NAME = "foldcc"
# Arguments of an attention function that change nothing of what it computes and returns.
_HARMLESS = {
    "position_ids", "cache_position", "past_key_values", "use_cache", "output_hidden_states",
    "output_router_logits", "return_dict", "position_embeddings", "labels", "logits_to_keep",
    "num_items_in_batch", "shift_labels", "ignore_index",  # the loss reads them
}  # fmt: skip


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention interface of Transformers: [b, h, q, d], [b, g, k, d], [b, g, k, e] -> [b, q, h, e].

    As in the library's own eager attention, the mask alone says who attends; without one, the module does. A position bias
    [b, h, q, k] is added to the scores. With `indices`, [b, q, n], a query attends only to the keys that they count. Each
    of `sinks`, [b, h, q, n], is the score of one more key, of value zero.
    """
    used = {name: x for name, x in options.items() if name not in _HARMLESS and x is not None and x is not False}
    given = [f"{name}={x}" if isinstance(x, (bool, int, float, str)) else name for name, x in used.items()]
    read = {"position_bias": position_bias, "sinks": sinks}
    given += [name for name, x in read.items() if x is not None and not _reads(module, name)]
    if not used.get("output_attentions") and any(key.endswith("attentions") for key in _recorded()):
        given.append("output_attentions=True")
    causal = False
    if attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if sliding_window:
            given.append(f"sliding_window={sliding_window} without a mask")
    if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
        given.append(f"a mask of {attention_mask.shape[-1]} positions for {key.shape[2]} keys")
    if causal:
        given += [f"{name} without a mask" for name, x in {**read, "indices": indices}.items() if x is not None]
    if causal and query.shape[2] != key.shape[2]:
        given.append(f"causality between {query.shape[2]} queries and {key.shape[2]} keys without a mask")
    if given:
        raise FoldError(
            f"{type(module).__name__} uses {', '.join(given)}, which foldcc's attention does not carry.",
            carries="scale, softcap, sinks, dropout, grouped heads, masks, indices of keys",
        )
    if indices is not None:
        chosen = indices.new_zeros((*indices.shape[:2], key.shape[2]), dtype=torch.bool)
        chosen = chosen.scatter(-1, indices.long(), True)[:, None]
        attention_mask = chosen if attention_mask is None else _added(attention_mask, chosen)
    if position_bias is not None:
        attention_mask = position_bias if attention_mask is None else _added(position_bias, attention_mask)
    if sinks is not None:
        key, value = (torch.nn.functional.pad(x, (0, 0, 0, sinks.shape[-1])) for x in (key, value))
        scores = sinks.new_zeros((*sinks.shape[:-1], key.shape[2] - sinks.shape[-1]))
        scores = scores if attention_mask is None else _added(scores, attention_mask)
        attention_mask = torch.cat([scores, sinks], -1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    keep = None
    if dropout:
        keep = query.new_empty((*query.shape[:3], key.shape[2]), dtype=torch.bool).bernoulli_(1 - dropout)
    y = attention(
        query,
        key,
        value,
        s_aux,
        None,
        float(scale),
        causal,
        0,
        softcap or 0.0,
        keep=keep,
        dropout=dropout,
        mask=attention_mask,
    )
    return y, None


def _reads(module: nn.Module, option: str) -> bool:
    """Whether the attention of a module's own file has an option: one that it does not name, it leaves out."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return own is not None and option in inspect.signature(own).parameters


def _added(mask: Tensor, other: Tensor) -> Tensor:
    """Two masks in one: of pairs that both allow, or of all that is added to scores."""
    if other.dtype != torch.bool:
        return mask + other
    return mask & other if mask.dtype == torch.bool else mask.masked_fill(~other, float("-inf"))


def _recorded() -> Iterable[str]:
    """What the model is asked to return of its modules' outputs; our attention has no weights that could be recorded."""
    from transformers.utils.output_capturing import _active_collector

    return _active_collector.get() or ()


def _install_recorders(model: nn.Module) -> None:
    """Installs the hooks that record outputs, each once; the caller removes them.

    The library installs them in the first forward that records, under a lock, which Dynamo cannot trace. It does so
    from the module that records down; installed from further up, they would be there twice where it has been before.
    """
    from transformers.modeling_utils import PreTrainedModel
    from transformers.utils import output_capturing

    install = output_capturing.install_all_output_capturing_hooks

    def install_once(module: nn.Module, prefix: str | None = None) -> None:
        if not getattr(module, "_output_capturing_hooks_installed", False):
            install(module, prefix)

    with changed(vars(output_capturing), {"install_all_output_capturing_hooks": install_once}):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                output_capturing.maybe_install_capturing_hooks(module)


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


def _loops(module: nn.Module) -> bool:
    """Whether a module has the library's experts, by their names and arguments, and loops over them on its own."""
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    if hasattr(module, "has_gate") or not all(isinstance(w, nn.Parameter) and w.dim() == 3 for w in weights):
        return False
    return list(inspect.signature(module.forward).parameters) == ["hidden_states", "top_k_index", "top_k_weights"]


def _with_identities(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts some of which may compute nothing: those beyond the last that has weights return their tokens."""
    count = module.down_proj.shape[0]
    beyond = top_k_index >= count
    y = experts(
        hidden_states,
        top_k_index.masked_fill(beyond, 0),
        top_k_weights.masked_fill(beyond, 0),
        module.gate_up_proj[:count],
        module.down_proj,
        activation_fn=lambda rows: module.act_fn(rows.chunk(2, -1)[0]) * rows.chunk(2, -1)[1],
    )
    if module.gate_up_proj.shape[0] == count:
        return y
    return y + hidden_states * (top_k_weights * beyond).sum(-1, keepdim=True).to(hidden_states.dtype)


def experts_of(model: nn.Module) -> list[nn.Module]:
    """The modules whose forward is the library's interface of experts: tokens, their experts, the weights of these."""
    return [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "is_concatenated")]


def is_transformers(model: nn.Module, *, itself: bool = False) -> bool:
    """Whether a model, or a module inside it, is the library's."""
    library = sys.modules.get("transformers.modeling_utils")
    modules = [model] if itself else model.modules()
    return library is not None and any(isinstance(m, library.PreTrainedModel) for m in modules)


def _asks_for_attention(model: nn.Module) -> bool:
    """Whether all attention goes through the library's interface. Files that do not use it compute with masks themselves."""
    from transformers.modeling_utils import PreTrainedModel

    return all(type(m)._can_set_attn_implementation() for m in model.modules() if isinstance(m, PreTrainedModel))


def _configurations(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


@contextmanager
def adapted(model: nn.Module, given: Mapping[str, Any]) -> Iterator[None]:
    """Attention, masks and experts are foldcc's nodes inside this context, and nothing is changed after it.

    Attention that is not asked for through the library's interface is captured as it is written, and its masks with it.

    Args:
        given: the arguments by name that the model will be called with.

    Raises:
        FoldError: the model is asked for a key/value cache.
    """
    if not is_transformers(model):
        yield
        return
    if given.get("use_cache"):
        raise FoldError(
            "use_cache=True asks for a key/value cache, which no program returns.", valid="use_cache=False, or none"
        )
    mask_given = given.get("attention_mask")
    if isinstance(mask_given, Tensor) and mask_given.dim() == 4 and mask_given.dtype == torch.bool:
        raise FoldError(
            f"The attention mask is bool, of shape {list(mask_given.shape)}, which not all of the library's attentions take.",
            valid="what is added to scores: 0, and -inf or the least number of a type",
        )
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

    ours = _asks_for_attention(model)
    masks = partial(mask, not all(m._supports_sdpa for m in model.modules() if isinstance(m, PreTrainedModel)))
    changes = {
        "_attn_implementation_internal": _NAME if ours else "eager",
        "_experts_implementation_internal": _NAME,
        "use_cache": False,
    }
    with ExitStack() as stack:
        stack.enter_context(changed(ALL_ATTENTION_FUNCTIONS._global_mapping, {_NAME: _attention}))
        stack.enter_context(changed(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, {_NAME: masks}))
        stack.enter_context(changed(ALL_EXPERTS_FUNCTIONS._global_mapping, {_NAME: _experts}))
        if ours:
            stack.enter_context(as_patterns())
        for config in _configurations(model):
            stack.enter_context(changed(config.__dict__, changes))
        for module in filter(_loops, model.modules()):
            module.forward = MethodType(_with_identities, module)
        _install_recorders(model)
        yield


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Attention, masks and experts are the library's plainest inside this context: those of the model's own file."""
    plain = {"_attn_implementation_internal": "eager", "_experts_implementation_internal": "eager", "use_cache": False}
    with ExitStack() as stack:
        for config in _configurations(model):
            stack.enter_context(changed(config.__dict__, plain))
        yield


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The model's own `dummy_inputs`, None if it has none."""
    found = getattr(model, "dummy_inputs", None)
    return found if isinstance(found, dict) else None


def initialiser(model: nn.Module) -> Callable[[nn.Module], None] | None:
    """What a Transformers model initialises the parameters of one of its modules with; None for any other model."""
    return getattr(model, "_init_weights", None) if is_transformers(model) else None


def checkpoints(model: nn.Module) -> bool:
    """Whether layers were told to keep nothing but their arguments, by `model.gradient_checkpointing_enable()`."""
    return any(getattr(m, "gradient_checkpointing", False) is True for m in model.modules())
