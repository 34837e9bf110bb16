"""exchange: a value that mesh axes divide in some dimensions is divided in others, and each element is sent once.

    [b, s@cp, h, d]  becomes  [b, s, h@cp, d]        what sequence parallelism of the Ulysses kind does around attention

Of several axes each may divide another dimension, or all the same one: a rank sends what it has of another rank's part.
The blocks before a divided part are negative where ranks have it zig-zag, as in `foldcc/ops/collectives.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from foldcc.ops.groups import index, process_group, size
from foldcc.ops.operator import Operator, operator

Cuts = tuple[tuple[int, int, int], ...]  # (dimension, blocks before, ranks) of each axis, the slowest first
Places = tuple[list[int], ...]  # the positions that a rank has of each dimension


def _cuts(axes: str, dims: Sequence[int], outers: Sequence[int]) -> Cuts:
    return tuple((d, o, size(a)) for d, o, a in zip(dims, outers, axes.split(","), strict=True))


def _scaled(shape: Sequence[Any], cuts: Cuts, by: int) -> list[Any]:
    """A shape before it is divided (1), or after (-1)."""
    found = list(shape)
    for dim, _, ranks in cuts:
        found[dim] = found[dim] * ranks if by > 0 else found[dim] // ranks
    return found


@lru_cache
def _places(shape: tuple[int, ...], cuts: Cuts) -> list[Places]:
    """What each rank of the group has of a whole value."""
    found = [tuple(list(range(n)) for n in shape)]
    for dim, outer, ranks in cuts:
        found = [
            tuple(_part(x, outer, ranks, rank) if d == dim else x for d, x in enumerate(places))
            for places in found
            for rank in range(ranks)
        ]
    return found


def _part(places: list[int], outer: int, ranks: int, rank: int) -> list[int]:
    mine, blocks = ([rank], ranks) if outer > 0 else ([rank, 2 * ranks - 1 - rank], 2 * ranks)
    each = len(places) // (abs(outer) * blocks)
    return [x for o in range(abs(outer)) for at in mine for x in places[(o * blocks + at) * each :][:each]]


def _both(mine: Places, theirs: Places) -> tuple[Tensor, ...]:
    """Where, among the places of a rank, those are that another one has too: an index of each dimension."""
    found = []
    for own, other in zip(mine, theirs, strict=True):
        there = set(other)
        found.append(torch.tensor([i for i, x in enumerate(own) if x in there], dtype=torch.long))
    return torch.meshgrid(*found, indexing="ij")


def _ends(x: Tensor, cuts: Cuts, into: Cuts) -> tuple[list[int], list[Places], list[Places]]:
    whole = _scaled(x.shape, cuts, 1)
    return whole, _places(tuple(whole), cuts), _places(tuple(whole), into)


def _exchange(
    x: Tensor, axes: str, dims: Sequence[int], outers: Sequence[int], into: Sequence[int], into_outers: Sequence[int]
) -> Tensor:
    cuts, then, rank = _cuts(axes, dims, outers), _cuts(axes, into, into_outers), index(axes)
    whole, before, after = _ends(x, cuts, then)
    parts = [x[_both(before[rank], theirs)].flatten() for theirs in after]
    places = [_both(after[rank], theirs) for theirs in before]
    sizes = [prod(p[0].shape) for p in places]
    received = x.new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(parts), sizes, [len(p) for p in parts], group=process_group(axes))
    result = x.new_empty(_scaled(whole, then, -1))
    for place, part in zip(places, received.split(sizes), strict=True):
        result[place] = part.view(place[0].shape)
    return result


def _simulated(calls: list[tuple[Any, ...]]) -> list[Tensor]:
    first, axes, *_ = calls[0]
    cuts, then = (_cuts(axes, *calls[0][i : i + 2]) for i in (2, 4))
    shape, before, after = _ends(first, cuts, then)
    whole = first.new_empty(shape)
    for places, call in zip(before, calls, strict=True):
        whole[_at(places)] = call[0]
    return [whole[_at(places)] for places in after]


def _at(places: Places) -> tuple[Tensor, ...]:
    return torch.meshgrid(*(torch.tensor(x, dtype=torch.long) for x in places), indexing="ij")


exchange: Operator = operator(
    "exchange(Tensor x, str axes, int[] dims, int[] outers, int[] into, int[] into_outers) -> Tensor",
    meaning="a value that each axis divides along one of dims, divided along one of `into` instead",
    types="V -> V",
    eager=_exchange,
    shape=lambda x, axes, dims, outers, into, into_outers: x.new_empty(
        _scaled(_scaled(x.shape, _cuts(axes, dims, outers), 1), _cuts(axes, into, into_outers), -1)
    ),
    transpose=lambda grad, x, axes, dims, outers, into, into_outers: exchange(grad, axes, into, into_outers, dims, outers),
    simulate=_simulated,
    sent=lambda x, y, ranks: x * (ranks - 1) / ranks,
    moves=True,
)
