"""halo: a rank's part of a divided dimension, with some positions of the parts before it, which stand on other ranks.

How much is sent depends on how many positions these are, not on how long the dimension is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from foldcc.ops.groups import index, process_group, size
from foldcc.ops.operator import Operator, operator


def _from(each: int, before: int) -> Iterator[tuple[int, int]]:
    """How many ranks before this one, and how many of its last positions, the nearest first."""
    for steps in range(1, -(-before // each) + 1):
        yield steps, min(each, before - (steps - 1) * each)


def _starts(each: int, before: int) -> Iterator[int]:
    """Where what came from each of these ranks begins."""
    start = before
    for _, count in _from(each, before):
        start -= count
        yield start


def _joined(parts: list[Tensor], place: int, dim: int, before: int) -> Tensor:
    """The part at a place with what stands before it, zeros before the first one."""
    own = parts[place]
    found = [own]
    for steps, count in _from(own.shape[dim], before):
        there = parts[place - steps] if place >= steps else torch.zeros_like(own)
        found.insert(0, there.narrow(dim, own.shape[dim] - count, count))
    return torch.cat(found, dim)


def _summed(parts: list[Tensor], place: int, dim: int, before: int) -> Tensor:
    """What all ranks have of the positions of one."""
    own = parts[place]
    each = own.shape[dim] - before
    total = own.narrow(dim, before, each).clone()
    for (steps, count), start in zip(_from(each, before), _starts(each, before), strict=True):
        if place + steps < len(parts):
            total.narrow(dim, each - count, count).add_(parts[place + steps].narrow(dim, start, count))
    return total


def _exchanged(axes: str, steps: list[tuple[int, Tensor, Tensor]]) -> None:
    """Sends to the ranks that are so many steps away, and receives from those as far on the other side."""
    group, ranks, place = process_group(axes), size(axes), index(axes)
    calls = []
    for by, sent, received in steps:
        if 0 <= place + by < ranks:
            calls.append(dist.P2POp(dist.isend, sent, group=group, group_peer=place + by))
        if 0 <= place - by < ranks:
            calls.append(dist.P2POp(dist.irecv, received, group=group, group_peer=place - by))
    for request in dist.batch_isend_irecv(calls) if calls else ():
        request.wait()


def _halo(x: Tensor, dim: int, axes: str, before: int) -> Tensor:
    each, found, steps = x.shape[dim], [x], []
    for by, count in _from(each, before):
        tail = x.narrow(dim, each - count, count).contiguous()
        found.insert(0, torch.zeros_like(tail))
        steps.append((by, tail, found[0]))
    _exchanged(axes, steps)
    return torch.cat(found, dim)


def _halo_sum(x: Tensor, dim: int, axes: str, before: int) -> Tensor:
    each, steps = x.shape[dim] - before, []
    for (by, count), start in zip(_from(each, before), _starts(each, before), strict=True):
        head = x.narrow(dim, start, count).contiguous()
        steps.append((-by, head, torch.zeros_like(head)))
    _exchanged(axes, steps)
    total = x.narrow(dim, before, each).clone()
    for _, _, received in steps:
        count = received.shape[dim]
        total.narrow(dim, each - count, count).add_(received)
    return total


def _longer(x: Tensor, dim: int, by: int) -> Tensor:
    return x.new_empty([n + by if d == dim else n for d, n in enumerate(x.shape)])


def _on_all(calls: list[tuple[Any, ...]], of: Any) -> list[Tensor]:
    return [of([c[0] for c in calls], i, c[1], c[3]) for i, c in enumerate(calls)]


halo: Operator = operator(
    "halo(Tensor x, int dim, str axes, int before) -> Tensor",
    meaning="this rank's part along dim, behind the `before` positions that stand before it; zeros where there are none",
    types="V -> V",
    eager=_halo,
    shape=lambda x, dim, axes, before: _longer(x, dim, before),
    transpose=lambda grad, x, dim, axes, before: halo_sum(grad, dim, axes, before),
    simulate=lambda calls: _on_all(calls, _joined),
    sent=lambda x, y, ranks: y - x,
    overlaps=True,
)

halo_sum: Operator = operator(
    "halo_sum(Tensor x, int dim, str axes, int before) -> Tensor",
    meaning="the sum of what all ranks have of the positions of this rank's part, of parts that reach so far before their own",
    types="P -> V",
    eager=_halo_sum,
    shape=lambda x, dim, axes, before: _longer(x, dim, -before),
    transpose=lambda grad, x, dim, axes, before: halo(grad, dim, axes, before),
    simulate=lambda calls: _on_all(calls, _summed),
    sent=lambda x, y, ranks: x - y,
)
