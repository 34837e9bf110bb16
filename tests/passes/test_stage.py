"""Stage: calls of blocks on pipeline stages, cut by what they compute; parameters are where they are used."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from foldcc.errors import FoldError
from foldcc.ir.plan import Plan, UnfitPlan
from foldcc.ir.program import Program
from foldcc.passes.stage import StagePass, _ends
from foldcc.testing import program

# Four calls: the third is of a wider block, and the last uses what the first uses.
TEXT = """
factors batch=4 hidden=8 wide=64
block0
  %x : f32[batch, hidden] = argument
  %w : f32[hidden, hidden]   = argument
  %y : f32[batch, hidden] = aten.mm(%x, %w)
  return [%y]
block1
  %x : f32[batch, hidden] = argument
  %u : f32[hidden, wide]     = argument
  %v : f32[wide, hidden]     = argument
  %h : f32[batch, wide]   = aten.mm(%x, %u)
  %y : f32[batch, hidden] = aten.mm(%h, %v)
  return [%y]
main
  %x  : f32[batch, hidden] = input x · gradient
  %w0 : f32[hidden, hidden] = parameter w0
  %w1 : f32[hidden, hidden] = parameter w1
  %u  : f32[hidden, wide] = parameter u
  %v  : f32[wide, hidden] = parameter v
  %c0 = block0(%x, %w0)
  %y0 : f32[batch, hidden] = getitem(%c0, 0)
  %c1 = block0(%y0, %w1)
  %y1 : f32[batch, hidden] = getitem(%c1, 0)
  %c2 = block1(%y1, %u, %v)
  %y2 : f32[batch, hidden] = getitem(%c2, 0)
  %c3 = block0(%y2, %w0)
  %y3 : f32[batch, hidden] = getitem(%c3, 0)
  return [%y3]
"""


def staged(stages: int, said: dict[str, tuple[int, ...]] | None = None) -> Program:
    given = program(TEXT, stage="shard", mesh="dp=1")
    return StagePass(stages=stages).run(replace(given, plan=Plan(stages=said or {})))


def places(found: Program) -> list[int]:
    return [call.meta["stage"] for call in found.calls]


def test_the_largest_stage_is_as_small_as_can_be_and_a_parameter_is_where_it_is_used() -> None:
    found = staged(2)
    assert places(found) == [0, 0, 1, 1]
    assert found.plan.stages == {"w0": (0, 1), "w1": (0,), "u": (1,), "v": (1,)}
    assert places(staged(4)) == [0, 1, 2, 3]
    alone = staged(1)
    assert places(alone) == [0, 0, 0, 0] and not alone.plan.stages


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_stretches_are_cut_as_trying_all_cuts_would(stages: int) -> None:
    costs = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    every = [[*cut, len(costs)] for cut in combinations(range(1, len(costs)), stages - 1)]

    def sums(ends: list[int]) -> list[float]:
        return [sum(costs[a:b]) for a, b in zip([0, *ends], ends, strict=False)]

    best = min(every, key=lambda ends: (max(sums(ends)), sum(x * x for x in sums(ends))))
    assert sorted(sums(_ends(costs, stages))) == sorted(sums(best))


def test_a_plan_says_it() -> None:
    said = {"w0": (0, 1), "w1": (1,), "u": (1,), "v": (1,)}
    assert places(staged(2, said)) == [0, 1, 1, 1]
    assert staged(2, said).plan.stages == said
    assert Plan.parse(str(replace(Plan(mesh="dp=2"), stages=said))).stages == said
    with pytest.raises(UnfitPlan, match=r"(?s)w1 on the stages 2, and there are 2.*0 to 1"):
        staged(2, {"w1": (2,)})
    with pytest.raises(UnfitPlan, match="from stage 1 on, none has all of the block's parameters"):
        staged(2, said | {"u": (0,)})


def test_more_stages_than_blocks() -> None:
    with pytest.raises(
        FoldError, match=r"(?s)5 pipeline stages of 4 blocks.*block0, block0, block1, block0.*stages_per_rank: 1 to 4"
    ):
        staged(5)
