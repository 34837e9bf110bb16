"""Collectives, in transposed pairs: each changes the type of a value on mesh axes, and its transpose changes it back.

    I -> R   retype          |  P -> I   all_reduce          P -> R   all_reduce      |  P -> R   all_reduce
    V -> R   all_gather      |  P -> V   reduce_scatter      V -> I   all_gather      |  I -> V   shard
    R -> V   shard           |  V -> P   pad                 R -> P   once            |  R -> P   once
    V -> V   all_to_all      |  V -> V   all_to_all          V -> R   all_gather_v    |  P -> V   reduce_scatter_v

`axes` names mesh axes of one view, comma separated, first axis slowest. `dim` is the dimension that is joined or cut;
it is read as `(outer, ranks, inner)`, so that a minor factor of a product can be sharded. With `-outer` in its place, it is
read as `(outer, 2 * ranks, inner)`, and a rank has one block from each end, zig-zag.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from foldcc.ops.groups import index, process_group, size
from foldcc.ops.operator import Operator, operator


def _zigzag(x: Tensor, dim: int, outer: int, ranks: int, *, back: bool = False) -> Tensor:
    """A dimension with the blocks that a rank has one behind the other, where `outer` says that they are not; or back."""
    if outer > 0:
        return x
    places = [place for rank in range(ranks) for place in (rank, 2 * ranks - 1 - rank)]
    if back:
        places = sorted(range(2 * ranks), key=places.__getitem__)
    blocks = x.unflatten(dim, (-outer, 2 * ranks, x.shape[dim] // (-outer * 2 * ranks)))
    return torch.cat([blocks.narrow(dim + 1, place, 1) for place in places], dim + 1).flatten(dim, dim + 2)


def cut(x: Tensor, dim: int, outer: int, ranks: int, index: int) -> Tensor:
    x, outer = _zigzag(x, dim, outer, ranks), abs(outer)
    blocks = x.unflatten(dim, (outer, ranks, x.shape[dim] // (outer * ranks)))
    return blocks.select(dim + 1, index).flatten(dim, dim + 1).contiguous()


def join(parts: list[Tensor], dim: int, outer: int) -> Tensor:
    blocks = [p.unflatten(dim, (abs(outer), p.shape[dim] // abs(outer))) for p in parts]
    return _zigzag(torch.cat(blocks, dim + 1).flatten(dim, dim + 1), dim, outer, len(parts), back=True)


def _resized(x: Tensor, dim: int, length: Any) -> Tensor:
    shape = list(x.shape)
    shape[dim] = length
    return x.new_empty(shape)


# --- changes of type that move nothing -------------------------------------------------------------

retype: Operator = operator(
    "retype(Tensor x, str axes, str src, str dst) -> Tensor",
    meaning="the same numbers, seen as another type",
    types="src -> dst",
    eager=lambda x, axes, src, dst: x.clone(),
    shape=lambda x, axes, src, dst: torch.empty_like(x),
    transpose=lambda grad, x, axes, src, dst: all_reduce(grad, axes, "I"),
)


def _once(x: Tensor, axes: str) -> Tensor:
    return x.clone() if index(axes) == 0 else torch.zeros_like(x)


once: Operator = operator(
    "once(Tensor x, str axes, str src) -> Tensor",
    meaning="the value on the first rank of the axis, zero on the others: a replicated value as one term of a sum",
    types="src -> P",
    eager=lambda x, axes, src: _once(x, axes),
    shape=lambda x, axes, src: torch.empty_like(x),
    transpose=lambda grad, x, axes, src: once(grad, axes, "R") if src == "R" else torch.clone(grad),
    simulate=lambda calls: [c[0] if i == 0 else torch.zeros_like(c[0]) for i, c in enumerate(calls)],
)

shard: Operator = operator(
    "shard(Tensor x, int dim, int outer, str axes, str src) -> Tensor",
    meaning="this rank's part of a value that every rank holds",
    types="src -> V",
    eager=lambda x, dim, outer, axes, src: cut(x, dim, outer, size(axes), index(axes)),
    shape=lambda x, dim, outer, axes, src: _resized(x, dim, x.shape[dim] // size(axes)),
    transpose=lambda grad, x, dim, outer, axes, src: (
        pad(grad, dim, outer, axes) if src == "R" else all_gather(grad, dim, outer, axes, "I")
    ),
    simulate=lambda calls: [cut(c[0], c[1], c[2], len(calls), i) for i, c in enumerate(calls)],
)


def _pad(x: Tensor, dim: int, outer: int, ranks: int, index: int) -> Tensor:
    zero = torch.zeros_like(x)
    return join([x if i == index else zero for i in range(ranks)], dim, outer)


pad: Operator = operator(
    "pad(Tensor x, int dim, int outer, str axes) -> Tensor",
    meaning="this rank's part in its place, zero elsewhere: a shard as one term of the sum that joins them",
    types="V -> P",
    eager=lambda x, dim, outer, axes: _pad(x, dim, outer, size(axes), index(axes)),
    shape=lambda x, dim, outer, axes: _resized(x, dim, x.shape[dim] * size(axes)),
    transpose=lambda grad, x, dim, outer, axes: shard(grad, dim, outer, axes, "R"),
    simulate=lambda calls: [_pad(c[0], c[1], c[2], len(calls), i) for i, c in enumerate(calls)],
)

axis_index: Operator = operator(
    "axis_index(str axes, Device device) -> Tensor",
    meaning="this rank's coordinate, as a value: int64 without dimensions",
    types="-> V",
    eager=lambda axes, device: torch.tensor(index(axes), device=device),
    shape=lambda axes, device: torch.empty((), dtype=torch.int64, device=device),
    simulate=lambda calls: [torch.tensor(i, device=c[1]) for i, c in enumerate(calls)],
)

# --- reductions ------------------------------------------------------------------------------------


def _all_reduce(x: Tensor, axes: str, op: Any = dist.ReduceOp.SUM) -> Callable[[], Tensor]:
    result = x.clone(memory_format=torch.contiguous_format)
    work = dist.all_reduce(result, op, group=process_group(axes), async_op=True)
    return lambda: _there(work, result)


def _there(work: Any, result: Tensor) -> Tensor:
    work.wait()
    return result


def _sum(calls: list[tuple[Any, ...]]) -> Tensor:
    total = calls[0][0].clone()
    for c in calls[1:]:
        total += c[0]
    return total


all_reduce: Operator = operator(
    "all_reduce(Tensor x, str axes, str dst) -> Tensor",
    meaning="the sum of every rank's term",
    types="P -> dst",
    issue=lambda x, axes, dst: _all_reduce(x, axes),
    shape=lambda x, axes, dst: torch.empty_like(x),
    transpose=lambda grad, x, axes, dst: all_reduce(grad, axes, "R") if dst == "R" else retype(grad, axes, "I", "R"),
    simulate=lambda calls: [_sum(calls)] * len(calls),
    sent=lambda x, y, ranks: 2 * x * (ranks - 1) / ranks,
)

all_reduce_max: Operator = operator(
    "all_reduce_max(Tensor x, str axes) -> Tensor",
    meaning="the largest of every rank's values; it has no gradient",
    types="V -> I",
    issue=lambda x, axes: _all_reduce(x, axes, dist.ReduceOp.MAX),
    shape=lambda x, axes: torch.empty_like(x),
    simulate=lambda calls: [torch.stack([c[0] for c in calls]).amax(0)] * len(calls),
    sent=lambda x, y, ranks: 2 * x * (ranks - 1) / ranks,
)

# --- gathers and scatters --------------------------------------------------------------------------


def _all_gather(x: Tensor, dim: int, outer: int, axes: str, dst: str) -> Callable[[], Tensor]:
    ranks = size(axes)
    parts = x.new_empty((ranks, *x.shape))
    work = dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous(), group=process_group(axes), async_op=True)
    # Copies nothing when the parts already stand in order: dim 0, and no blocks before it.

    def whole() -> Tensor:
        joined = _there(work, parts).unflatten(dim + 1, (abs(outer), -1)).movedim(0, dim + 1).flatten(dim, dim + 2)
        return _zigzag(joined, dim, outer, ranks, back=True)

    return whole


def _reduce_scatter(x: Tensor, dim: int, outer: int, axes: str) -> Callable[[], Tensor]:
    ranks = size(axes)
    blocks = _zigzag(x, dim, outer, ranks).unflatten(dim, (abs(outer), ranks, -1))
    parts = blocks.movedim(dim + 1, 0).flatten(dim + 1, dim + 2).contiguous()
    result = torch.empty_like(parts[0])
    work = dist.reduce_scatter_tensor(result, parts.flatten(0, 1), group=process_group(axes), async_op=True)
    return lambda: _there(work, result)


all_gather: Operator = operator(
    "all_gather(Tensor x, int dim, int outer, str axes, str dst) -> Tensor",
    meaning="the shards of every rank, joined along dim",
    types="V -> dst",
    issue=_all_gather,
    shape=lambda x, dim, outer, axes, dst: _resized(x, dim, x.shape[dim] * size(axes)),
    transpose=lambda grad, x, dim, outer, axes, dst: (
        reduce_scatter(grad, dim, outer, axes) if dst == "R" else shard(grad, dim, outer, axes, "I")
    ),
    simulate=lambda calls: [join([c[0] for c in calls], calls[0][1], calls[0][2]).contiguous()] * len(calls),
    sent=lambda x, y, ranks: x * (ranks - 1),
    moves=True,
)

reduce_scatter: Operator = operator(
    "reduce_scatter(Tensor x, int dim, int outer, str axes) -> Tensor",
    meaning="this rank's part of the sum of every rank's term",
    types="P -> V",
    issue=_reduce_scatter,
    shape=lambda x, dim, outer, axes: _resized(x, dim, x.shape[dim] // size(axes)),
    transpose=lambda grad, x, dim, outer, axes: all_gather(grad, dim, outer, axes, "R"),
    simulate=lambda calls: [cut(_sum(calls), c[1], c[2], len(calls), i) for i, c in enumerate(calls)],
    sent=lambda x, y, ranks: x * (ranks - 1) / ranks,
)


def _all_to_all(x: Tensor, axes: str) -> Tensor:
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(result, x.contiguous(), group=process_group(axes))
    return result


all_to_all: Operator = operator(
    "all_to_all(Tensor x, str axes) -> Tensor",
    meaning="part i of dimension 0 to rank i, the parts received joined in rank order",
    types="V -> V",
    eager=_all_to_all,
    shape=lambda x, axes: torch.empty_like(x),
    transpose=lambda grad, x, axes: all_to_all(grad, axes),
    simulate=lambda calls: [torch.cat(parts) for parts in zip(*(c[0].chunk(len(calls)) for c in calls), strict=True)],
    sent=lambda x, y, ranks: x * (ranks - 1) / ranks,
    moves=True,
)

# --- uneven collectives: sizes are int64 tensors on the host, one entry per rank of the group ------


def _exchange(x: Tensor, send: list[int], receive: list[int], axes: str) -> Tensor:
    result = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(result, x.contiguous(), receive, send, group=process_group(axes))
    return result


def sized(x: Tensor, rows: Any) -> Tensor:
    """Of so many rows; of a number that is data, if none is given."""
    rows = torch.library.get_ctx().new_dynamic_size() if rows is None else rows
    return x.new_empty((rows, *x.shape[1:]))


def _simulate_exchange(calls: list[tuple[Any, ...]]) -> list[Tensor]:
    parts = [c[0].split(c[1].tolist()) for c in calls]
    return [torch.cat([p[i] for p in parts]) for i in range(len(calls))]


all_to_all_v: Operator = operator(
    "all_to_all_v(Tensor x, Tensor send, Tensor receive, str axes, SymInt? rows=None) -> Tensor",
    meaning="send[i] rows to rank i, receive[i] rows from rank i, joined in rank order",
    types="V -> V",
    eager=lambda x, send, receive, axes, rows=None: _exchange(x, send.tolist(), receive.tolist(), axes),
    shape=lambda x, send, receive, axes, rows=None: sized(x, rows),
    transpose=lambda grad, x, send, receive, axes, rows: all_to_all_v(grad, receive, send, axes, x.shape[0]),
    simulate=_simulate_exchange,
    sent=lambda x, y, ranks: x * (ranks - 1) / ranks,
    moves=True,
)


def _all_gather_v(x: Tensor, sizes: Tensor, axes: str, rows: Any = None) -> Tensor:
    ranks = size(axes)
    return _exchange(x.repeat(ranks, *[1] * (x.dim() - 1)), [x.shape[0]] * ranks, sizes.tolist(), axes)


def _reduce_scatter_v(x: Tensor, sizes: Tensor, axes: str, rows: Any = None) -> Tensor:
    ranks, mine = size(axes), sizes.tolist()[index(axes)]
    terms = _exchange(x, sizes.tolist(), [mine] * ranks, axes)
    return terms.unflatten(0, (ranks, mine)).sum(0)


all_gather_v: Operator = operator(
    "all_gather_v(Tensor x, Tensor sizes, str axes, SymInt? rows=None) -> Tensor",
    meaning="the rows of every rank, sizes[i] from rank i, joined in rank order",
    types="V -> R",
    eager=_all_gather_v,
    shape=lambda x, sizes, axes, rows=None: sized(x, rows),
    transpose=lambda grad, x, sizes, axes, rows: reduce_scatter_v(grad, sizes, axes, x.shape[0]),
    simulate=lambda calls: [torch.cat([c[0] for c in calls])] * len(calls),
    sent=lambda x, y, ranks: x * (ranks - 1),
    moves=True,
)

reduce_scatter_v: Operator = operator(
    "reduce_scatter_v(Tensor x, Tensor sizes, str axes, SymInt? rows=None) -> Tensor",
    meaning="this rank's rows, sizes[i] for rank i, of the sum of every rank's term",
    types="P -> V",
    eager=_reduce_scatter_v,
    shape=lambda x, sizes, axes, rows=None: sized(x, rows),
    transpose=lambda grad, x, sizes, axes, rows: all_gather_v(grad, sizes, axes, x.shape[0]),
    simulate=lambda calls: list(_sum(calls).split(calls[0][1].tolist())),
    sent=lambda x, y, ranks: x * (ranks - 1) / ranks,
)
