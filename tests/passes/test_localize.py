"""Localize: a `reshard` is the collectives that it says, shapes are those of one rank, and operators have their local forms."""

from __future__ import annotations

import pytest

from foldcc.passes.localize import Localize
from foldcc.testing import assert_rewrites

FACTORS = "factors batch=4 seq=4 hidden=8 vocab=16\n"


def rewrites(before: str, after: str, mesh: str = "dp=2,tp=2") -> None:
    assert_rewrites(Localize(), FACTORS + before, FACTORS + after, mesh=mesh)


@pytest.mark.parametrize(
    ("old", "new", "moves"),
    [
        ("[batch, seq] I(tp)", "[batch, seq] R(tp)", "retype(%x, tp, I, R)"),
        ("[batch, seq] P(tp)", "[batch, seq] R(tp)", "all_reduce(%x, tp, R)"),
        ("[batch, seq] P(tp)", "[batch, seq] I(tp)", "all_reduce(%x, tp, I)"),
        ("[batch, seq] P(dp,tp)", "[batch, seq] I(dp,tp)", "all_reduce(%x, dp,tp, I)"),
        ("[batch, seq@tp]", "[batch, seq] R(tp)", "all_gather(%x, 1, 1, tp, R)"),
        ("[batch, seq@tp]", "[batch, seq] I(tp)", "all_gather(%x, 1, 1, tp, I)"),
        ("[batch, seq] I(tp)", "[batch, seq@tp]", "shard(%x, 1, 1, tp, I)"),
        ("[batch, seq] R(tp)", "[batch, seq@tp]", "shard(%x, 1, 1, tp, R)"),
        ("[batch, seq] P(tp)", "[batch, seq@tp]", "reduce_scatter(%x, 1, 1, tp)"),
        ("[batch, seq] I(tp)", "[batch, seq] P(tp)", "once(%x, tp, I)"),
        ("[batch, seq] R(tp)", "[batch, seq] P(tp)", "once(%x, tp, R)"),
        ("[batch@tp, seq]", "[batch, seq@tp]", "exchange(%x, tp, [0], [1], [1], [1])"),
        ("[batch@dp, seq@tp]", "[batch, seq@(dp,tp)]", "exchange(%x, dp,tp, [0, 1], [1, 1], [1, 1], [1, 1])"),
    ],
)
def test_a_change_of_layout_is_one_collective(old: str, new: str, moves: str) -> None:
    text = f"%x : f32{old} = argument\n%y : f32{new} = {{}}\nreturn [%y]"
    rewrites(text.format("reshard(%x)"), text.format(moves))


def test_parts_that_differ_are_gathered_as_long_as_the_longest_and_what_filled_them_up_is_cut_off() -> None:
    text = "factors batch=4 odd=7 odd_over_dp=8\n%x : f32[batch, odd@dp+] = argument\n"
    assert_rewrites(
        Localize(),
        f"{text}%y : f32[batch, odd] R(dp) = reshard(%x)\nreturn [%y]",
        f"{text}%g : f32[batch, odd_over_dp] R(dp) = all_gather(%x, 1, 1, dp, R)\n"
        "%y : f32[batch, odd] R(dp) = aten.slice(%g, 1, 0, 7)\nreturn [%y]",
        mesh="dp=4",
    )


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        (
            "[batch@dp, seq@tp]",
            "[batch, seq@dp] I(tp)",
            "%h : f32[batch@dp, seq] I(tp) = all_gather(%x, 1, 1, tp, I)\n"
            "%g : f32[batch, seq] I(dp,tp) = all_gather(%h, 0, 1, dp, I)\n"
            "%y : f32[batch, seq@dp] I(tp) = shard(%g, 1, 1, dp, I)",
        ),
        (
            "[batch@dp, seq@tp]",
            "[batch, seq] I(dp,tp)",
            "%h : f32[batch@dp, seq] I(tp) = all_gather(%x, 1, 1, tp, I)\n%y : f32[batch, seq] = all_gather(%h, 0, 1, dp, I)",
        ),
        (
            "[batch@dp, seq] P(tp)",
            "[batch, seq@tp] I(dp)",
            "%h : f32[batch, seq] P(tp) = all_gather(%x, 0, 1, dp, I)\n%y : f32[batch, seq@tp] = reduce_scatter(%h, 1, 1, tp)",
        ),
        (
            "[(batch seq)@(dp,tp)]",
            "[(batch seq)@dp] I(tp)",
            "%y : f32[(batch seq)@dp] I(tp) = all_gather(%x, 0, 1, tp, I)",
        ),
    ],
)
def test_what_takes_several_is_made_whole_before_it_is_divided(old: str, new: str, lines: str) -> None:
    rewrites(
        f"%x : f32{old} = argument\n%y : f32{new} = reshard(%x)\nreturn [%y]", f"%x : f32{old} = argument\n{lines}\nreturn [%y]"
    )


