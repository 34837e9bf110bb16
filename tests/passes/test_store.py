"""Store: parameters come to a block through one of their own, as they are stored and as the block uses them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from versions import joins_blocks

from foldcc.errors import FoldError
from foldcc.ir.plan import Plan
from foldcc.passes.store import Store
from foldcc.testing import assert_rewrites, program

FACTORS = "factors batch=4 hidden=8 width=16\n"
LAYER = """
block0
  %x : f32[batch@dp, hidden] I(tp) = argument
  %w : f32[width@tp, hidden] I(dp) = argument
  %v : f32[width@tp, hidden] R(dp) = reshard(%w)
  %z : f32[batch@dp, hidden] R(tp) = reshard(%x)
  %y : f32[batch@dp, width@tp]     = aten.linear(%z, %v)
  return [%y]
"""
ONE = f"""{FACTORS}{LAYER}
main
  %x    : f32[batch@dp, hidden] I(tp) = input x · gradient
  %w    : f32[width@tp, hidden] I(dp) = parameter w
  %call = block0(%x, %w)
  %y    : f32[batch@dp, width@tp] = getitem(%call, 0)
  return [%y]
"""
USED = """
block0
  %x : f32[batch@dp, hidden] I(tp) = argument
  %w : f32[width@tp, hidden] R(dp) = argument
  %z : f32[batch@dp, hidden] R(tp) = reshard(%x)
  %y : f32[batch@dp, width@tp]     = aten.linear(%z, %w)
  return [%y]
"""


def unshard(stored: str) -> str:
    return f"""
unshard0
  %w : f32{stored} = argument
  %v : f32[width@tp, hidden] R(dp) = reshard(%w)
  return [%v]
"""


def calls(stored: str) -> str:
    return f"""
main
  %x    : f32[batch@dp, hidden] I(tp) = input x · gradient
  %w    : f32{stored} = parameter w
  %own  = unshard0(%w)
  %v    : f32[width@tp, hidden] R(dp) = getitem(%own, 0)
  %call = block0(%x, %v)
  %y    : f32[batch@dp, width@tp] = getitem(%call, 0)
  return [%y]
"""


def test_the_step_of_a_parameter_is_a_block_of_its_own() -> None:
    stored = "[width@tp, hidden] I(dp)"
    assert_rewrites(Store(), ONE, FACTORS + unshard(stored) + USED + calls(stored), mesh="dp=2,tp=2")


@pytest.mark.parametrize("zero", [1, 3])
def test_with_zero_a_parameter_is_stored_divided_over_what_replicates_it(zero: int) -> None:
    stored = "[width@tp, hidden@dp]"
    head = f"zero {zero}\n{FACTORS}"
    assert_rewrites(Store(), f"zero {zero}\n{ONE}", head + unshard(stored) + USED + calls(stored), mesh="dp=2,tp=2")


def test_what_is_used_as_a_term_of_a_sum_stays_whole() -> None:
    text = f"""{FACTORS}
block0
  %x : f32[batch@dp, hidden] I(tp)       = argument
  %w : f32[hidden] I(dp,tp)              = argument
  %v : f32[hidden] P(dp) I(tp)           = reshard(%w)
  %y : f32[hidden] P(dp) I(tp)           = aten.neg(%v)
  return [%y]
main
  %x    : f32[batch@dp, hidden] I(tp) = input x · gradient
  %w    : f32[hidden] I(dp,tp) = parameter w
  %call = block0(%x, %w)
  %y    : f32[hidden] P(dp) I(tp) = getitem(%call, 0)
  return [%y]
