"""A model is left as it was: what adapters, tracers and the model's own code set on its modules is undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


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
