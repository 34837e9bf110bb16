"""Bucket: small gradients that are summed over the same axes travel together, and nothing else does."""

from __future__ import annotations

import pytest

import foldcc
from foldcc.passes.bucket import Bucket
from foldcc.testing import assert_rewrites


def unchanged(text: str, **options: int) -> None:
    assert_rewrites(Bucket(**options), text, text)


def test_alike_reductions_travel_together() -> None:
    assert_rewrites(
        Bucket(),
        """
        %da = all_reduce(%x : f32[4, 8] P(dp), dp, I)
        %db = all_reduce(%y : f32[2] P(dp), dp, I)
        return [%da, %db]
        """,
        """
        %flat  = aten.reshape(%x, [-1])
        %other = aten.reshape(%y, [-1])
        %rows  : f32[34] P(dp) = aten.cat([%flat, %other])
        %sums  : f32[34] R(dp) = all_reduce(%rows, dp, I)
        %parts = aten.split_with_sizes(%sums, [32, 2])
        %first = getitem(%parts, 0)
        %da    = aten.reshape(%first, [4, 8])
        %last  = getitem(%parts, 1)
        %db    = aten.reshape(%last, [2])
        return [%da, %db]
        joined [[da, db]]
        """,
    )


def test_what_is_a_term_of_another_sum_too_goes_alone() -> None:
    unchanged(
        """
        %da = all_reduce(%x : f32[4, 8] P(dp,tp), dp, I)
        %db = all_reduce(%y : f32[2] P(dp), dp, I)
        return [%da, %db]
        """
    )


def test_reductions_whose_results_are_cast_travel_together_too() -> None:
    assert_rewrites(
        Bucket(),
        """
        %da = aten._to_copy(all_reduce(%x : bf16[4, 8] P(dp), dp, I), dtype=float32)
        %db = aten._to_copy(all_reduce(%y : bf16[2] P(dp), dp, I), dtype=float32)
        return [%da, %db]
        """,
        """
        %flat  = aten.reshape(%x, [-1])
        %other = aten.reshape(%y, [-1])
        %rows  = aten.cat([%flat, %other])
        %sums  = all_reduce(%rows, dp, I)
        %parts = aten.split_with_sizes(%sums, [32, 2])
        %first = getitem(%parts, 0)
        %dx    = aten.reshape(%first, [4, 8])
        %last  = getitem(%parts, 1)
        %dy    = aten.reshape(%last, [2])
        %da    = aten._to_copy(%dx, dtype=float32)
        %db    = aten._to_copy(%dy, dtype=float32)
        return [%da, %db]
        joined [[all_reduce_default, all_reduce_default_1]]
        """,
    )


def test_each_set_of_axes_has_a_bucket_of_its_own() -> None:
    assert_rewrites(
        Bucket(),
        """
        %a = all_reduce(%x : f32[2] P(dp,tp), dp,tp, I)
        %b = all_reduce(%x, dp, I)
        %c = all_reduce(%y : f32[3] P(dp,tp), dp,tp, I)
        %d = all_reduce(%y, dp, I)
        return [%a, %b : f32[2] P(tp), %c, %d : f32[3] P(tp)]
        """,
        """
        %both = all_reduce(aten.cat([aten.reshape(%x, [-1]), aten.reshape(%y, [-1])]), dp,tp, I)
        %ac   = aten.split_with_sizes(%both, [2, 3])
        %a    = aten.reshape(getitem(%ac, 0), [2])
        %c    = aten.reshape(getitem(%ac, 1), [3])
        %one  = all_reduce(aten.cat([aten.reshape(%x, [-1]), aten.reshape(%y, [-1])]), dp, I)
        %bd   = aten.split_with_sizes(%one, [2, 3])
        %b    = aten.reshape(getitem(%bd, 0), [2])
        %d    = aten.reshape(getitem(%bd, 1), [3])
        return [%a, %b, %c, %d]
        joined [[a, c], [b, d]]
        """,
    )


def test_a_gradient_larger_than_the_limit_goes_alone() -> None:
    text = """
        %a = all_reduce(%x : f32[32] P(dp), dp, I)
        %b = all_reduce(%y : f32[31] P(dp), dp, I)
        return [%a, %b]
    """
    unchanged(text, small=4 * 31)
    with pytest.raises(AssertionError, match=r"\+.*split_with_sizes\(.*\[32, 31\]"):
        unchanged(text, small=4 * 32)


