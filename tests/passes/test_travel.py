"""Travel: values go between ranks in the narrower dtype beside a cast, and gradients of parameters in the one that is said."""

from __future__ import annotations

import pytest

from foldcc.passes.travel import Travel
from foldcc.testing import assert_rewrites

FLOAT32, BFLOAT16 = (f"precision compute=bfloat16 reduce={reduce} router=float32\n" for reduce in ("float32", "bfloat16"))
WEIGHT = """
unshard0
  %w  : f32[4@dp, 6] = argument
  %dv : bf16[8, 6] P(dp) = gradient of result 0
"""
MAIN = """
main
  %w : f32[4@dp, 6] = parameter w
  %call = unshard0(%w)
  %v : bf16[8, 6] = getitem(%call, 0)
  return [%v]
"""


def rewrites(before: str, after: str, policy: str = "") -> None:
    assert_rewrites(Travel(), policy + before + MAIN * ("unshard0" in before), policy + after + MAIN * ("unshard0" in after))


def test_a_weight_is_gathered_as_it_is_used_and_its_gradient_added_as_it_is_stored() -> None:
    back = """
      %wide = aten._to_copy(%dv, dtype=float32)
      %dw   = reduce_scatter(%wide, 0, 1, dp)
      return [[%v], [%dw]]
    """
    before = f"{WEIGHT}%g = all_gather(%w, 0, 1, dp, R)\n%v = aten._to_copy(%g, dtype=bfloat16){back}"
    after = f"{WEIGHT}%n = aten._to_copy(%w, dtype=bfloat16)\n%v = all_gather(%n, 0, 1, dp, R){back}"
    rewrites(before, after)  # a move is the same in any order with a cast
    rewrites(before, after, FLOAT32)
    narrow = """
      %dn = reduce_scatter(%dv, 0, 1, dp)
      %dw = aten._to_copy(%dn, dtype=float32)
      return [[%v], [%dw]]
    """
    rewrites(before, after.replace(back, narrow), BFLOAT16)


def test_what_was_filled_up_to_be_gathered_travels_as_it_is_used_too() -> None:
    back = """
      %wide = aten._to_copy(%dv, dtype=float32)
      %full = aten.slice_backward(%wide, [8, 6], 0, 0, 7, 1)
      %dw   = reduce_scatter(%full, 0, 1, dp)
      return [[%v], [%dw]]
    """
    head = WEIGHT.replace("bf16[8, 6]", "bf16[7, 6]")
    gathered = "%g = all_gather({}, 0, 1, dp, R)\n{} = aten.slice(%g, 0, 0, 7)"
    before = f"{head}{gathered.format('%w', '%s')}\n%v = aten._to_copy(%s, dtype=bfloat16){back}"
    after = f"{head}%n = aten._to_copy(%w, dtype=bfloat16)\n{gathered.format('%n', '%v')}{back}"
    main = MAIN.replace("bf16[8, 6]", "bf16[7, 6]")
    assert_rewrites(Travel(), FLOAT32 + before + main, FLOAT32 + after + main)


def test_gradients_of_narrow_weights_are_added_in_float32() -> None:
    head = WEIGHT.replace("f32[4@dp, 6]", "bf16[8, 6] I(dp)")
    main = MAIN.replace("f32[4@dp, 6]", "bf16[8, 6] I(dp)")
    before = f"{head}%v = retype(%w, dp, I, R)\n%dw = all_reduce(%dv, dp, I)\nreturn [[%v], [%dw]]"
    after = f"""{head}
      %v    = retype(%w, dp, I, R)
      %wide = aten._to_copy(%dv, dtype=float32)
      %sum  = all_reduce(%wide, dp, I)
      %dw   = aten._to_copy(%sum, dtype=bfloat16)
      return [[%v], [%dw]]
    """
    assert_rewrites(Travel(), FLOAT32 + before + main, FLOAT32 + after + main)
    assert_rewrites(Travel(), BFLOAT16 + before + main, BFLOAT16 + before + main)


