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
