"""Shard: each axis divides a factor where that is cheapest, `reshard` stands where neighbours disagree, and no more."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

from foldcc.ir.plan import Plan
from foldcc.ops.layout import reshard
from foldcc.passes import run_passes
from foldcc.passes.annotate import UnknownOperator
from foldcc.passes.shard import ShardPass
from foldcc.testing import assert_rewrites, program

FACTORS = "factors batch=4 seq=6 hidden=8 width=16\n"
MLP = """
    %x    : f32[batch, seq, hidden] = input x
    %up   : f32[width, hidden] = parameter up
    %down : f32[hidden, width] = parameter down
    %h : f32[batch, seq, width] = aten.linear(%x, %up)
    %a : f32[batch, seq, width] = aten.relu(%h)
    %y : f32[batch, seq, hidden] = aten.linear(%a, %down)
    return [%y]
"""


def test_dp_divides_samples_and_parameters_are_used_as_r() -> None:
    assert_rewrites(
        ShardPass(),
        FACTORS + MLP,
        FACTORS
        + """
        %x    : f32[batch@dp, seq, hidden] = argument
        %up   : f32[width, hidden] I(dp) = argument
        %down : f32[hidden, width] I(dp) = argument
        %d : f32[hidden, width] R(dp) = reshard(%down)
        %u : f32[width, hidden] R(dp) = reshard(%up)
        %h : f32[batch@dp, seq, width] = aten.linear(%x, %u)
        %a : f32[batch@dp, seq, width] = aten.relu(%h)
        %y : f32[batch@dp, seq, hidden] = aten.linear(%a, %d)
        return [%y]
        """,
        mesh="dp=2",
    )


def test_tp_divides_the_width_between_two_products_and_their_sum_is_taken_once() -> None:
    assert_rewrites(
        ShardPass(),
        FACTORS + MLP,
        FACTORS
        + """
        %x    : f32[batch, seq, hidden] I(tp) = argument
        %up   : f32[width@tp, hidden] = argument
        %down : f32[hidden, width@tp] = argument
        %h : f32[batch, seq, width@tp] = aten.linear(%x, %up)
        %a : f32[batch, seq, width@tp] = aten.relu(%h)
        %p : f32[batch, seq, hidden] P(tp) = aten.linear(%a, %down)
        %y : f32[batch, seq, hidden] I(tp) = reshard(%p)
        return [%y]
        """,
        mesh="tp=2",
    )


def test_a_conversion_is_made_once_for_all_that_read_it() -> None:
    given = program(FACTORS + TWICE, stage="annotate", mesh="dp=2")
    left = ShardPass().run(given)
    reshards = [n.all_input_nodes[0].name for _, n in left.nodes() if n.target is reshard]
    assert sorted(reshards) == sorted(set(reshards)) and "w" in reshards


TWICE = """
    %x : f32[batch, seq, hidden] = input x
    %w : f32[hidden] = parameter w
    %a : f32[batch, seq, hidden] = aten.mul(%x, %w)
    %y : f32[batch, seq, hidden] = aten.add(%a, %w)
    return [%y]
"""


def test_what_has_no_gradient_stays_invariant() -> None:
    assert_rewrites(
        ShardPass(),
        FACTORS + MLP.replace("parameter up", "parameter up · frozen").replace("parameter down", "parameter down · frozen"),
        FACTORS
        + """
        %x    : f32[batch@dp, seq, hidden] = argument
        %up   : f32[width, hidden] I(dp) = argument
        %down : f32[hidden, width] I(dp) = argument
        %h : f32[batch@dp, seq, width] = aten.linear(%x, %up)
        %a : f32[batch@dp, seq, width] = aten.relu(%h)
        %y : f32[batch@dp, seq, hidden] = aten.linear(%a, %down)
        return [%y]
        """,
        mesh="dp=2",
    )


def test_what_the_plan_says_is_done_and_the_rest_is_chosen() -> None:
    given = program(FACTORS + MLP, stage="annotate", mesh="tp=2")
    plan = Plan.parse("plan tp=2\nparameters\n  up [width, hidden] I(tp)")
    free, told = (ShardPass().run(replace(given.copied(), plan=p)) for p in (Plan(), plan))
    assert str(free.layouts()["up"]) == "[width@tp, hidden]" and str(told.layouts()["up"]) == "[width, hidden] I(tp)"
    assert told.plan.parameters.keys() == {"up", "down"} and ShardPass().run(replace(given, plan=told.plan)).plan == told.plan


def test_an_operator_without_a_rule_runs_whole_and_is_named() -> None:
    text = """
    factors batch=4 seq=4
    %x : f32[batch, seq] = input x · gradient
    %y : f32[batch, seq] = aten.linalg_matrix_exp(%x)
    return [%y]
    """
    with pytest.warns(
        UnknownOperator, match="aten.linalg_matrix_exp.default has no factor rule; its operands are replicated on dp"
    ):
        run_passes(program(text, stage="annotate", mesh="dp=2"), [ShardPass()], check=lambda _: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_passes(program(FACTORS + MLP, stage="annotate", mesh="dp=2"), [ShardPass()], check=lambda _: None)
