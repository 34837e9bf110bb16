"""Differentiate: a block returns its gradients beside its results, and each collective's transpose is there by itself."""

from __future__ import annotations

import pytest

from foldcc.errors import FoldError
from foldcc.passes.differentiate import Differentiate
from foldcc.testing import assert_rewrites, program

FACTORS = "factors batch=4 seq=4 hidden=8 width=16\n"


def rewrites(before: str, after: str, mesh: str = "dp=2,tp=2") -> None:
    assert_rewrites(Differentiate(), FACTORS + before, FACTORS + after, mesh=mesh)


@pytest.mark.parametrize(
    ("old", "new", "forward", "transposed"),
    [
        ("[batch] I(dp)", "[batch] R(dp)", "retype(%x, dp, I, R)", "all_reduce(%d, dp, I)"),
        ("[batch] P(tp)", "[batch] R(tp)", "all_reduce(%x, tp, R)", "all_reduce(%d, tp, R)"),
        ("[batch] P(tp)", "[batch] I(tp)", "all_reduce(%x, tp, I)", "retype(%d, tp, I, R)"),
        ("[batch@tp]", "[batch] R(tp)", "all_gather(%x, 0, 1, tp, R)", "reduce_scatter(%d, 0, 1, tp)"),
        ("[batch] P(tp)", "[batch@tp]", "reduce_scatter(%x, 0, 1, tp)", "all_gather(%d, 0, 1, tp, R)"),
        ("[batch@tp]", "[batch] I(tp)", "all_gather(%x, 0, 1, tp, I)", "shard(%d, 0, 1, tp, I)"),
        ("[batch] I(tp)", "[batch@tp]", "shard(%x, 0, 1, tp, I)", "all_gather(%d, 0, 1, tp, I)"),
    ],
)
def test_a_collective_brings_its_transpose(old: str, new: str, forward: str, transposed: str) -> None:
    swapped = new.replace("P(", "r(").replace("R(", "P(").replace("r(", "R(")
    rewrites(
        f"%x : f32{old} = argument\n%y : f32{new} = {forward}\nreturn [%y]",
        f"""
        %x : f32{old} = argument
        %d : f32{swapped} = gradient of result 0
        %y = {forward}
        %same = aten.clone(%y)
        %dx = {transposed}
        return [[%y], [%dx]]
        """,
    )


def test_a_parameter_that_is_used_as_r_has_its_gradient_summed() -> None:
    rewrites(
        """
        %x : f32[batch@dp, hidden] = argument
        %w : f32[width, hidden] I(dp) = parameter w
        %u : f32[width, hidden] R(dp) = retype(%w, dp, I, R)
        %y : f32[batch@dp, width] = aten.linear(%x, %u)
        return [%y]
        """,
        """
        %x : f32[batch@dp, hidden] = argument
        %w : f32[width, hidden] I(dp) = argument
        %d : f32[batch@dp, width] = gradient of result 0
        %u = retype(%w, dp, I, R)
        %t = aten.t(%u)
        %y = aten.mm(%x, %t)
        %same = aten.clone(%y)
        %dt = aten.t(%d)
        %term = aten.mm(%dt, %x)
        %tt = aten.t(%term)
        %back = aten.t(%t)
        %dx = aten.mm(%d, %back)
        %ttt = aten.t(%tt)
        %dw = all_reduce(%ttt, dp, I)
        return [[%y], [%dx, %dw]]
        """,
    )


def test_views_do_not_ask_for_strides() -> None:
    rewrites(
        "%x : f32[batch, hidden] = argument\n%y : f32[(batch hidden)] = aten.reshape(%x, [32])\nreturn [%y]",
        """
        %x : f32[batch, hidden] = argument
        %d : f32[(batch hidden)] = gradient of result 0
        %y = aten.reshape(%x, [32])
        %same = aten.clone(%y)
        %dx = aten.reshape(%d, [4, 8])
        return [[%y], [%dx]]
        """,
    )


def test_what_has_no_gradient_is_given_none() -> None:
    rewrites(
        """
        %x : f32[batch] = argument
        %n : f32[batch] = input n
        %y : f32[batch] = aten.mul(%x, %n)
        %z : f32[batch] = aten.neg(%n)
        return [%z, %y]
        """,
        """
        %x : f32[batch] = argument
        %n : f32[batch] = argument
        %d : f32[batch] = gradient of result 1
        %y = aten.mul(%x, %n)
        %z = aten.neg(%n)
        %one = aten.clone(%z)
        %two = aten.clone(%y)
        %dx = aten.mul(%d, %n)
        return [[%z, %y], [%dx, None]]
        """,
    )


def test_without_gradients_there_is_the_forward_pass_alone() -> None:
    rewrites(
        "%n : f32[batch] = input n\n%z : f32[batch] = aten.neg(%n)\nreturn [%z]",
        "%n : f32[batch] = argument\n%z = aten.neg(%n)\n%same = aten.clone(%z)\nreturn [[%z], [None]]",
    )


def test_an_operator_with_an_effect_is_refused() -> None:
    text = "factors n=4\n%x : f32[n, n] = argument\n%y : f32[n, n] = aten.linalg_inv(%x)\nreturn [%y]"
    with pytest.raises(FoldError, match="has an effect besides its result.*\n  valid   an operator without one"):
        Differentiate().run(program(text, stage="localize", mesh="dp=1"))


def test_a_loss_that_one_kernel_computes_in_pieces_is_traced_in_pieces() -> None:
    text = """
    factors rows=4 vocab=8
    %x : f32[rows, vocab] = argument
    %ids : i64[rows] = input ids
    %y : f32[rows] = local_token_loss(%x, %ids, -100)
    return [%y]
    """
    before = program(text, stage="localize", mesh="dp=1")
    whole, pieces = ({str(n.target) for _, n in Differentiate(in_pieces=p).run(before).nodes()} for p in (False, True))
    assert whole != pieces and not any("_log_softmax" in t for t in pieces)
