"""cumsum along a dimension that is divided: a rank sums its own part, and adds what the ranks before it sum to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import Node

from foldcc.layout import VARYING
from foldcc.ops.captured import Captured, Division, Site, registered
from foldcc.ops.groups import index, process_group, size
from foldcc.ops.operator import Operator, operator

aten = torch.ops.aten


def _gathered(x: Tensor, axes: str) -> Sequence[Tensor]:
    parts = x.new_empty((size(axes), *x.shape))
    dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous(), group=process_group(axes))
    return parts.unbind()


def _sum(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for x in parts:
        total += x
    return total


def _resized(x: Tensor, dim: int, places: Any) -> Tensor:
    return x.new_empty([places if d == dim else n for d, n in enumerate(x.shape)])


def _spread(x: Tensor, dim: int, places: int) -> Tensor:
    return x.expand([places if d == dim else n for d, n in enumerate(x.shape)]).contiguous()


from_ranks_before: Operator = operator(
    "from_ranks_before(Tensor x, int dim, str axes, SymInt places) -> Tensor",
    meaning="at each of `places` positions along dim, the sum of the one that each rank before this one holds",
    types="V -> V",
    eager=lambda x, dim, axes, places: _spread(_sum(_gathered(x, axes)[: index(axes)], x), dim, places),
    shape=lambda x, dim, axes, places: _resized(x, dim, places),
    transpose=lambda grad, x, dim, axes, places: of_ranks_behind(grad, dim, axes),
    simulate=lambda calls: [_spread(_sum([d[0] for d in calls[:i]], c[0]), c[1], c[3]) for i, c in enumerate(calls)],
    sent=lambda x, y, ranks: x * (ranks - 1),
)

of_ranks_behind: Operator = operator(
    "of_ranks_behind(Tensor x, int dim, str axes) -> Tensor",
    meaning="the sum of all positions along dim that the ranks behind this one hold",
    types="V -> V",
    eager=lambda x, dim, axes: _sum(_gathered(t := x.sum(dim, True), axes)[index(axes) + 1 :], t),
    shape=lambda x, dim, axes: _resized(x, dim, 1),
    transpose=lambda grad, x, dim, axes: from_ranks_before(grad, dim, axes, x.shape[dim]),
    simulate=lambda calls: [
        _sum([d[0].sum(d[1], True) for d in calls[i + 1 :]], c[0].sum(c[1], True)) for i, c in enumerate(calls)
    ],
    sent=lambda x, y, ranks: y * (ranks - 1),
)


def _rule(self: Node, dim: int, **_: Any) -> str:
    letters = [chr(ord("A") + d) for d in range(self.meta["val"].dim())]
    if letters:
        letters[dim] = "[n]"
    return f"{' '.join(letters)} -> {' '.join(letters)}"


def _carried(at: Site, self: Node, dim: int, **rest: Any) -> Node:
    layout, dim = at.layout, dim % len(at.layout.dims)
    dims = tuple(() if d == dim else factors for d, factors in enumerate(layout.dims))
    one = replace(layout, dims=dims, states={**layout.states, **dict.fromkeys(at.axes.split(","), VARYING)})
    own = at.local(self=self, dim=dim, **rest)
    last = at.emit(aten.slice.Tensor, (own, dim, -1), one)
    earlier = at.emit(from_ranks_before, (last, dim, at.axes, layout.shape[dim]), layout)
    return at.emit(aten.add.Tensor, (own, earlier), layout)


cumsum = registered(
    Captured(
        overload=aten.cumsum.default,
        local=aten.cumsum.default,
        meaning="the sum of all positions up to each",
        defined=None,
        rule=_rule,
        divisions=(Division(("n",), stretch=True, lower=_carried),),
    )
)
