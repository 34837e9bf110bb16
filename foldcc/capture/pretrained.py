"""What a Transformers model's tensors are called and how they are arranged on disk, by the library's own functions.

They take tensors by name and may be given any subclass, so that nothing is read before it is known what is wanted of it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foldcc.capture.transformers import is_transformers
from foldcc.changed import changed


class Loaded(NamedTuple):
    """What becomes of a checkpoint in a model.

    Attributes:
        tensors: by the names that they have in the model; those of other shapes are among them.
        extra: names in the checkpoint that are nothing in the model, without those that the model says it ignores.
        failed: why tensors could not be rearranged, by their names in the model.
    """

    tensors: dict[str, Tensor]
    extra: set[str]
    failed: dict[str, str]


def as_loaded(model: nn.Module, stored: Mapping[str, Tensor]) -> Loaded:
    """The tensors of a checkpoint as `from_pretrained` arranges them. The model is left as it is."""
    own = model.state_dict(keep_vars=True)
    if not is_transformers(model, itself=True):
        return Loaded(dict(stored), set(stored) - set(own), {})
    from transformers import core_model_loading as library
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    held: Any = model
    with _left_as_it_is(model), changed(vars(library), {"tqdm": lambda each, **_: each}):  # nothing is loaded yet
        config = LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(held), ignore_mismatched_sizes=True)
        info, _ = library.convert_and_load_state_dict_in_model(held, dict(stored), config, disk_offload_index=None)
        held._adjust_missing_and_unexpected_keys(info)
        found = {n: x for n, x in model.state_dict(keep_vars=True).items() if x is not own[n]}
    other = {name: torch.empty(shape, device="meta") for name, shape, _ in info.mismatched_keys}
    return Loaded({**found, **other}, set(info.unexpected_keys), dict(info.conversion_errors))


@contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    kept = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    conversions = vars(model).get("_weight_conversions")
    try:
        yield
    finally:
        for module, parameters, buffers in kept:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        vars(model).pop("_weight_conversions", None)
        if conversions is not None:
            vars(model)["_weight_conversions"] = conversions


def as_stored(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model as `save_pretrained` arranges them, which is what `from_pretrained` reads; of an adapter, its own."""
    held: Any = model
    if is_adapted(model):
        from peft import get_peft_model_state_dict

        adapter: dict[str, Tensor] = get_peft_model_state_dict(held, dict(tensors), adapter_name=held.active_adapter)
        return adapter
    if not is_transformers(model, itself=True):
        return dict(tensors)
    from transformers.core_model_loading import revert_weight_conversion

    ignored = held._keys_to_ignore_on_save or ()
    found: dict[str, Tensor] = revert_weight_conversion(held, {n: x for n, x in tensors.items() if n not in ignored})
    return found


def is_adapted(model: nn.Module) -> bool:
    """Whether it is one of PEFT's, of which only the adapter is stored."""
    library = sys.modules.get("peft")
    return library is not None and isinstance(model, library.PeftModel)


def kept_name(model: nn.Module, names: Iterable[str]) -> str:
    """Of the names of one tied tensor, the one that a checkpoint holds."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found = list(names)
    return next((n for n in found if n not in tied), found[0])


def store_configuration(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Writes what `from_pretrained` reads besides the tensors; nothing for a model of another library."""
    held: Any = model
    if is_adapted(model):
        adapter = copy.deepcopy(held.active_peft_config)
        adapter.inference_mode = True
        adapter.save_pretrained(folder)
    if not is_transformers(model, itself=True):
        return
    from transformers.dynamic_module_utils import custom_object_save

    config = copy.deepcopy(held.config)
    config.dtype, config.architectures = str(dtype).removeprefix("torch."), [type(model).__name__]
    if held.is_remote_code():
        custom_object_save(model, str(folder), config=config)
    config.save_pretrained(folder)
    if held.can_generate():
        held.generation_config.save_pretrained(folder)
