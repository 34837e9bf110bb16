"""A folded module is a module: what one does with a module means what it means, or is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import foldcc
from foldcc.testing.equivalence import relative_error

MESH = "dp=2,tp=2|ep=2,etp=2"


class Mixer(nn.Module):
    """A tied weight, a norm, a buffer, a constant that is no buffer, and a switch that forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.randn(16), persistent=False)
        self.constant = torch.randn(16)
        self.switch = 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.norm(self.first(x)) + self.shift) * self.switch
        return y + self.constant.to(x.dtype)


def activations(batch: int = 4) -> Tensor:
    return torch.randn(batch, 8, 16, generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_the_same(folded: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Output and every gradient, in the dtype that both have, by norm: a sum over ranks rounds in another order."""
    folded.zero_grad(), model.zero_grad()
    found, wanted = folded(x), model(x)
    assert found.dtype == wanted.dtype
    found.square().sum().backward(), wanted.square().sum().backward()
    results, right = {"output": found, **gradients(folded)}, {"output": wanted, **gradients(model)}
    assert results.keys() == right.keys()
    for name, value in right.items():
        assert relative_error(results[name], value) <= 2 * torch.finfo(value.dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_dtype_given_afterwards_is_the_dtype_of_the_programs_that_follow(dtype: torch.dtype) -> None:
    model, x = Mixer(), activations()
    folded = foldcc.parallelize(model, "dp=2", example_inputs=(x,))
    held = dict(model.named_parameters())
    folded.to(dtype)
    folded(x.to(dtype))
    assert all(p is held[name] and p.dtype == torch.float32 for name, p in model.named_parameters())
    assert_the_same(folded, model.to(dtype), x.to(dtype))
    assert_the_same(folded.float(), model.float(), x)
