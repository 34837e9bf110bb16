"""Planting mistakes: what a mutant changes, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

import foldcc
from foldcc.module import FoldedModule
from foldcc.testing import mutate
from tests.models import token_batch
from tests.mutations.programs import folded

FOLD = "dp=2,tp=2|ep=4"
BATCH = token_batch(4, 8)


@pytest.fixture(scope="module")
def model() -> FoldedModule:
    return folded("mixtral", FOLD, num_hidden_layers=1)


def gradients(model: FoldedModule) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(model(**BATCH).loss, list(model.parameters()))
    return dict(zip([name for name, _ in model.named_parameters()], found, strict=True))


def test_the_model_stays_as_it_is(model: FoldedModule) -> None:
    before, text, loss = str(model.program.graph.graph), str(model.stages[-1]), model(**BATCH).loss
    broken = mutate.find(model, kind="left out", direction="forward").apply()
    assert broken.stages[-1].program is not model.program and str(model.program.graph.graph) == before
    assert str(model.stages[-1]) == text and torch.equal(model(**BATCH).loss, loss)


def test_a_mutant_shares_the_parameters(model: FoldedModule) -> None:
    broken = mutate.scale_gradient(model, parameter="*.gate.weight", factor=2)
    assert all(a is b for a, b in zip(broken.parameters(), model.parameters(), strict=True))


def test_mutants_come_in_the_same_order(model: FoldedModule) -> None:
    assert list(mutate.mutants(model)) == list(mutate.mutants(model))


def test_a_mistake_is_in_the_backward_pass_of_every_choice_of_outputs(model: FoldedModule) -> None:
    right, wrong = gradients(model), gradients(mutate.scale_gradient(model, parameter="*.q_proj.weight", factor=2))
    for name in right:
        assert torch.equal(wrong[name], 2 * right[name] if "q_proj" in name else right[name]), name


def test_every_gradient_of_a_bucket_can_go_alone(model: FoldedModule) -> None:
    reduced = [g for g in mutate.gradients(model.program) if g.axes]
    assert len(reduced) > 5
    for g in reduced:
        (name,) = g.parameters
        broken = foldcc.verify(mutate.drop_reduction(model, parameter=name, axis=g.axes[-1]))
        assert broken.parameter == name


def test_a_mistake_in_an_earlier_stage_is_differentiated(model: FoldedModule) -> None:
    mistake = mutate.find(model, stage="localize", kind="scale", module="model.norm", description="*times 2")
    assert mistake.stage == "localize"
    broken = mistake.apply()
    assert [s.name for s in broken.stages] == [s.name for s in model.stages]
    assert str(broken.stages["shard"]) == str(model.stages["shard"])
    assert not foldcc.verify(broken, stage="localize").ok and foldcc.verify(broken, stage="shard").ok


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (lambda m: mutate.drop_reduction(m, parameter="*.gates", axis="tp"), "No parameter"),
        (lambda m: mutate.drop_reduction(m, parameter="*.gate.weight", axis="ep"), "is summed over ep"),
        (lambda m: mutate.reduce_again(m, parameter="*.gate.weight", axis="xp"), "xp"),
        (lambda m: mutate.find(m, kind="delete"), "no mutation 'delete'"),
        (lambda m: mutate.find(m, kind="left out", module="*.nowhere"), "module='\\*.nowhere'"),
        (lambda m: list(mutate.mutants(m, stage="lowering")), "no stage"),
    ],
)
def test_what_matches_nothing_is_an_error(model: FoldedModule, plant, said: str) -> None:
    with pytest.raises(foldcc.FoldError, match=said):
        plant(model)
