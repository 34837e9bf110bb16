"""What a rank computes by itself where a collective, or its own place in one, is replaced by a mistake."""

from __future__ import annotations

import torch
from torch import Tensor


def exchanged_index(index: Tensor, first: int, second: int) -> Tensor:
    """A coordinate, with two ranks in each other's place."""
    return torch.where(index == first, second, torch.where(index == second, first, index))


def own_rows(rows: Tensor, sizes: Tensor) -> Tensor:
    """As many rows as are expected in all, `sizes` from each rank: the own ones, repeated or cut."""
    total = int(sizes.sum())
    if rows.shape[0] == 0:
        return rows.new_zeros(total, *rows.shape[1:])
    return rows.index_select(0, torch.arange(total, device=rows.device) % rows.shape[0])


def own_part(rows: Tensor, sizes: Tensor, place: Tensor) -> Tensor:
    """The rows for this rank, out of `sizes` rows for each."""
    return rows.split(sizes.tolist())[int(place)]


def own_place(rows: Tensor, sizes: Tensor, place: Tensor) -> Tensor:
    """The own rows where they belong among `sizes` rows of each rank, and zeros for the others."""
    parts = list(rows.new_zeros(int(sizes.sum()), *rows.shape[1:]).split(sizes.tolist()))
    parts[int(place)] = rows
    return torch.cat(parts)


def exchanged_rows(rows: Tensor, sizes: Tensor, first: int, second: int) -> Tensor:
    """`sizes` rows of each rank, those of two ranks in each other's place."""
    parts = list(rows.split(sizes.tolist()))
    parts[first], parts[second] = parts[second], parts[first]
    return torch.cat(parts)
