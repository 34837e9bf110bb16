"""How cp divides attention: the way is a choice that a plan holds, and each way computes what one process does."""

from __future__ import annotations

import pytest

import foldcc
from foldcc import FoldError
from tests.models import tiny_model, token_batch
from tests.test_context import compare

BATCH = token_batch(4)


def ways(model: foldcc.FoldedModule) -> list[str]:
    return [op.ways["cp"] for block in model.plan.blocks.values() for op in block.values() if op.ways]


@pytest.mark.parametrize(
    ("way", "family", "mesh", "zero", "changes"),
    [
        ("ulysses", "llama", "cp=4", 3, {}),
        ("ulysses", "mixtral", "cp=4,tp=2|ep=8", 1, {"num_attention_heads": 8}),
    ],
)
def test_each_way_has_the_gradients_of_one_process(
    way: str, family: str, mesh: str, zero: int, changes: dict[str, int]
) -> None:
    model = compare(family, mesh, BATCH, zero=zero, attention=way, num_hidden_layers=1, **changes)
    assert set(ways(model)) == {way}


def test_a_plan_says_the_way_and_makes_it_again() -> None:
    plain = tiny_model("llama", num_hidden_layers=1)
    model = foldcc.parallelize(plain, "cp=2", example_inputs=BATCH, attention="ulysses", verify=False)
    text = str(model.plan)
    assert "cp=2 · attention=ulysses" in text and " by cp=ulysses" in text
    assert foldcc.Plan.parse(text) == model.plan
    again = foldcc.parallelize(plain, "cp=2", example_inputs=BATCH, plan=text, verify=False)
    assert again.plan == model.plan
    line = next(line for line in text.splitlines() if " by cp=ulysses" in line)
    one = foldcc.parallelize(plain, "cp=2", example_inputs=BATCH, plan=f"plan cp=2\nblock0\n{line}", verify=False)
    assert ways(one) == ["ulysses"]


@pytest.mark.parametrize(
    ("mesh", "way", "message"),
    [
        ("cp=2", "nonsense", "attention='nonsense' is no way to divide a sequence."),
        ("tp=2", "ulysses", "attention='ulysses' says how cp divides the sequence, and cp=1."),
        ("cp=3", "ulysses", "attention='ulysses' cannot be on cp=3: kv_heads=2 group=2 cannot be cut in 3 equal parts."),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(mesh: str, way: str, message: str) -> None:
    with pytest.raises(FoldError) as error:
        foldcc.parallelize(tiny_model("llama", num_hidden_layers=1), mesh, example_inputs=token_batch(4, 24), attention=way)
    assert str(error.value).startswith(message) and ("gathered" in str(error.value) or "cp" in str(error.value))


def test_a_plan_and_an_option_that_say_different_ways() -> None:
    with pytest.raises(FoldError, match="one of both"):
        foldcc.parallelize(
            tiny_model("llama", num_hidden_layers=1), "cp=2", attention="ulysses", plan="plan cp=2 · attention=gathered"
        )
