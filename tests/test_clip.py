"""Gradients on several meshes are clipped as whole ones are in one process."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import foldcc
from foldcc import FoldError
from foldcc.testing import run_distributed
from tests.versions import joins_blocks

NORMS = [1.0, 2.0, 3.0, math.inf]


def whole() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((4, 3), (8, 2), (6,), (5,), (7,))]


def with_gradients(gradients: list[Tensor]) -> list[Tensor]:
    parameters = [nn.Parameter(torch.zeros_like(x)) for x in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


def clip_on_two_meshes(max_norm: float) -> list[tuple[float, list[Tensor]]]:
    one = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    two = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    found = []
    for p in NORMS:
        sharded, blocks, copied, ordinary, summed = whole()
        mine = blocks.view(2, 2, 2, 2)[:, one.get_local_rank()].reshape(4, 2).contiguous()  # one half of each of two blocks
        parameters = with_gradients(
            [
                distribute_tensor(sharded, two, [Shard(0), Replicate()]),
                DTensor.from_local(mine, one, [_StridedShard(0, split_factor=2)]),
                distribute_tensor(copied, one, [Replicate()]),
                ordinary,
                DTensor.from_local(summed * (0.25 + 0.5 * one.get_local_rank()), one, [Partial()]),
            ]
        )
        norm = foldcc.clip_grad_norm_(parameters, max_norm, p).item()
        grads = [x.grad for x in parameters]
        found.append((norm, [x.full_tensor() if isinstance(x, DTensor) else x for x in grads]))
    return found


@joins_blocks
@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_gradients_on_two_meshes_are_clipped_as_whole_ones(max_norm: float) -> None:
    for found in run_distributed(clip_on_two_meshes, 2, max_norm):
        for p, (norm, grads) in zip(NORMS, found, strict=True):
            parameters = with_gradients(whole())
            assert norm == pytest.approx(nn.utils.clip_grad_norm_(parameters, max_norm, p).item(), rel=1e-12)
            for parameter, grad in zip(parameters, grads, strict=True):
                torch.testing.assert_close(grad, parameter.grad, rtol=1e-12, atol=0)


def nan_on_one_rank(value: float) -> None:
    mesh, other = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    whole_one, third = torch.ones(4), torch.ones(6)
    second = torch.ones(2)
    second[0] = value if mesh.get_local_rank() == 1 else 1.0
    gradients = [
        distribute_tensor(whole_one, other, [Replicate()]),
        DTensor.from_local(second, mesh, [Shard(0)]),
        distribute_tensor(third * value, other, [Replicate()]),
    ]
    named = list(zip(("router", "experts", "head"), with_gradients(gradients), strict=True))
    with pytest.raises(FoldError, match=f"norm of the gradients is {value}; the first that is not finite is that of experts."):
        foldcc.clip_grad_norm_(named, 1.0, error_if_nonfinite=True)
    with pytest.raises(FoldError, match="is that of parameter 1 of those given."):
        foldcc.clip_grad_norm_([p for _, p in named], 1.0, error_if_nonfinite=True)
    assert not foldcc.clip_grad_norm_(named, 1.0).isfinite()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_on_every_rank(value: float) -> None:
    run_distributed(nan_on_one_rank, 2, value)


def test_a_norm_that_is_too_large_for_its_dtype_is_said() -> None:
    large = with_gradients([torch.full((4,), 6e4, dtype=torch.float16)])
    with pytest.raises(FoldError, match="The norm of the gradients is inf, and each of them is finite: .* for torch.float16"):
        foldcc.clip_grad_norm_(large, 1.0, error_if_nonfinite=True)
