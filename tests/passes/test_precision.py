"""Precision: products in the dtype that the plan says, what loses digits in float32, and all else in what it is given."""

from __future__ import annotations

from foldcc.passes.precision import PrecisionPass
from foldcc.testing import assert_rewrites, program

POLICY = "precision compute=bfloat16 reduce=float32 router=float32\n"


def rewrites(before: str, after: str, policy: str = POLICY) -> None:
    assert_rewrites(PrecisionPass(), policy + before, policy + after)


def test_a_product_reads_casts_and_a_sum_of_both_kinds_is_wide() -> None:
    entering = """
        %w : f32[8x8] = parameter w
        %x : f32[4x8] = input x
    """
    rewrites(
        f"""{entering}
        %y = aten.linear(%x, %w)
        %z = aten.silu(%y)
        %r = aten.add(%x, %z)
        return [%r]
        """,
        f"""{entering}
        %a : bf16[4x8] = aten._to_copy(%x, dtype=bfloat16)
        %b : bf16[8x8] = aten._to_copy(%w, dtype=bfloat16)
        %y : bf16[4x8] = aten.linear(%a, %b)
        %z : bf16[4x8] = aten.silu(%y)
        %r : f32[4x8]  = aten.add(%x, %z)
        return [%r]
        """,
    )


def test_what_is_computed_is_cast_once_and_a_parameter_before_each_reader() -> None:
    entering = """
        %w : f32[8x8] = parameter w
        %x : f32[4x8] = input x
        %h = aten.exp(%x)
    """
    rewrites(
        f"""{entering}
        %y = aten.linear(%h, %w)
        %z = aten.linear(%h, %w)
        return [%y, %z]
        """,
        f"""{entering}
        %a = aten._to_copy(%h, dtype=bfloat16)
        %b = aten._to_copy(%w, dtype=bfloat16)
        %y = aten.linear(%a, %b)
        %c = aten._to_copy(%w, dtype=bfloat16)
        %z = aten.linear(%a, %c)
        return [%y, %z]
        """,
    )


def test_powers_sums_and_losses_are_computed_in_float32() -> None:
    entering = """
        %w : bf16[8x8] = parameter w
        %x : bf16[4x8] = input x
        %l : i64[4] = input l
        %y = aten.linear(%x, %w)
    """
    rewrites(
        f"""{entering}
        %p = aten.pow(%y, 2)
        %m = aten.mean(%p, [-1], True)
        %e = token_loss(%y, %l, -100)
        return [%m, %e]
        """,
        f"""{entering}
        %a : f32[4x8] = aten._to_copy(%y, dtype=float32)
        %p : f32[4x8] = aten.pow(%a, 2)
        %m : f32[4x1] = aten.mean(%p, [-1], True)
        %e : f32[4] = token_loss(%a, %l, -100)
        return [%m, %e]
        """,
    )


def test_a_number_that_16_bits_do_not_hold_is_filled_into_float32() -> None:
    entering = """
        %w : f32[8x8] = parameter w
        %x : f32[4x8] = input x
        %m : bool[4x8] = input m
    """
    product = """
        %a = aten._to_copy(%x, dtype=float16)
        %b = aten._to_copy(%w, dtype=float16)
        %y : f16[4x8] = aten.mm(%a, %b)
    """
    policy = POLICY.replace("bfloat16", "float16")
    least, fits = "-3.4028234663852886e+38", "-60000.0"
    filled = "%z = aten.masked_fill(%y, %m, {})\nreturn [%z]"
    wide = f"%c : f32[4x8] = aten._to_copy(%y, dtype=float32)\n{filled.replace('%y', '%c')}"
    rewrites(f"{entering}%y = aten.mm(%x, %w)\n{filled.format(least)}", f"{entering}{product}{wide.format(least)}", policy)
    rewrites(f"{entering}%y = aten.mm(%x, %w)\n{filled.format(fits)}", f"{entering}{product}{filled.format(fits)}", policy)


def test_what_was_widened_is_read_as_it_was() -> None:
    entering = """
        %w : bf16[8x8] = parameter w
        %x : bf16[4x8] = input x
        %h : f32[4x8] = aten._to_copy(%x, dtype=float32)
    """
    rewrites(f"{entering}%y = aten.mm(%h, %w)\nreturn [%y, %h]", f"{entering}%y = aten.mm(%x, %w)\nreturn [%y, %h]")


def test_products_of_positions_and_frequencies_stay_as_they_are() -> None:
    text = """
        %f : f32[4x1] = buffer f
        %p : i64[8] = input p
        %g : f32[8] = aten._to_copy(%p, dtype=float32)
        %q = aten.reshape(%g, [1, 8])
        %a = aten.mm(%f, %q)
        return [%a]
    """
    rewrites(text, text)


def test_operands_that_must_agree_are_as_wide_as_the_widest() -> None:
    entering = """
        %w : f32[8x8] = parameter w
        %x : bf16[4x8] = input x
        %i : i64[4] = input i
    """
    rewrites(
        f"""{entering}
        %c = aten.cat([%w, %w])
        %y = aten.index_add(%w, 0, %i, %x)
        return [%c, %y]
        """,
        f"""{entering}
        %c = aten.cat([%w, %w])
        %a : f32[4x8] = aten._to_copy(%x, dtype=float32)
        %y = aten.index_add(%w, 0, %i, %a)
        return [%c, %y]
        """,
    )


ROUTED = """
    %g : f32[4x8] = parameter g
    %u : f32[4x6x8] = parameter u
    %d : f32[4x8x6] = parameter d
    %q : f32[8x8] = buffer q
    %x : f32[16x8] = input x
"""


def test_a_router_is_computed_in_a_dtype_of_its_own_and_experts_in_that_of_products() -> None:
    routing = """
        %p = aten.softmax(%l, -1)
        %top = aten.topk(%p, 2)
        %t = getitem(%top, 0)
        %i = getitem(%top, 1)
    """
    before = f"""{ROUTED}
        %l = aten.linear(%x, %g)
        {routing}
        %y = experts(%x, %i, %t, %u, %d, None, None, identity, False, False)
        %z = aten.add(%x, %y)
        %r = aten.mm(%y, %q)
        return [%z, %r]
    """
    narrow = """
        %a = aten._to_copy(%x, dtype=bfloat16)
        %b = aten._to_copy(%u, dtype=bfloat16)
        %c = aten._to_copy(%d, dtype=bfloat16)
        %y : bf16[16x8] = experts(%a, %i, %t, %b, %c, None, None, identity, False, False)
        %w : f32[16x8] = aten._to_copy(%y, dtype=float32)
        %z = aten.add(%x, %w)
        %e = aten._to_copy(%q, dtype=bfloat16)
        %r : bf16[16x8] = aten.mm(%y, %e)
        return [%z, %r]
    """
    rewrites(before, f"{ROUTED}%l = aten.linear(%x, %g){routing}{narrow}")
    alike = f"""{ROUTED}
        %v = aten._to_copy(%x, dtype=bfloat16)
        %k = aten._to_copy(%g, dtype=bfloat16)
        %m = aten.linear(%v, %k)
        %l = aten._to_copy(%m, dtype=float32)
        {routing}{narrow}
    """
    rewrites(before, alike, POLICY.replace("router=float32", "router=bfloat16"))


def test_without_a_precision_nothing_changes() -> None:
    text = f"{ROUTED}%l : f32[16x4] = aten.linear(%x, %g)\nreturn [%l]"
    assert_rewrites(PrecisionPass(), text, text)
    assert program(POLICY + text, stage="capture").plan.precision is not None
