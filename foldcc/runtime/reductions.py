"""Reductions of folded tensors outside of programs, as an optimizer takes them: complete when they return.

DTensor leaves the reduction of a divided dimension as terms, each on its rank, until an operator needs the value. One that
works in place, such as the square of a norm in `torch.optim.Adafactor`, may not change a tensor's placement, and is refused.

Whether some gradient is infinite, which `torch.amp.GradScaler` asks of all of them at once, DTensor asks of the ranks that hold
parts of the first of them. Here all ranks are told, those of other pipeline stages too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor

from foldcc.runtime.placement import whole_terms
from foldcc.runtime.wires import over_all_places, whole_mesh

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
UNSCALE = aten._amp_foreach_non_finite_check_and_unscale_.default
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


def tell_all_ranks_of_infinities(folded: Callable[[DTensor], bool]) -> None:
    """From here on, ranks that hold folded gradients take a step of a scaled loss together, or none of them does."""
    usual = _handlers[UNSCALE]

    def unscale(op_call: OpOverload[..., Any], args: Any, kwargs: Any) -> object:
        gradients, found, scale = args
        if not all(isinstance(g, DTensor) and folded(g) for g in gradients):
            return usual(op_call, args, kwargs)
        op_call([g.to_local() for g in gradients], found, scale)
        mesh = gradients[0].device_mesh  # of either side: both have all ranks of a stage
        for i in range(mesh.ndim):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.get_group(i))
        if (stages := whole_mesh(gradients)) is not None:
            over_all_places(found, stages, largest=True)
        return None

    _handlers[UNSCALE] = unscale