def test_what_is_added_over_one_axis_after_another_is_not_rounded_in_between() -> None:
    head = WEIGHT.replace("f32[4@dp, 6]", "bf16[4@dp, 6] I(tp)").replace("P(dp)", "P(dp,tp)")
    main = MAIN.replace("f32[4@dp, 6]", "bf16[4@dp, 6] I(tp)")
    forward = "%r = retype(%w, tp, I, R)\n%v = all_gather(%r, 0, 1, dp, R)\n"
    before = f"{head}{forward}%a = all_reduce(%dv, tp, I)\n%dw = reduce_scatter(%a, 0, 1, dp)\nreturn [[%v], [%dw]]"
    after = f"""{head}{forward}
      %wide = aten._to_copy(%dv, dtype=float32)
      %a    = all_reduce(%wide, tp, I)
      %b    = reduce_scatter(%a, 0, 1, dp)
      %dw   = aten._to_copy(%b, dtype=bfloat16)
      return [[%v], [%dw]]
    """
    assert_rewrites(Travel(), FLOAT32 + before + main, FLOAT32 + after + main)


ACTIVATIONS = """
  %x  : f32[4@tp, 6] = argument
  %dy : bf16[8, 6] P(tp) = gradient of result 0
"""


@pytest.mark.parametrize("policy", ["", FLOAT32])
def test_activations_are_gathered_narrow_and_with_a_precision_their_gradients_are_added_narrow(policy: str) -> None:
    before = f"""{ACTIVATIONS}
      %g  = all_gather(%x, 0, 1, tp, R)
      %y  = aten._to_copy(%g, dtype=bfloat16)
      %w  = aten._to_copy(%dy, dtype=float32)
      %dx = reduce_scatter(%w, 0, 1, tp)
      return [[%y], [%dx]]
    """
    wide = "%w = aten._to_copy(%dy, dtype=float32)\n%dx = reduce_scatter(%w, 0, 1, tp)"
    narrow = "%n = reduce_scatter(%dy, 0, 1, tp)\n%dx = aten._to_copy(%n, dtype=float32)"
    after = f"""{ACTIVATIONS}
      %c = aten._to_copy(%x, dtype=bfloat16)
      %y = all_gather(%c, 0, 1, tp, R)
      {narrow if policy else wide}
      return [[%y], [%dx]]
    """
    rewrites(before, after, policy)


def test_what_was_narrow_moves_narrow_also_through_several_moves() -> None:
    rewrites(
        """
        %x : bf16[2@(dp,tp), 6] = argument
        %w = aten._to_copy(%x, dtype=float32)
        %g = all_gather(%w, 0, 1, tp, I)
        %h = all_gather(%g, 0, 1, dp, I)
        return [[%h], [None]]
        """,
        """
        %x : bf16[2@(dp,tp), 6] = argument
        %g = all_gather(%x, 0, 1, tp, I)
        %h = all_gather(%g, 0, 1, dp, I)
        %w = aten._to_copy(%h, dtype=float32)
        return [[%w], [None]]
        """,
    )


@pytest.mark.parametrize(
    "text",
    [
        "%g = all_gather(%x, 0, 1, tp, I)\n%n = aten._to_copy(%g, dtype=bfloat16)\nreturn [[%g, %n], [None]]",  # read wide too
        "%g = all_gather(%x, 0, 1, tp, I)\n%n = aten._to_copy(%g, dtype=float64)\nreturn [[%n], [None]]",  # wider behind it
        "%g = all_gather(%x, 0, 1, tp, I)\n%n = aten._to_copy(%g, dtype=int32)\nreturn [[%n], [None]]",  # rounded
        "%g = all_gather(%x, 0, 1, tp, I)\n%n = aten._to_copy(%g, dtype=bfloat16, device=cpu)\nreturn [[%n], [None]]",  # moved
    ],
)
def test_what_would_not_be_narrower_stays(text: str) -> None:
    rewrites(f"%x : f32[4@tp, 6] = argument\n{text}", f"%x : f32[4@tp, 6] = argument\n{text}", FLOAT32)
