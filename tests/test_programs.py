"""Programs of a folded module: what a program is specialised to, how many are kept, and what is said about it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foldcc
from foldcc import FoldError
from foldcc.ir.program import Program
from foldcc.passes import Pass
from foldcc.testing.equivalence import relative_error

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
    monkeypatch.setattr("foldcc.programs.KEPT", 2)
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
        folded(activations(2)), folded(activations(6))  # of one sample a rank, whose program is for no other size
    texts = [str(w.message) for w in said if "Another program" in str(w.message)]
    assert ["['times']=3 instead of ['times']=2" in texts[0], "float32[2, 8, 16] instead of" in texts[1]] == [True, True]
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


class Numbered(nn.Module):
    """Divides by a number, as a loss over a global batch does, and does something of its own with it."""

    def __init__(self, own: Callable[[Tensor, Any], Tensor] = lambda y, n: y) -> None:
        super().__init__()
        self.linear, self.own = nn.Linear(16, 16), own

    def forward(self, x: Tensor, n: Any, m: Any = 1) -> Tensor:
        y: Tensor = self.own(self.linear(x).square().sum() / n, n)
        return y * m


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", [(50, 51, 1001, 3), (0.5, 0.25, 1 / 3, 7.0)])
def test_a_number_that_is_only_computed_with_is_a_value_of_one_program(values: Any, dtype: torch.dtype) -> None:
    model, x = Numbered().to(dtype), activations().to(dtype)
    folded = foldcc.parallelize(model, MESH)
    for n in values:
        folded.zero_grad(), model.zero_grad()
        found, wanted = folded(x, n=n), model(x, n=n)
        found.backward(), wanted.backward()
        assert found.dtype == dtype
        for a, b in ((found, wanted), (folded.linear.weight.grad, model.linear.weight.grad)):
            assert relative_error(a, b) <= 4 * torch.finfo(dtype).eps
    assert folded.programs == (f"['x']: {str(dtype)[6:]}[4, 8, 16], ['n']: any {type(values[0]).__name__}",)
    foldcc.verify(folded, rounds=1).raise_if_failed()


LOOKS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "a branch": lambda y, n: y * 2 if n > 3 else y,
    "truth": lambda y, n: y if n else y * 2,
    "a range": lambda y, n: sum((y for _ in range(n)), y),
    "arithmetic": lambda y, n: y * (n // 3),
    "a type and a branch": lambda y, n: y * 2 if isinstance(n, int) and n == 4 else y,
    "at most": lambda y, n: y / min(n, 2),
    "a slice": lambda y, n: y + y.expand(3)[:n].sum(),
    "a shape": lambda y, n: y + y.expand(n).sum(),
    "text": lambda y, n: y * len(f"{n:b}"),
    "an attribute": lambda y, n: y * n.bit_length(),
    "a constant": lambda y, n: y + torch.tensor(n),
    "a power": lambda y, n: y**n,
    "a rounding": lambda y, n: y + torch.div(y, n, rounding_mode="floor"),
    "an index": lambda y, n: y * (1.0, 2.0, 3.0, 3.0, 5.0, 6.0)[n],
}


@pytest.mark.filterwarnings("ignore:Another program")
@pytest.mark.parametrize("name", LOOKS)
def test_a_number_that_the_model_looks_at_stays_a_constant(name: str) -> None:
    model, x = Numbered(LOOKS[name]), activations()
    folded = foldcc.parallelize(model, MESH)
    for n in (2, 3, 4):
        torch.testing.assert_close(folded(x, n=n), model(x, n=n))


def test_of_two_numbers_each_becomes_an_input_when_it_varies() -> None:
    model, x = Numbered(), activations()
    folded = foldcc.parallelize(model, MESH)
    for n, m in ((2, 5), (3, 5), (4, 5), (4, 6), (3, 7), (2, 7), (2.5, 7)):
        torch.testing.assert_close(folded(x, n=n, m=m), model(x, n=n, m=m))


def test_garbage_is_collected_again_when_a_compilation_has_ended_or_failed() -> None:
    example = (torch.zeros(2, 4),)
    foldcc.parallelize(nn.Linear(4, 4), "dp=2", example_inputs=example)
    assert gc.isenabled()
    with pytest.raises(FoldError):
        foldcc.parallelize(nn.Linear(4, 4), "dp=2", example_inputs=example, plan="plan dp=2\nparameters\n  weight [w@tp]")
    assert gc.isenabled()
