"""Ahead: parameters are gathered before the block before the one that uses them, where nothing else has to come first."""

from __future__ import annotations

import pytest

from foldcc.passes.ahead import Ahead
from foldcc.testing import assert_rewrites

BLOCKS = """
unshard0 forward
  %w : f32[4@dp, 8] = argument
  %v : f32[8, 8] R(dp) = all_gather(%w, 0, 1, dp, R)
  return [%v : f32[8, 8] R(dp)]
block0 forward
  %x : f32[4@dp, 8] = argument
  %v : f32[8, 8] R(dp) = argument
  %y = aten.mm(%x, %v)
  return [%y]
main forward
  %x  : f32[4@dp, 8] = input x
  %w0 : f32[4@dp, 8] = parameter w0
  %w1 : f32[4@dp, 8] = parameter w1
  %w2 : f32[4@dp, 8] = parameter w2
"""
GATHERED = ["%u{0} = unshard0(%w{0})", "%v{0} : f32[8, 8] R(dp) = getitem(%u{0}, 0)"]
COMPUTED = ["%c{0} = block0(%{1}, %v{0})", "%y{0} : f32[4@dp, 8] = getitem(%c{0}, 0)"]


def text(*order: str) -> str:
    """Three blocks, `c0` to `c2`, and what gathers their parameters, `u0` to `u2`, in this order."""
    lines = []
    for name in order:
        i = int(name[1])
        lines += [x.format(i, f"y{i - 1}" if i else "x") for x in (GATHERED if name[0] == "u" else COMPUTED)]
    return BLOCKS + "\n".join(f"  {line}" for line in (*lines, "return [[%y2], []]"))


IN_TURNS = ("u0", "c0", "u1", "c1", "u2", "c2")


def test_parameters_are_gathered_before_the_block_before() -> None:
    assert_rewrites(Ahead(), f"ahead 1\n{text(*IN_TURNS)}", f"ahead 1\n{text('u0', 'u1', 'c0', 'u2', 'c1', 'c2')}")


@pytest.mark.parametrize(("ahead", "order"), [(0, IN_TURNS), (2, ("u0", "u1", "u2", "c0", "c1", "c2"))])
def test_the_plan_says_how_far_ahead(ahead: int, order: tuple[str, ...]) -> None:
    assert_rewrites(Ahead(), *(f"ahead {ahead}\n{text(*calls)}" for calls in (IN_TURNS, order)))


def test_what_is_gathered_already_stays_where_it_is() -> None:
    there = f"ahead 1\n{text('u0', 'u1', 'u2', 'c0', 'c1', 'c2')}"
    assert_rewrites(Ahead(), there, there)


def test_a_gather_of_what_is_no_parameter_stays_where_it_is() -> None:
    other = f"ahead 1\n{text(*IN_TURNS)}".replace("unshard0", "block1")
    assert_rewrites(Ahead(), other, other)
