"""Lower: what only says something about types goes, in both directions."""

from __future__ import annotations

import pytest

from foldcc.passes.lower import Lower
from foldcc.testing import assert_rewrites


@pytest.mark.parametrize("silent", ["retype(%x, dp, I, R)", "aten.detach(%x)", "aten.alias(%x)", "aten.detach(aten.alias(%x))"])
def test_what_is_silent_becomes_what_it_reads(silent: str) -> None:
    assert_rewrites(
        Lower(),
        f"%x : f32[8] = argument\n%y = aten.neg({silent})\nreturn [%y]",
        "%x : f32[8] = argument\n%y = aten.neg(%x)\nreturn [%y]",
    )


def test_what_is_returned_is_what_was_read() -> None:
    assert_rewrites(
        Lower(),
        """
        block0 forward
          %w : f32[8] I(dp) = argument
          %used = retype(%w, dp, I, R)
          %y : f32[8] R(dp) = aten.neg(%used)
          return [[%y], [%used]]
        block0 backward
          %used : f32[8] = argument
          %dy : f32[8] P(dp) = gradient of result 0
          %term = aten.mul(%dy, aten.detach(%used))
          %dw = all_reduce(%term, dp, I)
          return [%dw]
        """,
        """
        block0 forward
          %w : f32[8] I(dp) = argument
          %y : f32[8] R(dp) = aten.neg(%w)
          return [[%y], [%w]]
        block0 backward
          %used : f32[8] = argument
          %dy : f32[8] P(dp) = gradient of result 0
          %term = aten.mul(%dy, %used)
          %dw = all_reduce(%term, dp, I)
          return [%dw]
        """,
    )


@pytest.mark.parametrize("kept", ["all_reduce(%x, dp, I)", "once(%y, tp, I)", "aten.clone(%y)"])
def test_what_moves_or_copies_stays(kept: str) -> None:
    text = f"%x : f32[8] P(dp) = argument\n%y : f32[8] = argument\n%z = {kept}\nreturn [%z]"
    assert_rewrites(Lower(), text, text)
