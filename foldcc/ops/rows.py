"""Rows that no expert takes, and rows that fill an expert up: what is sent, where not all rows are.

leading, extended      the rows that go to an expert, which stand first; and zeros in the place of the others
spread, collected      the rows of each expert, padded to one number; and back
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldcc.ops.collectives import sized
from foldcc.ops.operator import Operator, operator

leading: Operator = operator(
    "leading(Tensor rows, Tensor counts, SymInt? number=None) -> Tensor",
    meaning="the first rows, as many as `counts` sum up to",
    eager=lambda rows, counts, number=None: rows[: int(counts.sum())].clone(),
    shape=lambda rows, counts, number=None: sized(rows, number),
    transpose=lambda grad, rows, counts, number: extended(grad, counts, rows.shape[0]),
)

extended: Operator = operator(
    "extended(Tensor rows, Tensor counts, SymInt number) -> Tensor",
    meaning="the transpose of leading: rows of zeros behind, up to a number",
    eager=lambda rows, counts, number: torch.cat([rows, rows.new_zeros((number - rows.shape[0], *rows.shape[1:]))]),
    shape=lambda rows, counts, number: sized(rows, number),
    transpose=lambda grad, rows, counts, number: leading(grad, counts, rows.shape[0]),
)


def _starts(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Where the rows of each expert end, and where they start; behind the last expert start those of none."""
    ends = counts.cumsum(0)
    return ends, torch.cat([torch.zeros_like(ends[:1]), ends])


def _spread(rows: Tensor, counts: Tensor, each: int) -> Tensor:
    expert = torch.arange(counts.shape[0], device=rows.device).repeat_interleave(each)
    place = torch.arange(each, device=rows.device).repeat(counts.shape[0])
    found = rows.index_select(0, (_starts(counts)[1][expert] + place).clamp(max=rows.shape[0] - 1))
    return torch.where((place < counts[expert]).unsqueeze(1), found, torch.zeros_like(found))


def _collected(rows: Tensor, counts: Tensor, number: int) -> Tensor:
    ends, starts = _starts(counts)
    at = torch.arange(number, device=rows.device)
    expert = torch.searchsorted(ends, at, right=True)
    found = rows.index_select(
        0, (expert * (rows.shape[0] // counts.shape[0]) + at - starts[expert]).clamp(max=rows.shape[0] - 1)
    )
    return torch.where((at < ends[-1]).unsqueeze(1), found, torch.zeros_like(found))


spread: Operator = operator(
    "spread(Tensor rows, Tensor counts, SymInt each) -> Tensor",
    meaning="counts[e] rows of each expert, in order, padded with zeros to as many; rows of none, which are last, are left out",
    eager=_spread,
    shape=lambda rows, counts, each: rows.new_empty((counts.shape[0] * each, *rows.shape[1:])),
    transpose=lambda grad, rows, counts, each: collected(grad, counts, rows.shape[0]),
)

collected: Operator = operator(
    "collected(Tensor rows, Tensor counts, SymInt number) -> Tensor",
    meaning="the transpose of spread: the padding is left out, and rows of zeros are those of none",
    eager=_collected,
    shape=lambda rows, counts, number: sized(rows, number),
    transpose=lambda grad, rows, counts, number: spread(grad, counts, rows.shape[0] // counts.shape[0]),
)
