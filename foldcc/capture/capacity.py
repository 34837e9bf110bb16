"""A capacity for the experts of a model whose code says nothing of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foldcc.capture.transformers import experts_of
from foldcc.ops.capacity import Capacity, limited


@dataclass(frozen=True)
class _Limit:
    """A forward pre-hook of experts: what is beyond the capacity has no weight."""

    capacity: Capacity

    def __call__(self, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens, ids, weights = args
        return tokens, ids, limited(ids, weights, module.down_proj.shape[0], self.capacity)


def limit(model: nn.Module, capacity: Capacity | None) -> bool:
    """Gives the experts of Transformers in a model a capacity, in place of one that they have; whether there are any."""
    found = experts_of(model)
    for module in found:
        for key in [k for k, hook in module._forward_pre_hooks.items() if isinstance(hook, _Limit)]:
            del module._forward_pre_hooks[key]
        if capacity is not None:
            module.register_forward_pre_hook(_Limit(capacity))
    return bool(found)


def capacity_of(model: nn.Module) -> Capacity | None:
    """What `limit` gave the model."""
    hooks = (hook for module in experts_of(model) for hook in module._forward_pre_hooks.values())
    return next((hook.capacity for hook in hooks if isinstance(hook, _Limit)), None)
