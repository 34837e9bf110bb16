"""Whatever the fold, the storage, what is kept between the passes and the dtypes: a model is itself."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foldcc import Precision
from foldcc.testing import check_equivalence
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
