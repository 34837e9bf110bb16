"""Annotate: what is the same in two values has one name, and a dimension that is a product has several."""

from __future__ import annotations

import pytest

from foldcc.passes.annotate import Annotate
from foldcc.testing import assert_rewrites, program


@pytest.mark.parametrize(
    ("factors", "before", "after"),
    [
        (
            "batch=4 seq=6 w1=8 w2=12",
            "%w : f32[12x8] = parameter w\n%y = aten.linear(%x, %w)",
            "%w : f32[w2, w1] = argument\n%y : f32[batch, seq, w2] = aten.linear(%x, %w)",
        ),
        (
            "batch=4 seq=6 w1=8 w2=3 w3=4",
            "%w : f32[12x8] = parameter w\n%h = aten.linear(%x, %w)\n%y = aten.reshape(%h, [4, 6, 3, 4])",
            """%w : f32[(w2 w3), w1] = argument
            %h : f32[batch, seq, (w2 w3)] = aten.linear(%x, %w)
            %y : f32[batch, seq, w2, w3] = aten.reshape(%h, [4, 6, 3, 4])""",
        ),
        (
            "batch=4 seq=6 w1=8",
            "%y = aten.reshape(%x, [24, 8])",
            "%y : f32[(batch seq), w1] = aten.reshape(%x, [24, 8])",
        ),
        (
            "batch=4 seq=6 w1=8",
            "%h = aten.transpose(%x, 0, 1)\n%y = aten.sum(%h, [2], True)",
            "%h : f32[seq, batch, w1] = aten.transpose(%x, 0, 1)\n%y : f32[seq, batch, 1] = aten.sum(%h, [2], True)",
        ),
        (
            "batch=4 seq=6 w1=8",
            "%b : f32[8] = parameter b\n%y = aten.mul(%x, %b)",
            "%b : f32[w1] = argument\n%y : f32[batch, seq, w1] = aten.mul(%x, %b)",
        ),
        (
            "batch=4 seq=6 w1=8 k=2",
            "%two = aten.topk(%x, 2)\n%y = getitem(%two, 1)",
            "%two = aten.topk(%x, 2)\n%y : i64[batch, seq, k] = getitem(%two, 1)",
        ),
    ],
)
def test_a_rule_says_which_dimensions_are_one(factors: str, before: str, after: str) -> None:
    assert_rewrites(
        Annotate(),
        f"%x : f32[4x6x8] = input x\n{before}\nreturn [%y]",
        f"factors {factors}\n%x : f32[batch, seq, w1] = argument\n{after}\nreturn [%y]",
    )


def test_sizes_that_do_not_nest_have_no_factor_in_common() -> None:
    before = "%x : f32[6] = input x\n%a = aten.reshape(%x, [2, 3])\n%b = aten.reshape(%x, [3, 2])\nreturn [%a, %b]"
    after = """
        factors w1=2 w2=3 w3=3 w4=2
        %x : f32[(w1 w2)] = {}
        %a : f32[w1, w2] = aten.reshape(%x, [2, 3])
        %b : f32[w3, w4] = aten.reshape(%x, [3, 2])
        return [%a, %b]
    """
    assert_rewrites(Annotate(), before, after.format("argument"))
    for found in (Annotate().run(program(before, stage="outline")), program(after.format("input x"), stage="annotate")):
        a, b = (n.meta["rule"] for _, n in found.nodes() if n.op == "call_function")
        assert a is not None and b is None


def test_what_the_main_graph_passes_on_is_one_value() -> None:
    text = """
    {factors}
    one
      %x : {x} = argument
      %y : {x} = aten.neg(%x)
      return [%y]
    two
      %a : {x} = argument
      %b : {w} = argument
      %c : {w} = aten.mul(%a, %b)
      return [%c]
    main
      %x : {x} = input x
      %w : {w} = parameter w
      %first = one(%x)
      %y = getitem(%first, 0)
      %second = two(%y, %w)
      %z = getitem(%second, 0)
      return [%z]
    """
    after = text.format(factors="factors batch=4 seq=8", x="f32[batch, 1]", w="f32[batch, seq]")
    assert_rewrites(Annotate(), text.format(factors="", x="f32[4x1]", w="f32[4x8]"), after.replace("seq", "w1"))


@pytest.mark.parametrize(
    ("said", "dims"), [("", "batch, seq, w1"), (" · samples 1", "seq, batch, w1"), (" · samples None", "w1, seq, w2")]
)
def test_samples_are_where_an_input_says(said: str, dims: str) -> None:
    sizes = dict(zip(dims.split(", "), (4, 6, 8), strict=True))
    factors = " ".join(f"{name}={n}" for name, n in sizes.items())
    assert_rewrites(
        Annotate(),
        f"%x : f32[4x6x8] = input x{said}\n%y = aten.neg(%x)\nreturn [%y]",
        f"factors {factors}\n%x : f32[{dims}] = argument\n%y : f32[{dims}] = aten.neg(%x)\nreturn [%y]",
    )
