"""Programs of a folded module: what a program is specialised to, how many are kept, and what is said about it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import foldcc

MESH = "dp=2"


class Switched(nn.Module):
    """Does something else for True than for 1, for 1.0 and for 0.0 of either sign."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.norm = nn.Sequential(nn.Identity())

    def forward(self, x: Tensor, how: object = None) -> Tensor:
        y: Tensor = self.linear(x)
        if how is True:
            y = y * 2
        elif isinstance(how, int):
            y = y * 3
        elif isinstance(how, float):
            y = y * (5 if str(how).startswith("-") else 7)
        return y * 11 if self.norm.training else y


def activations(batch: int = 4) -> Tensor:
    return torch.randn(batch, 8, 16, generator=torch.Generator().manual_seed(0))


def test_numbers_that_are_equal_are_not_the_same_program() -> None:
    model, x = Switched(), activations()
    folded = foldcc.parallelize(model, MESH)
    for how in (True, 1, 1.0, 0.0, -0.0, None, True):
        torch.testing.assert_close(folded(x, how=how), model(x, how=how))


def test_each_module_of_the_tree_has_its_own_mode() -> None:
    model, x = Switched(), activations()
    folded = foldcc.parallelize(model, MESH)
    for part in (lambda m: m, lambda m: m.norm.eval(), lambda m: m.train(), lambda m: m.eval()):
        part(model), part(folded)
        torch.testing.assert_close(folded(x), model(x))