def test_without_a_gradient_nothing_is_retyped() -> None:
    rewrites(
        "%x : f32[batch] = input x\n%r : f32[batch] R(tp) = reshard(%x)\n%y : f32[batch] R(tp) = aten.neg(%r)\nreturn [%y]",
        "%x : f32[batch] R(tp) = argument\n%y : f32[batch] R(tp) = aten.neg(%x)\nreturn [%y]",
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("%y : f32[(batch@dp seq)] = aten.reshape(%x, [16])", "%y : f32[(batch@dp seq)] = aten.reshape(%x, [8])"),
        ("%y : f32[batch@dp, seq] = aten.expand(%x, [4, 4])", "%y : f32[batch@dp, seq] = aten.expand(%x, [2, 4])"),
        ("%y : f32[batch@dp] = aten.mean(%x, [1])", "%y : f32[batch@dp] = aten.mean(%x, [1])"),
        (
            "%y : f32[seq] P(dp) = aten.mean(%x, [0])",
            "%sum_1 : f32[seq] P(dp) = aten.sum(%x, [0], False)\n%y : f32[seq] P(dp) = aten.div(%sum_1, 4)",
        ),
        (
            "%y : f32[] P(dp) = aten.mean(%x)",
            "%sum_1 : f32[] P(dp) = aten.sum(%x)\n%y : f32[] P(dp) = aten.div(%sum_1, 16)",
        ),
        (
            "%z : f32[batch@dp, seq@tp] = reshard(%x)\n%y : f32[] P(dp,tp) = aten.mean(%z)",
            "%z : f32[batch@dp, seq@tp] = shard(%x, 1, 1, tp, I)\n%sum_1 : f32[] P(dp,tp) = aten.sum(%z)\n"
            "%y : f32[] P(dp,tp) = aten.div(%sum_1, 16)",
        ),
    ],
)
def test_shapes_and_counts_are_those_of_a_rank(before: str, after: str) -> None:
    text = "%x : f32[batch@dp, seq] = argument\n{}\nreturn [%y]"
    rewrites(text.format(before), text.format(after))


@pytest.mark.parametrize(
    ("before", "after"),
    [("0, 4", "0, 2, 1"), ("4, 8", "2, 4, 1"), ("-4, 9223372036854775807", "2, 4, 1"), ("0, -4", "0, 2, 1")],
)
def test_a_slice_of_what_is_divided_is_as_much_smaller(before: str, after: str) -> None:
    text = """
    factors batch=4 two=2 half=4
    %x : f32[batch, (two half@tp)] = argument
    %y : f32[batch, half@tp] = aten.slice(%x, 1, {})
    return [%y]
    """
    assert_rewrites(Localize(), text.format(before), text.format(after), mesh="tp=2")


def test_rows_that_a_rank_has_not_are_zero() -> None:
    rewrites(
        """
        %w : f32[vocab@tp, hidden] = parameter w
        %ids : i64[batch, seq] = argument
        %y : f32[batch, seq, hidden] P(tp) = aten.embedding(%w, %ids)
        return [%y]
        """,
        """
        %place : i64[] V(tp)           = axis_index(tp, cpu)
        %first : i64[] V(tp)           = aten.mul(%place, 8)
        %mine  : i64[batch, seq]       = aten.sub(%ids, %first)
        %above : bool[batch, seq]      = aten.ge(%mine, 0)
        %below : bool[batch, seq]      = aten.lt(%mine, 8)
        %here  : bool[batch, seq]      = aten.logical_and(%above, %below)
        %held  : i64[batch, seq]       = aten.clamp(%ids, 0, 15)
        %known : bool[batch, seq]      = aten.eq(%held, %ids)
        %own   : i64[batch, seq]       = aten.mul(%mine, %here)
        %safe  : i64[batch, seq]       = aten.where(%known, %own, %ids)
        %rows  : f32[batch, seq, hidden] P(tp) = aten.embedding(%w, %safe)
        %mask  : bool[batch, seq, 1]   = aten.unsqueeze(%here, -1)
        %y     : f32[batch, seq, hidden] P(tp) = aten.mul(%rows, %mask)
        return [%y]
        """,
        mesh="tp=2",
    )


def test_crossing_the_fold_moves_nothing() -> None:
    text = """
        factors batch=4 seq=4 hidden=8 tokens=16
        %x : f32[(batch@dp seq@tp), hidden] = argument
        %y : f32[tokens@(ep,etp), hidden] = cross_fold(%x)
        %z : f32[(batch@dp seq@tp), hidden] = cross_fold(%y)
        return [%z]
    """
    assert_rewrites(Localize(), text, text, mesh="dp=2,tp=2|ep=2,etp=2")
