"""An argument that changes what a Transformers model returns is carried, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import foldcc
from foldcc.mesh import FoldedMesh
from tests.models import tiny_model, token_batch
from tests.versions import TRACERS

_ARGUMENTS: dict[str, dict[str, Any]] = {
    "output_hidden_states": {"output_hidden_states": True},
    "some_hidden_states": {"output_hidden_states": [0, -1]},
    "output_router_logits": {"output_router_logits": True},
    "return_dict": {"return_dict": False},
    "logits_to_keep": {"logits_to_keep": 2},
    "use_cache": {"use_cache": False},
}


@pytest.mark.parametrize("argument", _ARGUMENTS)
def test_an_argument_that_changes_what_is_returned_is_carried(argument: str) -> None:
    model = tiny_model("mixtral", num_hidden_layers=1, use_cache=False)
    batch = token_batch(2, 8)
    given = {**batch, **_ARGUMENTS[argument]}
    if argument == "logits_to_keep":
        del given["labels"]
    folded = foldcc.parallelize(model, FoldedMesh.parse("dp=2"), example_inputs=given)
    (found, one), (wanted, other) = (pytree.tree_flatten(m(**given)) for m in (folded, model))
    assert one == other
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("capture", TRACERS)
@pytest.mark.parametrize("called", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_outputs_are_recorded_once_whether_or_not_the_model_was_called_before(called: bool, capture: str) -> None:
    model = tiny_model("mixtral", use_cache=False)
    given = {"input_ids": token_batch(2, 8)["input_ids"], "output_router_logits": True, "output_hidden_states": True}
    if called:
        model(**given)
    folded = foldcc.parallelize(model, FoldedMesh.parse("dp=2"), example_inputs=given, capture=capture)
    for _ in range(2):
        found, wanted = folded(**given), model(**given)
        assert len(found.router_logits) == len(wanted.router_logits) == 2
        assert len(found.hidden_states) == len(wanted.hidden_states) == 3
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states)


@pytest.mark.parametrize("capture", ["export", "dynamo"])
@pytest.mark.parametrize("asked", ["argument", "config"])
def test_attention_weights_are_refused(asked: str, capture: str) -> None:
    model = tiny_model("llama", num_hidden_layers=1, attn_implementation="eager")
    given: dict[str, Any] = dict(token_batch(2, 8))
    if asked == "argument":
        given["output_attentions"] = True
    else:
        model.config.output_attentions = True
    assert len(model(**given).attentions) == 1
    with pytest.raises(foldcc.FoldError, match="output_attentions=True"):
        foldcc.parallelize(model, FoldedMesh.parse("dp=2"), example_inputs=given, capture=capture)


def test_a_cache_is_refused() -> None:
    given = {**token_batch(2, 8), "use_cache": True}
    with pytest.raises(foldcc.FoldError, match="use_cache"):
        foldcc.parallelize(tiny_model("llama", num_hidden_layers=1), FoldedMesh.parse("dp=2"), example_inputs=given)
