"""Adapters for modules that are not Transformers': one function per class that says what its experts compute."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from foldcc.errors import FoldError

_EXPERTS: dict[type[nn.Module], Callable[..., Any]] = {}


def register_experts(cls: type[nn.Module], fn: Callable[..., Any]) -> None:
    """Replaces the forward of every module of class `cls` by `fn` while a model is captured.

    Args:
        cls: a module class whose forward computes experts in a way that cannot be captured, such as a Python loop.
        fn: `fn(module, *args, **kwargs)`, called with the arguments of the module's own forward. It computes the same
            thing with `foldcc.ops.experts(...)` and returns what the forward returns.

    Raises:
        FoldError: `cls` is not a module class.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and callable(fn)):
        raise FoldError(f"register_experts takes a subclass of nn.Module and a function, not {cls!r} and {fn!r}.")
    _EXPERTS[cls] = fn


def adapt(model: nn.Module) -> None:
    """Lets registered modules compute through their function, until `unchanged` undoes it."""
    for module in model.modules():
        for cls, fn in _EXPERTS.items():
            if isinstance(module, cls):
                module.forward = MethodType(fn, module)
                break
