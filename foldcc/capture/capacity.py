"""A capacity for the experts of a model whose code says nothing of one."""

from __future__ import annotations

from typing import Any

from torch import nn

from foldcc.capture.transformers import experts_of
from foldcc.errors import FoldError
from foldcc.ops.capacity import Capacity, limited


class _Limit:
    """A forward pre-hook of experts: what is beyond the capacity has no weight."""

    def __init__(self, capacity: Capacity):
        self.capacity = capacity

    def __call__(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, ids, weights = args
        return tokens, ids, limited(ids, weights, module.down_proj.shape[0], self.capacity)


def set_capacity(model: nn.Module, capacity: Capacity | None) -> None:
    """Gives the experts of a Transformers model a capacity, in place: what is beyond it is dropped, in one process as on ranks.

    It is a part of the model from then on, which copies of it have as well, and `parallelize` proves.

    Args:
        model: with experts of the library's own; for others, `foldcc.ops.experts(..., capacity=)`.
        capacity: in place of the one that there is; None for experts that take every token.

    Raises:
        FoldError: the model has no such experts.
    """
    found = experts_of(model)
    if not found:
        raise FoldError(
            f"{type(model).__name__} has no experts of Transformers.", valid="foldcc.ops.experts(..., capacity=) in its forward"
        )
    for module in found:
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Limit):
                del module._forward_pre_hooks[key]
        if capacity is not None:
            module.register_forward_pre_hook(_Limit(capacity))
