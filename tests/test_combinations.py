"""Whatever the fold, the storage, what is kept, the dtypes, the sequences, the stages and the capacities: a model is itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foldcc import Capacity, FoldedMesh, Precision, parallelize, set_capacity
from foldcc.testing import check_equivalence, in_float64
from foldcc.testing.equivalence import relative_error
from tests.models import FAMILIES, WITH_AUX_LOSS, tiny_model, token_batch

MESHES = [
    "dp=2,tp=2|ep=4",
    "dp=4|ep=2",
    "dp=3,tp=2|ep=2",
    "dp=2,cp=2|ep=2",
    "dp=2,tp=2|ep=2,etp=2",
    "dp=5|ep=1",
    "dp=3,cp=2|ep=2",
    "dp=4,tp=2|ep=4",
]
POLICIES = st.fixed_dictionaries(
    {
        "zero": st.sampled_from([3, 2, 1, 0]),
        "recompute": st.sampled_from(["none", "selective", "blocks", 0.9]),
        "precision": st.sampled_from(
            [None, Precision(), Precision(compute="float16"), Precision(reduce="bfloat16"), Precision(compute="float32")]
        ),
    }
)


@st.composite
def changes(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Of a family's configuration: layers, a vocabulary that no ranks divide, dropout, and what else it has."""
    found: dict[str, Any] = {
        "num_hidden_layers": draw(st.integers(1, 2)) + (family == "deepseek_v3"),
        "vocab_size": draw(st.sampled_from([128, 131])),
        "attention_dropout": draw(st.sampled_from([0.0, 0.1])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    found |= {"router_jitter_noise": draw(st.sampled_from([0.0, 0.1]))} if family == "mixtral" else {}
    return found | ({"aux_loss": draw(st.booleans())} if family in WITH_AUX_LOSS else {})


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_model_is_itself_under_every_combination_of_policies(data: st.DataObject) -> None:
    family, mesh = data.draw(st.sampled_from(FAMILIES)), data.draw(st.sampled_from(MESHES))
    model, options = tiny_model(family, **data.draw(changes(family))).train(), data.draw(POLICIES)
    samples = {"dp=3": 6, "dp=5": 5}.get(mesh[:4], 4)
    check_equivalence(model, mesh, kwargs=token_batch(samples), verify=True, **options)


FOLDS = {  # and the ways to divide attention over their cp, for four heads
    "dp=2,cp=2,tp=2|ep=8": ("gathered", "ulysses", "ring"),
    "cp=4,tp=2|ep=8": ("gathered", "ring"),
    "dp=2,cp=3|ep=2": ("gathered", "ring"),
    "pp=2,dp=2,cp=2|ep=4": ("gathered", "ulysses", "ring"),
    "pp=2,cp=2,tp=2|ep=2,etp=2": ("gathered", "ulysses", "ring"),
    "pp=4,dp=2|ep=2": (),
    "pp=2,dp=2,tp=2|ep=4": (),
    "pp=2,tp=2|etp=2": (),
}


def capacities(parts: int) -> st.SearchStrategy[Capacity]:
    """Of groups that are a sequence, or what a rank has of it."""
    return st.builds(
        Capacity,
        factor=st.sampled_from([0.5, 1.0, 1.25]),
        group=st.sampled_from([24, 24 // parts]),
        keep=st.sampled_from(["probability", "position"]),
        pad=st.booleans(),
    )


def accumulated(model: nn.Module, batch: dict[str, Tensor], dp: int, parts: int, router: float) -> float:
    """The loss of one process that accumulates: of each micro-batch its share of the tokens, and a router's loss as it is."""
    model.config._experts_implementation = "eager"
    valid, total = (batch["labels"][:, 1:] != -100), 0.0
    for part in range(parts):
        rows = torch.arange(dp) * parts + part  # a sample of each rank
        out = model(**{name: x[rows] for name, x in batch.items()})
        extra = out.aux_loss * router if router else 0.0
        loss = (out.loss - extra) * valid[rows].sum() / valid.sum() + extra / parts
        loss.backward()
        total += float(loss.detach())
    return total


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_model_is_itself_with_sequences_stages_and_capacities(data: st.DataObject) -> None:
    family, text = data.draw(st.sampled_from(FAMILIES)), data.draw(st.sampled_from(sorted(FOLDS)))
    mesh = FoldedMesh.parse(text)
    stages, dp = mesh.size("pp"), mesh.size("dp")
    parts = data.draw(st.sampled_from([stages, 2 * stages]))
    layers = {"gpt_oss": 2, "deepseek_v3": 1}.get(family, 1) * max(stages, 2) + (family == "deepseek_v3")
    change = {"num_hidden_layers": layers, "vocab_size": data.draw(st.sampled_from([128, 131]))}
    aux = family in WITH_AUX_LOSS and data.draw(st.booleans())
    model = tiny_model(family, aux_loss=aux, tie_word_embeddings=data.draw(st.booleans()), **change).double()
    if family not in ("llama", "qwen3") and data.draw(st.booleans()):
        set_capacity(model, data.draw(capacities(mesh.size("cp"))))
    options = {
        "zero": data.draw(st.sampled_from([0, 1, 3])),
        "recompute": data.draw(st.sampled_from([None, "blocks", 0.9])),
        "attention": data.draw(st.sampled_from([None, *FOLDS[text]])),
        "schedule": data.draw(st.sampled_from(["gpipe", "1f1b", "zero-bubble"])),
    }
    batch = token_batch(dp * parts, 24)
    with in_float64():
        folded = parallelize(model, mesh, example_inputs=batch, micro_batches=parts, verify=True, **options)
        loss = folded(**batch).loss
        loss.backward()
        total = accumulated(model, batch, dp, parts, model.config.router_aux_loss_coef if aux else 0.0)
    assert float(loss) == pytest.approx(total, rel=1e-10)
    for name, p in folded.named_parameters():
        wanted = model.get_parameter(name).grad
        assert relative_error(p.grad, wanted) < 1e-10, name
