"""Experts: weights are multiplied late, and the rows of an expert are summed in order."""

from __future__ import annotations

import pytest

from foldcc.passes.experts import Experts
from foldcc.testing import assert_rewrites

ARGUMENTS = """
    %a       : f32[8, 6] = argument
    %w       : f32[2, 5, 6] = argument
    %counts  : i64[2] = argument
    %order   : i64[8] = argument
    %weights : f32[4, 2] = argument
    %dy      : f32[4, 5] = gradient of result 0
    %rows    = grouped_linear(%a, %w, %counts, False)
    %y       = unpermute(%rows, %order, %weights)
"""
BACKWARD = """
    %ds      = unpermute_weights(%dy, %rows, %order, %weights)
    %each    = permute(%dy, %order, 2)
    %column  = aten.unsqueeze(aten.index(aten.reshape(%weights, [-1]), [%order]), 1)
    %scaled  = aten.mul(%each, %column)
    %da      = grouped_linear(%scaled, %w, %counts, True)
    %dw      = grouped_outer(%a, %scaled, %counts, False)
    return [[%y], [%da, %dw, None, None, %ds]]
"""
LATE = """
    %scale   = aten.unsqueeze(aten.index(aten.reshape(%weights, [-1]), [%order]), 1)
    %plain   = permute(%dy, %order, 2)
    %d       = grouped_linear(%plain, %w, %counts, True)
    %dots    = aten.sum(aten.mul(%d, %a), [1], True)
    %ds      = aten.reshape(gather_rows(%dots, %order, 1), [4, 2])
    %da      = aten.mul(%d, %scale)
    %left    = aten.mul(%a, %scale)
    %dw      = grouped_outer(%left, %plain, %counts, False)
    return [[%y], [%da, %dw, None, None, %ds]]
"""


def test_weights_are_multiplied_after_the_product() -> None:
    assert_rewrites(Experts(), ARGUMENTS + BACKWARD, ARGUMENTS + LATE)


def test_a_bias_is_in_the_dot_products_too() -> None:
    def biased(text: str) -> str:
        for old, new in (
            ("%order   :", "%bias    : f32[8, 5] = argument\n%order   :"),
            ("%rows    = grouped", "%product = grouped"),
            ("%y       =", "%rows    = aten.add(%product, %bias)\n%y ="),
            (
                "%ds      = aten.reshape(",
                "%both = aten.add(%dots, aten.sum(aten.mul(%plain, %bias), [1], True))\n%ds = aten.reshape(",
            ),
            ("gather_rows(%dots", "gather_rows(%both"),
            ("None, None,", "None, None, None,"),
        ):
            text = text.replace(old, new)
        return text

    assert_rewrites(Experts(), biased(ARGUMENTS + BACKWARD), biased(ARGUMENTS + LATE))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "= grouped_linear(%a, %w, %counts, False)",
            "= aten.mm(%a, aten.select(aten.transpose(%w, 1, 2), 0, 0))",
        ),  # no product of experts
        ("%da      = grouped_linear(%scaled", "%da      = grouped_linear(aten.neg(%scaled)"),  # something reads it in between
        (
            "aten.unsqueeze(aten.index(aten.reshape(%weights, [-1])",
            "aten.unsqueeze(aten.index(aten.exp(aten.reshape(%weights, [-1]))",
        ),
    ],
)
def test_what_is_not_the_gradient_of_weighted_rows_stays(old: str, new: str) -> None:
    text = ARGUMENTS + BACKWARD
    assert old in text
    text = text.replace(old, new)
    assert_rewrites(Experts(), text, text)


BIAS = """
    %dy     : f32[8, 5] = gradient of result 0
    %x      : f32[8, 5] = argument
    %bias   : f32[2, 5] = argument
    %counts : i64[2] = argument
    %which  = expert_of_row(%x, %counts)
    %y      = aten.add(%x, aten.index_select(%bias, 0, %which))
"""


def test_the_gradient_of_a_bias_is_summed_in_order() -> None:
    assert_rewrites(
        Experts(),
        f"{BIAS} %db = aten.index_add(aten.new_zeros(%dy, [2, 5]), 0, %which, %dy)\n return [[%y], [%dy, %db, None]]",
        f"""{BIAS}
        %ones = aten.ones_like(aten.slice(%dy, 1, 0, 1))
        %db   = aten.reshape(grouped_outer(%ones, %dy, %counts, True), [2, 5])
        return [[%y], [%dy, %db, None]]
        """,
    )


@pytest.mark.parametrize("other", ["aten.new_zeros(%dy, [8, 5]), 0, %index, %dy", "aten.neg(%bias), 0, %which, %dy"])
def test_another_sum_by_index_stays(other: str) -> None:
    more = BIAS.replace("%counts :", "%index  : i64[8] = argument\n    %counts :")
    shape = "None" if "8, 5" in other else "%db"
    text = (
        f"{more} %db = aten.index_add({other})\n %dx = aten.add(%dy, aten.sum(%db))\n return [[%y], [%dx, {shape}, None, None]]"
    )
    assert_rewrites(Experts(), text, text)


def test_a_sum_by_columns_stays() -> None:
    text = BIAS.replace("[8, 5]", "[8, 8]").replace("[2, 5]", "[2, 8]")
    text += " %sums = aten.index_add(aten.new_zeros(%dy, [8, 8]), 1, %which, %dy)\n return [[%y], [%sums, None, None]]"
    assert_rewrites(Experts(), text, text)
