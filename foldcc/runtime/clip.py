"""Clipping gradients by one global norm, over parameters that live on different sides of the mesh."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from foldcc.errors import FoldError


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scales all gradients so that their norm, taken over every parameter of the model at once, is at most `max_norm`.

    `torch.nn.utils.clip_grad_norm_` refuses parameters on two meshes; this takes ordinary tensors and DTensors of any.

    Args:
        parameters: the parameters whose `.grad` to clip, in place.
        max_norm: the largest norm that is left.
        norm_type: p of the p-norm; `float("inf")` for the largest element.

    Returns:
        The norm before clipping, a tensor without dimensions; every rank gets the same.

    Raises:
        FoldError: `max_norm` is negative or `norm_type` is not positive.
    """
    if max_norm < 0 or norm_type <= 0:
        raise FoldError(f"max_norm={max_norm} must not be negative and norm_type={norm_type} must be positive.")
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    terms: dict[Any, list[Tensor]] = {}
    for grad in grads:
        local, divided = _local(grad)
        terms.setdefault(divided, []).append(torch.linalg.vector_norm(local, norm_type).double())
    total = _joined([_over(torch.stack(norms), divided, norm_type) for divided, norms in terms.items()], norm_type)
    total = total.to(grads[0].dtype)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        local, _ = _local(grad)
        local.mul_(scale.to(local.device))
    return total


def _local(grad: Tensor) -> tuple[Tensor, Any]:
    """What this rank holds of a gradient, and the mesh and its dimensions over which the gradient is divided."""
    from torch.distributed.tensor import DTensor

    if not isinstance(grad, DTensor):
        return grad, None
    divided = tuple(i for i, p in enumerate(grad.placements) if not p.is_replicate())
    return grad.to_local(), (grad.device_mesh, divided) if divided else None


def _joined(norms: list[Tensor], norm_type: float) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def _over(norms: Tensor, divided: Any, norm_type: float) -> Tensor:
    """The norm of many gradients that are divided alike: one reduction for each mesh dimension."""
    norm = torch.linalg.vector_norm(norms, norm_type)
    if divided is None:
        return norm
    mesh, dims = divided
    largest = norm_type == float("inf")
    power = norm if largest else norm**norm_type
    for i in dims:
        dist.all_reduce(power, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=mesh.get_group(i))
    return power if largest else power ** (1 / norm_type)
