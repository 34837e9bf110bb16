"""Clipping gradients by one global norm, over parameters that live on different sides of the mesh."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from foldcc.errors import FoldError, require
from foldcc.mesh import FoldedMesh
from foldcc.runtime.placement import whole_terms
from foldcc.runtime.wires import is_counted_here, over_all_places, whole_mesh


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Tensor,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scales all gradients so that their norm, taken over every parameter of the model at once, is at most `max_norm`.

    `torch.nn.utils.clip_grad_norm_` refuses parameters on two meshes; this takes ordinary tensors and DTensors of any. With
    pipeline stages it is called on every rank, with parameters of each stage.

    Args:
        parameters: the parameters whose `.grad` to clip, in place; or pairs with their names, `model.named_parameters()`.
        max_norm: the largest norm that is left.
        norm_type: p of the p-norm; `float("inf")` for the largest element.
        error_if_nonfinite: raise, on every rank alike, where the norm is NaN or infinite.

    Returns:
        The norm before clipping, a tensor without dimensions; every rank gets the same.

    Raises:
        FoldError: `max_norm` is negative or `norm_type` is not positive; or the norm is not finite, with the first parameter
            whose gradient is not.
    """
    require("max_norm", max_norm, (Real, Tensor), "a number")
    require("norm_type", norm_type, (Real, Tensor), "a number")
    if max_norm < 0 or norm_type <= 0:
        raise FoldError(f"max_norm={max_norm} must not be negative and norm_type={norm_type} must be positive.")
    require("parameters", parameters, (Iterable, Tensor), "a number of them, or of pairs with their names")
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    named = [x if isinstance(x, tuple) else (f"parameter {i} of those given", x) for i, x in enumerate(given)]
    graded = [(p, p.grad) for _, p in named if p.grad is not None]
    stages = whole_mesh(p for _, p in named)
    if not graded and stages is None:
        return torch.tensor(0.0)
    alike: dict[Any, list[Tensor]] = {}  # gradients that are divided alike
    meshes: dict[Any, list[Tensor]] = {}  # parameters whose gradients are on one mesh
    for parameter, grad in graded:
        local, divided = _local(grad)
        if is_counted_here(parameter):
            some = local if local.numel() else local.new_zeros(1)  # of nothing there is no largest
            alike.setdefault(divided, []).append(some)
        meshes.setdefault(getattr(grad, "device_mesh", None), []).append(parameter)
    norms = [_over(get_total_norm(grads, norm_type).double(), divided, norm_type) for divided, grads in alike.items()]
    total = get_total_norm(norms, norm_type)
    if stages is not None:
        total = _over_stages(total.to(stages.device_type).double(), stages, norm_type)
    total = total.to(graded[0][1].dtype if graded else torch.float32)
    if error_if_nonfinite and not total.isfinite():
        name = _first_nonfinite([(name, p.grad) for name, p in named if p.grad is not None])
        raise FoldError(
            f"The norm of the gradients is {total.item()}; the first that is not finite is that of {name}."
            if name is not None
            else f"The norm of the gradients is {total.item()}, and those on this pipeline stage are finite."
            if stages is not None
            else f"The norm of the gradients is {total.item()}, and each of them is finite: it is too large for {total.dtype}.",
            valid="a smaller loss scale or learning rate; error_if_nonfinite=False to clip nevertheless",
        )
    for there in meshes.values():
        clip_grads_with_norm_(there, max_norm, total)
    return total


def _first_nonfinite(named: list[tuple[str, Tensor]]) -> str | None:
    """The name of the first gradient, in the order given, of which some rank holds a number that is not finite."""
    place = next((i for i, (_, grad) in enumerate(named) if not _local(grad)[0].isfinite().all()), len(named))
    first = torch.tensor(place, device=named[0][1].device)
    for mesh in dict.fromkeys(grad.device_mesh for _, grad in named if isinstance(grad, DTensor)):
        for i in range(mesh.ndim):
            dist.all_reduce(first, dist.ReduceOp.MIN, group=mesh.get_group(i))
    place = int(first)
    return named[place][0] if place < len(named) else None


def _local(grad: Tensor) -> tuple[Tensor, Any]:
    """What this rank holds of a gradient, and the mesh and its dimensions over which the gradient is divided."""
    if not isinstance(grad, DTensor):
        return grad, None
    grad = whole_terms(grad)  # the norm of a sum is not that of its terms
    divided = tuple(i for i, p in enumerate(grad.placements) if not p.is_replicate())
    return grad.to_local(), (grad.device_mesh, divided) if divided else None


def _over_stages(norm: Tensor, mesh: FoldedMesh, norm_type: float) -> Tensor:
    """The norm of gradients that are on several pipeline stages."""
    if norm_type == float("inf"):
        return over_all_places(norm, mesh, largest=True)
    return over_all_places(norm**norm_type, mesh, largest=False) ** (1 / norm_type)


def _over(norm: Tensor, divided: Any, norm_type: float) -> Tensor:
    """The norm of gradients that are divided alike: one reduction for each mesh dimension."""
    if divided is None:
        return norm
    mesh, dims = divided
    largest = norm_type == float("inf")
    power = norm if largest else norm**norm_type
    for i in dims:
        dist.all_reduce(power, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=mesh.get_group(i))
    return power if largest else power ** (1 / norm_type)
