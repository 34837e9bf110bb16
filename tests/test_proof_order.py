"""What orders, rounds or casts elements of the field goes by one order in which data keeps its own meaning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from foldcc.verification.field import Field
from foldcc.verification.mode import FieldMode

FIELD = Field(seed=3)


@pytest.mark.parametrize(
    "left_out",
    [
        lambda x: x.clamp(min=0),
        lambda x: torch.maximum(x, torch.zeros_like(x)),
        F.relu,
        lambda x: torch.where(x > 0.5, x, x * 2),
        lambda x: x.round(),
        F.leaky_relu,
        F.elu,
    ],
)
def test_leaving_out_what_orders_changes_many_elements(left_out) -> None:
    x = FIELD.random((1000,), torch.Generator().manual_seed(0))
    with FieldMode(FIELD):
        y = left_out(x)
    assert 0.2 < float((y != x).double().mean())


def test_data_keeps_its_meaning_through_arithmetic() -> None:
    with FieldMode(FIELD):
        at = torch.arange(40) / 10
        assert (at > 1.95).tolist() == [i > 19 for i in range(40)]
        assert at.floor().long().tolist() == [i // 10 for i in range(40)]
        assert ((torch.arange(5) - 2.0).clamp(min=-1) + 2).long().tolist() == [1, 1, 2, 3, 4]
