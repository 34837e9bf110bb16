"""What is run without gradients is compiled without a backward pass, and equals the model in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import foldcc
from foldcc.testing.equivalence import relative_error
from tests.models import tiny_model, token_batch

MESH = "dp=2,tp=2|ep=4"


def plain_and_folded(**given: Any) -> tuple[nn.Module, foldcc.FoldedModule]:
    plain = tiny_model("mixtral", num_hidden_layers=1).double()
    model = foldcc.parallelize(copy.deepcopy(plain), MESH, **given)
    plain.config._experts_implementation = "eager"
    return plain, model


@pytest.mark.parametrize("off", [pytest.param(torch.no_grad, marks=pytest.mark.slow), torch.inference_mode])
def test_a_model_may_be_evaluated_before_it_is_trained(off: Callable[[], Any]) -> None:
    batch = token_batch(4)
    plain, model = plain_and_folded()
    model.eval()
    with off():
        found = model(**batch)
    assert model.program.backward is None and model.program.output.args[0][1] == ()
    assert {c.direction for c in model.collectives()} == {"forward"} and model.summary().flops_ratio == pytest.approx(1)
    wanted = plain(**batch)
    assert not found.loss.requires_grad and relative_error(found.loss, wanted.loss) < 1e-6
    assert foldcc.verify(model).ok
    model.train()
    model(**batch).loss.backward()
    wanted.loss.backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad, plain.get_parameter(name).grad, 1e-4) < 1e-5, name


@pytest.mark.parametrize("off", [torch.no_grad, pytest.param(torch.inference_mode, marks=pytest.mark.slow)])
def test_a_model_may_be_evaluated_between_steps(off: Callable[[], Any]) -> None:
    batch = token_batch(4)
    plain, model = plain_and_folded(example_inputs=batch)
    model(**batch).loss.backward()
    for _ in range(2):
        with off():
            assert relative_error(model(**batch).loss, plain(**batch).loss) < 1e-6
        assert model.program.backward is None
    loss = model(**batch).loss
    assert loss.requires_grad
    loss.backward()


def test_gradients_that_are_off_are_off_where_the_model_is_made() -> None:
    with torch.no_grad():
        _, model = plain_and_folded(example_inputs=token_batch(4))
    assert model.program.backward is None
    model(**token_batch(4)).loss.backward()
