"""A model is left as it was: what adapters, tracers and the model's own code set on its modules is undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restores the attributes of every module, the hooks among them, at the end of this context.

    Tensors are not copied: a tracer works on fake ones and does not write into the model's.
    """
    before = [(m, dict(vars(m)), _contents(m)) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in before:
            vars(module).clear()
            vars(module).update(attributes)
            for held, content in contents:
                if held.keys() != content.keys() or any(held[k] is not x for k, x in content.items()):
                    held.clear()
                    held.update(content)


def _contents(module: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """The dicts that a module holds, such as its hooks, each with a copy."""
    return [(x, dict(x)) for x in vars(module).values() if isinstance(x, dict)]


@contextmanager
def in_modes(model: nn.Module, other: nn.Module) -> Iterator[None]:
    """Each module in train or eval mode as the module of the same name in `other` is, inside this context."""
    before = [(m, m.training) for m in model.modules()]
    for name, module in model.named_modules():
        module.training = other.get_submodule(name).training  # not model.train(), which an exported module refuses
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def in_dtypes(model: nn.Module, other: nn.Module, device: torch.device) -> Iterator[None]:
    """The model with its parameters and buffers in the dtypes that they have in `other`, inside this context.

    One of another dtype, or a parameter that is not on `device`, is an empty tensor meanwhile: what is captured depends on
    dtypes and devices, and not on values.
    """
    before = [(held, dict(held)) for m in model.modules() for held in (m._parameters, m._buffers)]
    empty: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        theirs = other.get_submodule(path)
        for name, x in (*module._parameters.items(), *module._buffers.items()):
            if x is None:
                continue
            wanted = getattr(theirs, name)
            moved = isinstance(x, nn.Parameter) and x.device.type != device.type
            if x.dtype == wanted.dtype and not moved:
                continue
            held = module._parameters if name in module._parameters else module._buffers
            if id(x) not in empty:
                like = torch.empty_like(x, dtype=wanted.dtype, device=device if moved else x.device, requires_grad=False)
                empty[id(x)] = nn.Parameter(like, x.requires_grad) if isinstance(x, nn.Parameter) else like
            held[name] = empty[id(x)]
    try:
        yield
    finally:
        for held, content in before:
            held.update(content)
