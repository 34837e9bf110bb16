"""Calls that differ in sizes alone: one program for all of them, which is the one that a compilation of each would give."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_model, token_batch
from torch import Tensor, nn
from torch.nn import functional

import foldcc
from foldcc import FoldError
from foldcc.ir.resize import Between, Size, Unlike
from foldcc.testing import run_distributed
from foldcc.testing.equivalence import relative_error

LENGTHS = tuple(range(8, 48, 2))


def compared(model: nn.Module, folded: nn.Module, call: dict[str, Any]) -> None:
    """One step of both, the same in loss and gradients."""
    losses = []
    for m in (model, folded):
        m.zero_grad()
        losses.append(m(**call).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    theirs = dict(folded.named_parameters())
    for name, p in model.named_parameters():
        assert relative_error(theirs[name].grad, p.grad) < 1e-5, name


def folded_counting(model: nn.Module, mesh: str, **options: Any) -> tuple[Any, list[str]]:
    told: list[str] = []
    return foldcc.parallelize(model, mesh, progress=told.append, verify=False, **options), told


def test_twenty_lengths_and_three_batches_are_one_program() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    folded, told = folded_counting(model, "dp=2,tp=2", example_inputs=token_batch(4, 16))
    compared(model, folded, token_batch(4, 24))
    compiled = len(told)
    for i, length in enumerate(LENGTHS):
        compared(model, folded, token_batch((4, 6, 8)[i % 3], length, seed=i))
    assert len(told) == compiled, "nothing is compiled for a third size"


def program_of(folded: Any) -> str:
    """The last stage without what it took, and what was done to get there."""
    return "\n".join(line for line in str(folded.stages[-1]).splitlines()[1:] if not line.startswith("holds "))


@pytest.mark.parametrize(
    ("family", "mesh", "options"),
    [
        ("mixtral", "dp=2,tp=2|ep=4", {}),
        pytest.param("gpt_oss", "cp=2,tp=2|ep=4", {"zero": 3}, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "dp=2,tp=2|ep=2,etp=2", {"recompute": "blocks"}, marks=pytest.mark.slow),
        pytest.param("qwen3", "pp=2,dp=2", {"micro_batches": 2, "zero": 1, "schedule": "zero-bubble"}, marks=pytest.mark.slow),
    ],
)
def test_the_program_is_what_compiling_gives(family: str, mesh: str, options: dict[str, Any]) -> None:
    model, batch = tiny_model(family, **({"num_hidden_layers": 1} if family == "mixtral" else {})), 8
    folded, told = folded_counting(model, mesh, example_inputs=token_batch(batch, 16), **options)
    folded(**token_batch(batch, 24))
    compiled = len(told)
    folded(**token_batch(2 * batch, 40))
    assert len(told) == compiled
    left = {name: x for name, x in options.items() if name != "recompute"}  # the plan says what is kept
    alone, _ = folded_counting(model, mesh, example_inputs=token_batch(2 * batch, 40), plan=folded.plan.without_sizes(), **left)
    assert program_of(folded) == program_of(alone)
    assert foldcc.verify(folded).ok


def test_evaluation_and_bfloat16_have_programs_of_their_own() -> None:
    model = tiny_model("llama", num_hidden_layers=1).bfloat16()
    folded, told = folded_counting(model, "dp=2,tp=2", example_inputs=token_batch(4, 16))
    for length in (16, 24, 32):
        call = token_batch(4, length)
        torch.testing.assert_close(folded(**call).loss, model(**call).loss, rtol=2e-2, atol=2e-2)
        with torch.no_grad():
            torch.testing.assert_close(folded(**call).logits, model(**call).logits, rtol=5e-2, atol=5e-2)
    assert told.count("capture") == 4


class Branching(nn.Module):
    """Does something else with long sequences, and with the length itself."""

    def __init__(self, how: str):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.how = nn.Linear(16, 16), how

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if self.how == "branch" and x.shape[1] > 20:
            y = y * 2
        return y / x.shape[1] ** 0.5 if self.how == "root" else y * x.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "why"), [("branch", "takes seq <= 20 for granted"), ("root", "made of sizes")])
def test_what_no_program_does_for_all_sizes_is_compiled_and_said(how: str, why: str) -> None:
    model = Branching(how)
    folded = foldcc.parallelize(model, "dp=2,tp=2")
    with pytest.warns(UserWarning, match=why):
        for length in (8, 12, 16, 24, 28, 32):
            x = torch.randn(4, length, 16)
            torch.testing.assert_close(folded(x), model(x))


def test_odd_lengths_do_not_take_the_place_of_even_ones() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folded, _ = folded_counting(model, "dp=2,tp=2")
        for length in (17, 19, 16):
            compared(model, folded, token_batch(4, length))
    assert not folded._programs.newest.resized, "the program of odd lengths divides none"


class Padded(nn.Module):
    """Positions are added, as many as a length decides: in the language of sizes, `max(24 - seq, 0)` or `-seq % 8`."""

    def __init__(self, how: Callable[[Any], Any]):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.how = nn.Linear(16, 16), how

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(functional.pad(x, (0, 0, 0, self.how(x.shape[1]))))
        return y


@pytest.mark.parametrize("how", [lambda n: max(24 - n, 0), lambda n: -n % 8, lambda n: min(n - 8, 8)])
@pytest.mark.filterwarnings("ignore:(A|Another) program")
def test_a_size_that_takes_a_turn_is_another_program_behind_it(how: Callable[[Any], Any]) -> None:
    model, resized = Padded(how), 0
    folded = foldcc.parallelize(model, "cp=2,tp=2", verify=False)
    for length in (32, 64, 8, 12, 20, 28):
        x = torch.randn(4, length, 16)
        torch.testing.assert_close(folded(x), model(x))
        resized += folded._programs.newest.resized
    assert resized, "where the same turn is taken, it is one program"


def test_without_dynamic_sizes_each_shape_is_compiled() -> None:
    folded, told = folded_counting(Branching(""), "dp=2", dynamic=())
    for length in (8, 12, 16):
        folded(torch.randn(4, length, 16))
    assert told.count("capture") == 3
    with pytest.raises(FoldError, match="no tuple of sizes that may vary"):
        foldcc.parallelize(Branching(""), "dp=2", dynamic="seq")


def test_a_number_that_is_no_product_of_sizes_is_refused() -> None:
    sizes, marked = {"batch": 4, "seq": 16}, {"batch": 2 * 4099, "seq": 4 * 32771}
    assert Size.between(16 * 4 + 3, 2 * 4099 * 4 * 32771 + 3, sizes, marked) == Size(3, ((Fraction(1), ("batch", "seq")),))
    assert Size.between(8 - 1, 2 * 32771 - 1, sizes, marked).at({"batch": 2, "seq": 24}) == 11
    with pytest.raises(Unlike, match="no sum of products"):
        Size.between(64, 4 * 32771 // 3, sizes, marked)
    with pytest.raises(Unlike, match="a size is 23/2"):
        Size.between(8, 2 * 32771, sizes, marked).at({"batch": 2, "seq": 23})


def test_a_program_that_differs_in_more_than_sizes_is_caught() -> None:
    folded, _ = folded_counting(Branching(""), "dp=2")
    folded(torch.randn(4, 8, 16)), folded(torch.randn(4, 12, 16))
    (varied,) = next(iter(folded._programs.varied.values()))
    stages = varied.between.large
    broken = stages[-1].program.copied()
    node = next(n for _, n in broken.nodes() if str(n.target).startswith("aten.mul"))
    node.args = (node.args[0], node.args[1] + 4099)
    last = replace(stages[-1], program=broken)
    with pytest.raises(Unlike, match="of mul"):
        replace(varied.between, large=type(stages)([*list(stages)[:-1], last])).check()
    assert isinstance(varied.between, Between)


def on_processes() -> None:
    model = tiny_model("mixtral", num_hidden_layers=1)
    mesh = foldcc.init_folded_mesh("cpu", attention={"dp": 2}, moe={"ep": 2})
    told: list[str] = []
    folded = foldcc.parallelize(
        copy.deepcopy(model), mesh, example_inputs=token_batch(2, 16), progress=told.append, verify=False
    )
    for length in (16, 24, 40):
        call = token_batch(4, length)
        mine = {n: x[2 * mesh.coordinate(dist.get_rank(), "dp") :][:2] for n, x in call.items()}
        folded.zero_grad(), model.zero_grad()
        loss = folded(**mine).loss
        loss.backward()
        whole = model(**call).loss
        whole.backward()
        torch.testing.assert_close(loss.full_tensor() if hasattr(loss, "full_tensor") else loss, whole, rtol=1e-5, atol=1e-6)
        theirs = dict(folded.named_parameters())
        for name, p in model.named_parameters():
            assert relative_error(theirs[name].grad.full_tensor(), p.grad) < 1e-5, name
    assert told.count("capture") == 2


def test_on_processes() -> None:
    run_distributed(on_processes, 2)
