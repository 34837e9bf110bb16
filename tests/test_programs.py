"""Programs of a folded module: what a program is specialised to, how many are kept, and what is said about it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import foldcc
from foldcc.passes import Pass
from foldcc.program import Program

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


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, times: object = 1) -> Tensor:
        for _ in range(int(times)):  # type: ignore[call-overload]
            x = x + 1
        y: Tensor = self.linear(x)
        return y


def test_programs_are_counted_and_the_least_recently_used_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldcc.module.KEPT", 2)
    model, x = Scaled(), activations()
    folded = foldcc.parallelize(model, MESH)
    with pytest.warns(UserWarning, match="2 programs are kept"):
        for times in (1, 2, 1, 3):
            torch.testing.assert_close(folded(x, times=times), model(x, times=times))
    assert folded.programs == ("['x']: float32[4, 8, 16], ['times']=1", "['x']: float32[4, 8, 16], ['times']=3")
    folded(x, times=1)
    assert folded.programs[-1].endswith("=1") and "x" in str(folded.stages[-1])
    torch.testing.assert_close(folded(x, times=2), model(x, times=2))


def test_another_program_for_a_number_or_a_shape_is_announced_once() -> None:
    folded = foldcc.parallelize(Scaled(), MESH)
    folded(activations())
    with pytest.warns(UserWarning) as said:
        folded(activations(), times=2), folded(activations(), times=3)
        folded(activations(6)), folded(activations(8))
    texts = [str(w.message) for w in said if "Another program" in str(w.message)]
    assert ["['times']=3 instead of ['times']=2" in texts[0], "float32[6, 8, 16] instead of" in texts[1]] == [True, True]
    assert len(texts) == 2


@dataclass(frozen=True, kw_only=True)
class Doubled(Pass):
    """A pass of a user's own: what the model returns, times two."""

    requires = frozenset({"bucketed"})
    provides = frozenset({"doubled"})

    def run(self, program: Program) -> Program:
        program = program.copied()
        for block in program.blocks.values():
            for node in block.graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default):
                with block.graph.inserting_after(node):
                    new = block.graph.call_function(torch.ops.aten.mul.Scalar, (node, 2))
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
            block.recompile()
        return program


def test_own_passes_are_in_every_program_of_the_module() -> None:
    model, x = Scaled(), activations()
    folded = foldcc.parallelize(model, MESH)
    folded(x)
    own = folded.with_passes(Doubled())
    for batch in (4, 6):
        torch.testing.assert_close(own(activations(batch)), 2 * model(activations(batch)))
        torch.testing.assert_close(folded(activations(batch)), model(activations(batch)))
    torch.testing.assert_close(own.with_passes(Doubled())(activations(2)), 4 * model(activations(2)))
