"""What each ATen operator means over a field: a table. An operator that is not in it has no meaning, and no proof.

MOVES only rearrange or choose elements, and run as they are; arithmetic is sums, products and inverses; functions are
hashes, each of its own, and what their derivatives make of them is arithmetic again. What compares, chooses, rounds or casts
to integers goes by the one order of order.py. A pointwise operator that is not in the table is a hash of all its operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foldcc.verification.field import Field

Meaning = Callable[..., Any]  # (field, *arguments of the operator)
MEANINGS: dict[str, Meaning] = {}

# Operators that compute no element from others; their numbers are sizes and positions.
MOVES = frozenset(
    """alias all any as_strided cat chunk clone contiguous copy detach diagonal diagonal_backward diagonal_scatter empty
    empty_like empty_strided equal expand expand_as flatten flip gather index index_select isfinite isinf isnan
    lift_fresh lift_fresh_copy logical_and logical_not logical_or masked_select movedim narrow new_empty
    new_empty_strided new_zeros nonzero ones_like permute repeat repeat_interleave reshape resize roll select
    select_backward select_scatter slice slice_backward split split_with_sizes squeeze stack sym_numel sym_size
    sym_stride t tile transpose tril triu unbind unflatten unfold unsafe_split unsafe_split_with_sizes unsqueeze view_as
    zero zeros zeros_like""".split()
)
# They and those of which a meaning says how: strides are not those of the program.
REARRANGES = MOVES | {"view", "_unsafe_view"}


def meaning(*names: str) -> Callable[[Meaning], Meaning]:
    """Registers what the ATen operators of these names do to carriers."""

    def registered(fn: Meaning) -> Meaning:
        MEANINGS.update(dict.fromkeys(names, fn))
        return fn

    return registered


def value(field: Field, x: Any) -> Tensor:
    """An operand of a sum or product: a carrier as it is, a number or integers as elements."""
    if isinstance(x, Tensor):
        return x if x.is_floating_point() else field.numbers(x)
    return torch.tensor(field.number(x), dtype=torch.float64)
