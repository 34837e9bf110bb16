"""Simplify: what automatic differentiation writes in a roundabout way is written plainly, and the rest is left."""

from __future__ import annotations

import pytest

from foldcc.passes.simplify import Simplify
from foldcc.testing import assert_rewrites

X, ROW = "%x : f32[4, 8@tp]", "%row : f32[4, 1]"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("%y = aten.neg(aten.pow(%x, 1))", "%y = aten.neg(%x)"),
        ("%y = aten.neg(aten.pow(%x, 1.0))", "%y = aten.neg(%x)"),
        ("%y = aten.neg(aten.t(aten.t(%x)))", "%y = aten.neg(%x)"),
        ("%y = aten.div.Scalar(aten.expand(%row, [4, 8]), 8)", "%y = aten.expand(aten.div.Scalar(%row, 8), [4, 8])"),
        ("%y = aten.mul.Scalar(aten.expand(%row, [4, 8]), 2)", "%y = aten.expand(aten.mul.Scalar(%row, 2), [4, 8])"),
        (
            "%y = aten.neg(aten.mul.Scalar(aten.div.Scalar(aten.expand(%row, [4, 8]), 8), 2))",
            "%y = aten.neg(aten.expand(aten.mul.Scalar(aten.div.Scalar(%row, 8), 2), [4, 8]))",
        ),
        *((f"%y = aten.{f}(aten.expand(%row, [4, 8]), %x)", f"%y = aten.{f}(%row, %x)") for f in ("add", "sub", "mul", "div")),
        ("%y = aten.mul(%x, aten.expand(%row, [4, 8]))", "%y = aten.mul(%x, %row)"),
    ],
)
def test_detours_are_left_out(before: str, after: str) -> None:
    text = f"{X} = argument\n{ROW} = argument\n{{}}\nreturn [%y]"
    assert_rewrites(Simplify(), text.format(before), text.format(after))


@pytest.mark.parametrize(
    "kept",
    [
        "%y = aten.pow(%x, 2)",
        "%y = aten.t(%x)",
        "%y = aten.mul(aten.expand(%row, [4, 8]), aten.sum(%x, [1], True))",  # which is not of the shape of what is expanded
        "%y = aten.mul(aten.expand(%row, [4, 8]), 2)",
        "%y = aten.sigmoid(aten.expand(%row, [4, 8]))",
        "%y = aten.maximum(aten.expand(%row, [4, 8]), %x)",
    ],
)
def test_what_is_no_detour_stays(kept: str) -> None:
    text = f"{X} = argument\n{ROW} = argument\n{kept}\nreturn [%y]"
    assert_rewrites(Simplify(), text, text)


SILU = """
    %s     = aten.sigmoid(%x : f32[4, 8@tp])
    %ones  = aten.fill(aten.empty_like(%s, memory_format=preserve_format), 1)
    %slope = aten.add.Scalar(aten.mul(%x, aten.sub(%ones, %s)), 1)
    %y     = aten.mul(%grad : f32[4, 8@tp], aten.mul(%s, %slope))
    return [%y]
"""


def test_the_gradient_of_silu_is_one_operator_again() -> None:
    assert_rewrites(Simplify(), SILU, "%y : f32[4, 8@tp] = aten.silu_backward(%grad, %x)\nreturn [%y]")


@pytest.mark.parametrize(("old", "new"), [("%s)), 1)", "%s)), 2)"), ("sub(%ones, %s)", "sub(%s, %ones)")])
def test_what_only_looks_like_it_stays(old: str, new: str) -> None:
    assert old in SILU
    text = SILU.replace(old, new)
    assert_rewrites(Simplify(), text, text)


def test_the_forward_pass_stays_as_it_is() -> None:
    text = """
    block0 forward
      %x : f32[4, 8] = argument
      %y = aten.pow(%x, 1)
      return [[%y], [%x]]
    block0 backward
      %x : f32[4, 8] = argument
      %dy : f32[4, 8] = gradient of result 0
      %dx = aten.mul(%dy, aten.pow(%x, 1))
      return [%dx]
    """
    assert_rewrites(Simplify(), text, text.replace("aten.mul(%dy, aten.pow(%x, 1))", "aten.mul(%dy, %x)"))
