"""Outline: a stretch that repeats is one block, called as often; what differs between repeats is an argument."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from foldcc.ir.plan import Plan
from foldcc.ir.program import Program
from foldcc.passes.outline import Outline
from foldcc.testing import assert_rewrites, program

LAYERS = """
    %x  : f32[4x8] = input x
    %w0 : f32[8x8] = parameter w0
    %w1 : f32[8x8] = parameter w1
    %h  = aten.mm(%x, %w0)
    %h0 = aten.mm(%h, %w0)
    %a0 = aten.relu(%h0)
    %h1 = aten.mm(%a0, %w1)
    %a1 = aten.relu(%h1)
    %loss = aten.sum(%a1)
    return [%loss]
"""


def test_a_repeat_is_one_block_that_is_called_twice() -> None:
    assert_rewrites(
        Outline(smallest=2),
        LAYERS,
        """
        block0
          %x : f32[4x8] = argument
          %w : f32[8x8] = argument
          %h = aten.mm(%x, %w)
          return [%h]
        block1
          %h : f32[4x8] = argument
          %w : f32[8x8] = argument
          %y = aten.mm(%h, %w)
          %a = aten.relu(%y)
          return [%a]
        block2
          %a : f32[4x8] = argument
          %loss = aten.sum(%a)
          return [%loss]
        main
          %x  : f32[4x8] = input x
          %w0 : f32[8x8] = parameter w0
          %w1 : f32[8x8] = parameter w1
          %first = block0(%x, %w0)
          %h = getitem(%first, 0)
          %one = block1(%h, %w0)
          %a0 = getitem(%one, 0)
          %two = block1(%a0, %w1)
          %a1 = getitem(%two, 0)
          %last = block2(%a1)
          %loss = getitem(%last, 0)
          return [%loss]
        """,
    )


@pytest.mark.parametrize(
    ("why", "old", "new"),
    [
        ("it is smaller than the smallest", "", ""),
        ("another operator", "%a1 = aten.relu(%h1)", "%a1 = aten.sigmoid(%h1)"),
        ("another shape", "%w1 : f32[8x8]", "%w1 : f32[8x6]"),
        ("another wiring", "%a1 = aten.relu(%h1)", "%a1 = aten.relu(%h0)"),
        ("one of them is frozen", "parameter w1", "parameter w1 · frozen"),
        ("one of them is no parameter", "parameter w1", "buffer w1"),
    ],
)
def test_what_is_not_alike_is_no_repeat(why: str, old: str, new: str) -> None:
    assert old in LAYERS
    text = LAYERS.replace(old, new) if old else LAYERS
    block = "\n".join(re.sub("(parameter|buffer|input) .*", "argument", line) for line in text.splitlines())
    assert_rewrites(Outline(smallest=3 if "smallest" in why else 2), text, block.replace("    %x", "block0\n%x", 1))


def test_what_a_plan_has_on_two_pipeline_stages_is_two_blocks() -> None:
    given = program(LAYERS)
    found = Outline(smallest=3).run(replace(given, plan=Plan(stages={"w0": (0,), "w1": (1,)})))
    calls = [[n.name for n in call.all_input_nodes] for call in found.calls]
    assert calls == [["x", "w0"], [calls[1][0], "w1"]] and len(Outline(smallest=3).run(given).calls) == 1
    alike = Outline(smallest=2).run(replace(given, plan=Plan(stages={"w0": (0,), "w1": (1,)})))
    assert [str(call.target) for call in alike.calls] == ["block0", "block1", "block1", "block2"]


def test_every_result_that_is_read_outside_is_returned() -> None:
    block = """
        block1
          %h : f32[4x8] = argument
          %w : f32[8x8] = argument
          %y = aten.mm(%h, %w)
          %a = aten.relu(%y)
          return [%y, %a]
    """
    assert_rewrites(Outline(smallest=2), LAYERS.replace("return [%loss]", "return [%loss, %h1]"), block)
    with pytest.raises(AssertionError, match=r"\+return \[%3\]"):
        assert_rewrites(Outline(smallest=2), LAYERS, block)


def stack(slopes: list[float]) -> Program:
    """Layers one after another, each with a slope of its own."""
    lines = [
        "%x : f32[4x8] = input x",
        *(f"%w{i} : f32[8x8] = parameter w{i}" for i in range(len(slopes))),
        "%y0 = aten.exp(%x)",
    ]
    for i, slope in enumerate(slopes):
        lines += [f"%h{i} = aten.mm(%y{i}, %w{i})", f"%y{i + 1} = aten.leaky_relu(%h{i}, {slope})"]
    return Outline(smallest=2).run(program("\n".join([*lines, f"return [%y{len(slopes)}]"])))


@pytest.mark.parametrize("count", [3, 7])
def test_a_repeated_layer_is_one_block_however_many_there_are(count: int) -> None:
    found = stack([0.1] * count)  # the first product reads no gradient, and stands before them
    assert [found.count(name) for name in found.blocks] == [1, count - 1, 1]


def test_layers_that_differ_are_not_taken_for_repeats() -> None:
    """Another slope in every second layer: the repeat is the pair."""
    found = stack([0.3, *[0.1, 0.2] * 3])
    assert max(found.count(name) for name in found.blocks) == 3
    (pair,) = (block for name, block in found.blocks.items() if found.count(name) == 3)
    assert [n.args[1] for n in pair.graph.nodes if "leaky" in str(n.target)] == [0.1, 0.2]


def test_values_that_are_one_in_the_first_repeat_may_be_two_in_another() -> None:
    """Layers that read what the first layer read, besides what the layer before returns."""
    assert_rewrites(
        Outline(smallest=2),
        """
        %p  : f32[4x8] = parameter p
        %w0 : f32[8x8] = parameter w0
        %w1 : f32[8x8] = parameter w1
        %x  = aten.exp(%p)
        %h0 = aten.mm(%x, %w0)
        %a0 = aten.mul(%h0, %x)
        %h1 = aten.mm(%a0, %w1)
        %a1 = aten.mul(%h1, %x)
        return [%a1]
        """,
        """
        block1
          %y : f32[4x8] = argument
          %w : f32[8x8] = argument
          %x : f32[4x8] = argument
          %h = aten.mm(%y, %w)
          %a = aten.mul(%h, %x)
          return [%a]
        """,
    )
