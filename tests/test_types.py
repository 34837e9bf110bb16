"""The type checker catches what the search and the passes could get wrong."""

from __future__ import annotations

import pytest

from foldcc.errors import FoldError
from foldcc.testing import program

FACTORS = "factors batch=4 seq=4 hidden=8 width=16 experts=4\n"


def refused(stage: str, text: str, says: str, mesh: str = "dp=2,tp=2") -> None:
    with pytest.raises(FoldError, match=says):
        program(f"{FACTORS}{text}\nreturn [%y]", stage=stage, mesh=mesh)


def legal(stage: str, text: str, mesh: str = "dp=2,tp=2") -> None:
    program(f"{FACTORS}{text}\nreturn [%y]", stage=stage, mesh=mesh)


X = "%x : f32[batch@dp, hidden] = argument\n"


@pytest.mark.parametrize("stage", ["shard", "dispatch", "localize"])
@pytest.mark.parametrize(("weight", "call"), [("[width, hidden]", "aten.linear(%x, %w)"), ("[hidden]", "aten.mul(%x, %w)")])
def test_a_weight_that_enters_without_its_reduction_is_caught(weight: str, call: str, stage: str) -> None:
    y = f"%y : f32[batch@dp, {'width' if 'linear' in call else 'hidden'}] = {call}"
    legal(stage, f"{X}%w : f32{weight} R(dp) = argument\n{y}")
    legal(stage, f"{X}%w : f32{weight} I(dp) = parameter w · frozen\n{y}")
    refused(stage, f"{X}%w : f32{weight} I(dp) = parameter w\n{y}", "given its operands")


def test_an_expert_bias_that_enters_without_its_reduction_is_caught() -> None:
    text = """
    %rows  : f32[u1, hidden] V(edp,ep) = argument
    %which : i64[u1] V(edp,ep) = argument
    %bias  : f32[experts@ep, hidden] {} = argument
    %own   : f32[u1, hidden] V(edp,ep) = aten.index_select(%bias, 0, %which)
    %y     : f32[u1, hidden] V(edp,ep) = aten.add(%rows, %own)
    """
    legal("dispatch", text.format("R(edp)"), "dp=4|ep=2")
    refused("dispatch", text.format("I(edp)"), "index_select", "dp=4|ep=2")


@pytest.mark.parametrize("call", ["aten.exp(%x)", "aten.mul(%x, %x)", "aten.add(%x, 1)"])
def test_a_partial_value_in_a_non_linear_operator_is_caught(call: str) -> None:
    text = "%x : f32[batch@dp, hidden] P(tp) = argument\n%y : f32[batch@dp, hidden] P(tp) = {}"
    legal("shard", text.format("aten.neg(%x)"))
    refused("shard", text.format(call).replace("aten.add(%x, 1)", "aten.maximum(%x, %x)"), "given its operands")


@pytest.mark.parametrize(
    ("x", "y", "call"),
    [
        ("[batch@dp, hidden@tp]", "[batch@dp, hidden] I(tp)", "all_reduce(%x, tp, I)"),
        ("[batch@dp, hidden] R(tp)", "[batch@dp, hidden] I(tp)", "all_reduce(%x, tp, I)"),
        ("[batch@dp, hidden] P(tp)", "[batch@dp, hidden] R(tp)", "all_reduce(%x, tp, I)"),
        ("[batch@dp, hidden] P(tp)", "[batch@dp, hidden] R(tp)", "retype(%x, tp, I, R)"),
    ],
)
def test_a_collective_on_the_wrong_type_is_caught(x: str, y: str, call: str) -> None:
    refused("localize", f"%x : f32{x} = argument\n%y : f32{y} = {call}", call.split("(")[0])