"""
    given = program(f"zero 2\n{text}", stage="dispatch", mesh="dp=2,tp=2")
    assert Store().run(given.copied()).plan.stored == {}
    plan = Plan.parse("plan dp=2,tp=2\nstored\n  w [a@dp]")
    with pytest.raises(FoldError, match="w cannot be stored so on dp=2"):
        Store().run(replace(given.copied(), plan=plan))


def test_what_no_size_divides_is_stored_in_parts_that_differ() -> None:
    stored, head = "[width@tp, hidden@dp+]", FACTORS.replace("hidden=8", "hidden=7").replace("width=16", "width=2")
    before, after = (
        text.replace(FACTORS, head) for text in (f"zero 2\n{ONE}", FACTORS + unshard(stored) + USED + calls(stored))
    )
    assert_rewrites(Store(), before, f"zero 2\n{after}", mesh="dp=2,tp=2")


@joins_blocks
@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "dp=3,tp=2"])
def test_of_what_is_divided_where_it_is_used_another_axis_divides_what_that_leaves(mesh: str) -> None:
    bias = """factors batch=6 width=16
block0
  %x : f32[batch@dp, width@tp]     = argument
  %b : f32[width@tp] I(dp)         = argument
  %v : f32[width@tp] R(dp)         = reshard(%b)
  %y : f32[batch@dp, width@tp]     = aten.add(%x, %v)
  return [%y]
main
  %x    : f32[batch@dp, width@tp]  = input x · gradient
  %b    : f32[width@tp] I(dp)      = parameter b
  %call = block0(%x, %b)
  %y    : f32[batch@dp, width@tp]  = getitem(%call, 0)
  return [%y]
"""
    given = program(f"zero 1\n{bias}", stage="dispatch", mesh=mesh)
    left = Store().run(given.copied())
    layout = left.placeholders[1].meta["layout"]
    assert str(layout) == "[(width_tp@tp width_per_tp@dp+)]" and layout.shape == ({2: 4, 3: 3}[left.mesh.size("dp")],)
    plan = Plan.parse(f"plan {mesh}\nstored\n  b [(a@tp b@dp+)]")
    assert Store().run(replace(given.copied(), plan=plan)).plan.stored == left.plan.stored


def test_a_parameter_of_two_calls_is_unsharded_once_and_one_that_is_read_otherwise_is_not() -> None:
    twice = f"""{FACTORS.replace("width=16", "width=8")}{LAYER}
block1
  %x : f32[batch@dp, width@tp] = argument
  %w : f32[width@tp, hidden] I(dp) = argument
  %n : f32[width@tp, hidden] I(dp) = aten.neg(%w)
  %v : f32[width@tp, hidden] R(dp) = reshard(%n)
  %y : f32[batch@dp, hidden] P(tp) = aten.mm(%x, %v)
  %z : f32[batch@dp, hidden] I(tp) = reshard(%y)
  return [%z]
main
  %x  : f32[batch@dp, hidden] I(tp) = input x · gradient
  %w  : f32[width@tp, hidden] I(dp) = parameter w
  %a  = block0(%x, %w)
  %y  : f32[batch@dp, width@tp] = getitem(%a, 0)
  %b  = block1(%y, %w)
  %z  : f32[batch@dp, hidden] I(tp) = getitem(%b, 0)
  %c  = block0(%z, %w)
  %u  : f32[batch@dp, width@tp] = getitem(%c, 0)
  return [%u]
