"""Reductions of folded tensors outside of programs, as an optimizer takes them: complete when they return.

DTensor leaves the reduction of a divided dimension as terms, each on its rank, until an operator needs the value. One that
works in place, such as the square of a norm in `torch.optim.Adafactor`, may not change a tensor's placement, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor

from foldcc.runtime.placement import whole_terms

aten = torch.ops.aten
REDUCTIONS = (
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.prod.default,
    aten.prod.dim_int,
    aten.max.default,
    aten.min.default,
    aten.amax.default,
    aten.amin.default,
    aten.norm.Scalar,
    aten.norm.ScalarOpt_dim,
    aten.linalg_vector_norm.default,
)  # not the norms of many tensors at once: clipping joins those before it brings them together
_handlers = DTensor._op_dispatcher._custom_op_handlers  # by operator, before DTensor's own rules


def complete_reductions(folded: Callable[[DTensor], bool]) -> None:
    """From here on, reductions of folded tensors are whole values; those of other DTensors stay as they are."""

    def complete(op_call: OpOverload[..., Any], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        _handlers.pop(op_call, None)  # so that DTensor computes it
        try:
            found = op_call(*args, **kwargs)
        finally:
            _handlers[op_call] = complete
        return whole_terms(found) if isinstance(found, DTensor) and folded(found) else found

    for op_call in REDUCTIONS:
        _handlers.setdefault(op_call, complete)