@pytest.mark.parametrize(
    ("why", "text"),
    [
        ("other dtypes", "%b = all_reduce(%y : bf16[2] P(dp), dp, I)\nreturn [%a, %b]"),
        ("other axes", "%b = all_reduce(%y : f32[2] P(tp), tp, I)\nreturn [%a, %b]"),
        ("another result", "%b = all_reduce(%y : f32[2] P(dp), dp, R)\nreturn [%a, %b]"),
        ("it is read", "%b = all_reduce(%y : f32[2] P(dp), dp, I)\n%c = aten.neg(%b)\nreturn [%a, %b, %c]"),
        ("alone", "return [%a]"),
    ],
)
def test_what_is_not_alike_goes_alone(why: str, text: str) -> None:
    unchanged(f"%a = all_reduce(%x : f32[2] P(dp), dp, I)\n{text}")


def test_a_negative_limit_is_an_error() -> None:
    with pytest.raises(foldcc.FoldError, match="small=-1"):
        Bucket(small=-1)


def test_what_is_gathered_for_a_block_comes_in_rows_one_for_each_rank() -> None:
    before = """
        unshard0 forward
          %v : f32[4, 16] V(dp) = argument
          %w : f32[8, 8] V(dp)  = argument
          %x : f32[8, 16] R(dp) = all_gather(%v, 0, 1, dp, R)
          %y : f32[8, 16] R(dp) = all_gather(%w, 1, 2, dp, R)
          return [%x, %y]
    """
    after = """
        unshard0 forward
          %v     : f32[4, 16] V(dp) = argument
          %w     : f32[8, 8] V(dp)  = argument
          %flat  = aten.cat([aten.reshape(%v, [-1]), aten.reshape(%w, [-1])])
          %rows  = aten.reshape(all_gather(%flat, 0, 1, dp, R), [2, -1])
          %parts = aten.split_with_sizes(%rows, [64, 64], 1)
          %first = aten.reshape(getitem(%parts, 0), [2, 1, 4, 16])
          %x     : f32[8, 16] R(dp) = aten.reshape(aten.permute(%first, [1, 0, 2, 3]), [8, 16])
          %last  = aten.reshape(getitem(%parts, 1), [2, 8, 2, 4])
          %y     : f32[8, 16] R(dp) = aten.reshape(aten.permute(%last, [1, 2, 0, 3]), [8, 16])
          return [%x, %y]
          joined [[x, y]]
    """
    assert_rewrites(Bucket(), before, after)


def test_a_gather_of_what_was_gathered_is_not_joined_with_the_first_ones() -> None:
    text = """
        unshard0 forward
          %v : f32[4@dp, 8@tp] = argument
          %w : f32[8, 8@tp]     = argument
          %u : f32[8, 8@tp]     = all_gather(%v, 0, 1, dp, R)
          %x : f32[8, 16]       = all_gather(%u, 1, 1, tp, R)
          %y : f32[8, 16]       = all_gather(%w, 1, 1, tp, R)
          return [%x, %y]
    """
    unchanged(text)


def test_parts_of_gradients_are_summed_in_rows_one_for_each_rank() -> None:
    assert_rewrites(
        Bucket(),
        """
        %da : f32[4, 16] V(dp) = reduce_scatter(%x : f32[8, 16] P(dp), 0, 1, dp)
        %db : f32[8, 8] V(dp)  = reduce_scatter(%y : f32[8, 16] P(dp), 1, 2, dp)
        return [%da, %db]
        """,
        """
        %first = aten.reshape(aten.permute(aten.reshape(%x, [1, 2, 4, 16]), [1, 0, 2, 3]), [2, -1])
        %last  = aten.reshape(aten.permute(aten.reshape(%y, [8, 2, 2, 4]), [2, 0, 1, 3]), [2, -1])
        %rows  = aten.cat([%first, %last], 1)
        %sums  = reduce_scatter(aten.reshape(%rows, [-1]), 0, 1, dp)
        %parts = aten.split_with_sizes(%sums, [64, 64])
        %da    = aten.reshape(getitem(%parts, 0), [4, 16])
        %db    = aten.reshape(getitem(%parts, 1), [8, 8])
        return [%da : f32[4, 16] V(dp), %db : f32[8, 8] V(dp)]
        joined [[da, db]]
        """,
    )
