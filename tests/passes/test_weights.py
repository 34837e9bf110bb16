"""Weights: a backward pass in two calls makes what one makes, once, and products that lead to parameters alone wait."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import fx

import foldcc
from foldcc.errors import FoldError
from foldcc.ir.parse import parse_stage
from foldcc.ir.program import INPUT, WEIGHT, Program
from foldcc.ir.walk import BACKWARD, parts
from foldcc.rules.kinds import is_view
from foldcc.testing import mutate
from foldcc.testing.mutate.mutant import running
from foldcc.testing.text import derived
from tests.models import tiny_model, token_batch

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.foldcc.grouped_outer.default}


@cache
def folded(family: str = "llama", plan: str | None = None) -> foldcc.FoldedModule:
    return foldcc.parallelize(
        tiny_model(family, num_hidden_layers=2),
        "pp=2,dp=2",
        example_inputs=token_batch(8, 8),
        micro_batches=2,
        schedule="zero-bubble",
        recompute=None if plan else "blocks",
        plan=plan,
        verify=False,
    )


def backward(program: Program) -> dict[str, list[fx.Node]]:
    """What the blocks of the backward pass compute, views aside."""
    found = {}
    for part in parts(program):
        if part.direction == BACKWARD:
            computed = [n for n in part.graph.graph.nodes if n.op == "call_function" and "getitem" not in str(n.target)]
            found[part.name] = [n for n in computed if not is_view(n.target) and n.all_input_nodes]
    return found


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_nothing_but_views_is_computed_twice_and_nothing_is_left_out(family: str) -> None:
    stages = folded(family).stages
    before, after = (backward(s.program) for s in (stages[-2], stages[-1]))
    halved = [name for name in before if name not in after]
    assert halved
    for name in halved:
        both = [n.name for half in (INPUT, WEIGHT) for n in after.get(name + half, ())]
        assert Counter(both) == Counter(n.name for n in before[name]), name


def test_products_that_lead_to_parameters_alone_wait_and_no_others() -> None:
    """Each of the seven weights of a layer has a product of its own; as many lead on; attention's are in one operator."""
    after = backward(folded().stages[-1].program)
    (layer,) = {name.removesuffix(INPUT) for name in after if name.endswith(INPUT) and len(after[name]) > 30}
    assert [sum(n.target in PRODUCTS for n in after[layer + half]) for half in (INPUT, WEIGHT)] == [7 + 6, 7]


def test_a_stage_with_halves_is_the_program_that_it_prints() -> None:
    stage = folded().stages[-1]
    again = parse_stage(str(stage))
    derived(again.program)
    assert str(again) == str(stage)


def test_the_plan_says_what_waits_and_one_that_says_too_little_is_refused() -> None:
    made = folded().plan
    name, waits = next((name, waits) for name, waits in made.waits.items() if len(waits) > 2)
    assert folded(plan=str(made)).plan == made
    said = next(line for line in str(made).splitlines() if line.split()[:1] == [name] and line.split()[1:] == [*waits])
    with pytest.raises(FoldError, match=f"gradients of parameters of {name} cannot be computed of what the plan has wait"):
        folded(plan=str(made).replace(said, said.replace(f" {waits[0]} ", " ", 1)))


def exchanged(direction: str, program: Program) -> Program:
    """Two arguments of a call, of one shape, go to each other's place; backward, two of the values that wait."""
    main: Any = copy.deepcopy(getattr(program, direction))
    for call in main.graph.find_nodes(op="call_module"):
        if str(call.target).endswith(WEIGHT) or direction == "graph":
            values = [n.meta["val"] for n in main.get_submodule(str(call.target)).graph.find_nodes(op="placeholder")]
            alike = [(i, k) for k, x in enumerate(values) for i in range(k) if values[i].shape == x.shape]
            for i, k in alike[:1]:
                args = list(call.args)
                args[i], args[k] = args[k], args[i]
                call.args = tuple(args)
                return replace(program, **{direction: main})
    raise AssertionError("no call is given two values of one shape")


@pytest.mark.parametrize("reduced", [False, True])
def test_the_proof_finds_a_wrong_value_that_waits_and_a_gradient_that_is_not_made(reduced: bool) -> None:
    model = folded()
    assert foldcc.verify(model, rounds=1, reduced=reduced).ok
    for direction in ("graph", "backward"):
        assert not foldcc.verify(running(model, partial(exchanged, direction)), rounds=1, reduced=reduced).ok, direction
    assert not foldcc.verify(mutate.drop_gradient(model, parameter="*.up_proj.weight"), rounds=1, reduced=reduced).ok