"""
    left = Store().run(program(twice, stage="dispatch", mesh="dp=2,tp=2"))
    assert [c.target for c in left.calls] == ["unshard0", "block0", "block1", "block0"]
    assert left.calls[2].args[1].name == "w" and left.calls[1].args[1] is left.calls[3].args[1]


@pytest.mark.parametrize("zero", [0, 3])
def test_a_cast_of_all_that_a_block_reads_goes_with_the_step(zero: int) -> None:
    stored = "[width@tp, hidden@dp]" if zero else "[width@tp, hidden] I(dp)"
    cast = "%v : f32[width@tp, hidden] R(dp)"
    wide = "  %u : bf16[width@tp, hidden] R(dp) = aten._to_copy(%v, dtype=bfloat16)\n"
    narrow = {"%x    : f32": "%x    : bf16", "%x : f32": "%x : bf16", "%y : f32": "%y : bf16", "%z : f32": "%z : bf16"}
    before, used, call = ONE, USED.replace("%w : f32", "%w : bf16"), calls(stored).replace("%v    : f32", "%v    : bf16")
    for old, new in {**narrow, "%y    : f32": "%y    : bf16"}.items():
        before, used, call = (text.replace(old, new) for text in (before, used, call))
    before = before.replace(f"{cast} = reshard(%w)\n", f"{cast} = reshard(%w)\n{wide}").replace(
        "linear(%z, %v)", "linear(%z, %u)"
    )
    through = unshard(stored).replace("reshard(%w)\n", f"reshard(%w)\n{wide}").replace("return [%v]", "return [%u]")
    head = f"zero {zero}\n" * bool(zero)
    assert_rewrites(Store(), head + before, head + FACTORS + through + used + call, mesh="dp=2,tp=2")
    twice = before.replace("return [%y]\n\nmain", "%n : f32[width@tp, hidden] R(dp) = aten.neg(%v)\n  return [%y, %n]\nmain")
    left = Store().run(program(head + twice, stage="dispatch", mesh="dp=2,tp=2"))  # the block reads it wide as well
    assert "_to_copy" not in str(left.blocks["unshard0"].graph) and "_to_copy" in str(left.blocks["block0"].graph)


def test_a_parameter_that_is_read_in_two_dtypes_is_cast_where_it_is_read() -> None:
    tied = f"""{FACTORS}
block0
  %w : f32[width, hidden] I(dp) = argument
  %v : f32[width, hidden] R(dp) = reshard(%w)
  %n : bf16[width, hidden] R(dp) = aten._to_copy(%v, dtype=bfloat16)
  %y : bf16[width, hidden] R(dp) = aten.neg(%n)
  return [%y]
block1
  %w : f32[width, hidden] I(dp) = argument
  %v : f32[width, hidden] R(dp) = reshard(%w)
  %y : f32[width, hidden] R(dp) = aten.neg(%v)
  return [%y]
main
  %w : f32[width, hidden] I(dp) = parameter w
  %a = block0(%w)
  %x : bf16[width, hidden] R(dp) = getitem(%a, 0)
  %b = block1(%w)
  %y : f32[width, hidden] R(dp) = getitem(%b, 0)
  return [%x, %y]
"""
    left = Store().run(program(tied, stage="dispatch", mesh="dp=2"))
    assert [c.target for c in left.calls] == ["unshard0", "block0", "block1"]  # and its gradient is reduced once
    assert "_to_copy" in str(left.blocks["block0"].graph) and "_to_copy" not in str(left.blocks["unshard0"].graph)
    narrow = "%y : bf16[width, hidden] R(dp) = getitem"
    alike = tied.replace("= block1", "= block0").replace(narrow.replace("bf16", "f32"), narrow)
    left = Store().run(program(re.sub(r"block1\n(?s:.*?)main", "main", alike), stage="dispatch", mesh="dp=2"))
    assert [c.target for c in left.calls] == ["unshard0", "block0", "block0"]
    assert "_to_copy" in str(left.blocks["unshard0"].graph)


def test_what_the_plan_says_is_stored_so_or_refused() -> None:
    given = program(ONE, stage="dispatch", mesh="dp=2,tp=2")
    plan = Plan.parse("plan dp=2,tp=2\nparameters\n  w [a@tp, b] I(dp)\nstored\n  w [a@tp, b@dp]")
    left = Store().run(replace(given.copied(), plan=plan))
    assert str(left.placeholders[1].meta["layout"]) == "[width@tp, hidden@dp]" and left.plan.stored.keys() == {"w"}
    whole = Plan.parse("plan dp=2,tp=2 · zero=3\nstored\n  w [a@tp, b] I(dp)")
    assert str(Store().run(replace(given.copied(), plan=whole)).plan.stored["w"]) == "[width@tp, hidden] I(dp)"
    with pytest.raises(FoldError, match="w cannot be stored so on tp=2"):
        Store().run(replace(given.copied(), plan=Plan.parse("plan dp=2,tp=2\nstored\n  w [a, b@tp]")))
