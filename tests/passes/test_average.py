"""Average: sums over samples add up over micro-batches, and of everything else each adds its share."""

from __future__ import annotations

import pytest

from foldcc.errors import FoldError
from foldcc.passes.average import Average
from foldcc.testing import assert_rewrites

ENTERING = """
    factors batch=4 hidden=8
    %x : f32[batch, hidden] = input x · samples 0
    %w : f32[hidden] = parameter w
    %m : f32[] = aten.mean(%x)
    %s : f32[] = aten.sum(%x)
"""


def rewrites(before: str, after: str) -> None:
    assert_rewrites(Average(micro_batches=4), ENTERING + before, ENTERING + after)


def test_a_mean_is_shared_and_a_sum_is_not() -> None:
    rewrites(
        "return [%m, %s]",
        """
        %a : f32[] = share(%m)
        return [%a, %s]
        """,
    )


def test_a_mean_beside_a_sum_is_shared_where_they_meet() -> None:
    rewrites(
        """
        %r : f32[] = aten.sub(%s, %m)
        return [%r, %m]
        """,
        """
        %a : f32[] = share(%m)
        %r : f32[] = aten.sub(%s, %a)
        %b : f32[] = share(%m)
        return [%r, %b]
        """,
    )


def test_what_is_the_same_in_all_micro_batches_is_shared_as_a_term_and_not_as_a_factor() -> None:
    rewrites(
        """
        %n : f32[] = aten.sum(%w)
        %p : f32[] = aten.mul(%s, %n)
        %r : f32[] = aten.add(%p, %n)
        return [%r]
        """,
        """
        %n : f32[] = aten.sum(%w)
        %p : f32[] = aten.mul(%s, %n)
        %a : f32[] = share(%n)
        %r : f32[] = aten.add(%p, %a)
        return [%r]
        """,
    )


def test_what_has_samples_and_what_is_computed_of_means_is_each_micro_batchs_own() -> None:
    rewrites(
        """
        %y : f32[batch, hidden] = aten.mul(%x, %m)
        %q : f32[] = aten.mul(%m, %m)
        return [%y, %q]
        """,
        """
        %y : f32[batch, hidden] = aten.mul(%x, %m)
        %q : f32[] = aten.mul(%m, %m)
        %a : f32[] = share(%q)
        return [%y, %a]
        """,
    )


@pytest.mark.parametrize("loss", ["aten.exp(%s)", "aten.mul(%s, %m)", "aten.div(%m, %s)", "aten.amax(%x)", "aten.add(%s, 1)"])
def test_what_does_not_add_up_is_refused(loss: str) -> None:
    with pytest.raises(FoldError, match="(?s)does not add up over micro-batches.*valid"):
        rewrites(f"%r : f32[] = {loss}\nreturn [%r]", "return [%s]")
