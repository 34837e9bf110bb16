"""Recompute: the fewest bytes that suffice are kept, and no kernel's work but that of pointwise ones is done twice."""

from __future__ import annotations

import pytest

from foldcc.passes.recompute import Recompute
from foldcc.testing import assert_rewrites


def kept(text: str, names: str) -> None:
    assert_rewrites(Recompute(), text, f"{text}\nkeep [{names}]")


def test_a_product_is_kept_and_what_is_pointwise_is_computed_again() -> None:
    kept(
        """
        %x  : f32[8, 4] = argument
        %w  : f32[4, 6] = parameter w
        %dy : f32[8, 6] = gradient of result 0
        %h  = aten.mm(%x, %w)
        %s  = aten.sigmoid(%h)
        %y  = aten.mul(%h, %s)
        %dh = aten.mul(aten.mul(%dy, %s), %h)
        %dx = aten.mm(%dh, aten.t(%w))
        %dw = aten.mm(aten.t(%x), %dh)
        return [[%y], [%dx, %dw]]
        """,
        "%x, %w, %h",
    )


NORM = """
    %x  : bf16[8, 16] = argument
    %dy : bf16[8, 16] = gradient of result 0
    %wide   = aten._to_copy(%x, dtype=float32)
    %square = aten.mul(%wide, %wide)
    %total  = aten.sum(%square, [-1], True)
    %scale  = aten.rsqrt(%total)
    %normal = aten.mul(%wide, %scale)
    %y      = aten._to_copy(%normal, dtype=bfloat16)
    %dwide  = aten.mul(aten._to_copy(%dy, dtype=float32), %scale)
    %term   = aten.mul(%dwide, %normal)
    {reads}
    %dx     = aten._to_copy(%term, dtype=bfloat16)
    return [[%y], [%dx]]
"""


def test_narrow_values_are_kept_for_wide_ones_and_sums_are_not_taken_twice() -> None:
    kept(NORM.format(reads=""), "%x, %scale")


def test_what_a_product_reads_is_kept_as_it_is() -> None:
    text = NORM.format(reads="%other = aten.mm(aten.t(%normal), %dwide)\n%more = aten.add(%term, aten.sum(%other))")
    kept(text.replace("_to_copy(%term", "_to_copy(%more"), "%scale, %normal")


@pytest.mark.parametrize(("of", "name"), [("sin", "%h"), ("cos", "%h"), ("exp", "%x")])
def test_what_is_slow_is_not_computed_again(of: str, name: str) -> None:
    kept(
        f"""
        %x  : bf16[8] = argument
        %dy : f32[8] = gradient of result 0
        %h  = aten.{of}(aten._to_copy(%x, dtype=float32))
        %y  = aten.neg(%h)
        %z  = aten.mul(%dy, %h)
        %dx = aten._to_copy(%z, dtype=bfloat16)
        return [[%y], [%dx]]
        """,
        name,
    )


def test_views_are_taken_again_of_what_they_show() -> None:
    kept(
        """
        %x  : f32[8, 4] = argument
        %dy : f32[4, 8] = gradient of result 0
        %h  = aten.mm(%x, aten.t(%x))
        %v  = aten.t(aten.slice(%h, 1, 0, 4))
        %y  = aten.neg(%v)
        %dx = aten.t(aten.mul(%dy, %v))
        return [[%y], [%dx]]
        """,
        "%h",
    )


@pytest.mark.parametrize(("kind", "names"), [("parameter w", "%w"), ("argument", "%h")])
def test_a_parameter_is_there_anyway(kind: str, names: str) -> None:
    kept(
        f"""
        %x  : f32[8] = argument
        %w  : f32[8] = {kind}
        %dy : f32[8] = gradient of result 0
        %h  = aten.exp(%w)
        %y  = aten.mul(%x, %h)
        %dx = aten.mul(%dy, %h)
        return [[%y], [%dx, None]]
        """,
        names,
    )


def test_results_are_there_anyway() -> None:
    kept(
        """
        %x  : f32[8] = argument
        %dy : f32[8] = gradient of result 0
        %h  = aten.exp(%x)
        %y  = aten.neg(%h)
        %dx = aten.mul(%dy, %y)
        return [[%y], [%dx]]
        """,
        "%y",
    )


def test_what_reads_nothing_keeps_nothing() -> None:
    arguments = "%x : f32[8] = argument\n%dy : f32[8] = gradient of result 0"
    kept(f"{arguments}\n%y = aten.neg(%x)\n%dx = aten.neg(%dy)\nreturn [[%y], [%dx]]", "")


def test_a_mask_is_drawn_again() -> None:
    text = """
        %x   : f32[64, 64] = argument
        %key : i64[] = argument
        %dy  : f32[64, 64] = gradient of result 0
        %rows = aten.arange(64, device=cpu)
        %bits = random_bits(%key, [%rows, %rows])
        %mask = aten.lt(%bits, 8388608)
        %y  = aten.mul(%x, %mask)
        %dx = aten.mul(%dy, %mask)
        return [[%y], [%dx, None]]
        """
    assert_rewrites(Recompute(policy="blocks"), text, f"{text}\nkeep [%key, %rows]")
    assert_rewrites(Recompute(policy="selective"), text, f"{text}\nkeep [%mask]")
