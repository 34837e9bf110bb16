"""Between global tensors and what each rank holds: cutting, joining, and DTensor placements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as DShard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.torch_version import TorchVersion

from foldcc.errors import FoldError
from foldcc.layout import PARTIAL, VARYING, Layout, Shard
from foldcc.mesh import SAMPLES, FoldedMesh
from foldcc.ops import collectives

BLOCKS_ARE_JOINED = TorchVersion(torch.__version__) >= "2.12"


def _steps(layout: Layout) -> list[tuple[str, int, int]]:
    """(axis, dimension, outer blocks) of each division, in the order in which they are made."""
    found, now = [], Layout(layout.dims, layout.sizes, {}, layout.ranks, layout.view)
    for axis, state in layout.states.items():
        now = now.with_state(axis, state)
        if isinstance(state, Shard):
            found.append((axis, state.dim, now.outer(axis)))
    return found


def cut(x: Tensor, layout: Layout, mesh: FoldedMesh, rank: int) -> Tensor:
    """A rank's part of a global tensor, filled up with zeros where it is shorter than that of others."""
    for axis, dim, outer in _steps(layout):
        if layout.rest(dim) is not None:
            x = _lengthened(x, dim, outer, mesh.size(axis))
        x = collectives.cut(x, dim, outer, mesh.size(axis), mesh.coordinate(rank, axis))
    return x


def _lengthened(x: Tensor, dim: int, outer: int, ranks: int) -> Tensor:
    """The blocks of a dimension, filled up with zeros to what ranks divide."""
    blocks = x.unflatten(dim, (outer, -1))
    more = [*blocks.shape[: dim + 1], -blocks.shape[dim + 1] % ranks, *blocks.shape[dim + 2 :]]
    return torch.cat([blocks, blocks.new_zeros(more)], dim + 1).flatten(dim, dim + 1)


def own_part(x: Tensor, layout: Layout, mesh: FoldedMesh, rank: int) -> Tensor:
    """A rank's part of a global tensor, as a DTensor has it: not filled up."""
    x = cut(x, layout, mesh, rank)
    for dim in range(x.dim()):
        x = x.narrow(dim, 0, _length(layout, dim, mesh, rank))
    return x


def _length(layout: Layout, dim: int, mesh: FoldedMesh, rank: int) -> int:
    """How much of a dimension a rank holds."""
    most, rest = int(layout.shape[dim]), layout.rest(dim)
    if rest is None:
        return most
    axis, size = rest
    return min(max(size - mesh.coordinate(rank, axis) * most, 0), most)


def filled(x: Tensor, layout: Layout) -> Tensor:
    """What a rank holds, filled up with zeros where it is shorter than what others hold."""
    more = [int(n) - m for n, m in zip(layout.shape, x.shape, strict=True)]
    return torch.nn.functional.pad(x, [n for m in reversed(more) for n in (0, m)]) if any(more) else x


def positions(at: Sequence[Tensor], layout: Layout, mesh: FoldedMesh, rank: int) -> list[Tensor]:
    """Which positions a rank holds along each dimension, of those of the whole."""
    found = list(at)
    for axis, dim, outer in _steps(layout):
        if layout.rest(dim) is not None:
            found[dim] = _lengthened(found[dim], 0, outer, mesh.size(axis))
        found[dim] = collectives.cut(found[dim], 0, outer, mesh.size(axis), mesh.coordinate(rank, axis))
    return [x[: _length(layout, dim, mesh, rank)] for dim, x in enumerate(found)]


def parts(x: Tensor, layout: Layout, mesh: FoldedMesh) -> list[Tensor]:
    """Every rank's part of a global tensor; ranks that hold the same are given the same tensor."""
    steps = _steps(layout)
    found: dict[tuple[int, ...], Tensor] = {}
    ranks = []
    for rank in range(mesh.world_size):
        place = tuple(mesh.coordinate(rank, axis) for axis, _, _ in steps)
        if place not in found:
            found[place] = cut(x, layout, mesh, rank)
        ranks.append(found[place])
    return ranks


def join(parts: list[Tensor], layout: Layout, mesh: FoldedMesh, what: str) -> Tensor:
    """The global tensor of what every rank holds.

    Raises:
        FoldError: ranks that should hold the same hold something else, or hold terms of a sum.
    """
    if layout.axes(PARTIAL, VARYING) != layout.axes(VARYING) or VARYING in layout.states.values():
        raise FoldError(f"{what} leaves the program as {layout}, which is no whole value.")
    steps = _steps(layout)
    found = {r: parts[r] for r in range(mesh.world_size)}
    for axis, dim, outer in reversed(steps):
        for group in mesh.groups((axis,)):
            members = [r for r in group if r in found]
            if members:
                whole = collectives.join([found[r] for r in members], dim, outer)
                if (rest := layout.rest(dim)) is not None and rest[0] == axis:
                    whole = whole.unflatten(dim, (outer, -1)).narrow(dim + 1, 0, rest[1]).flatten(dim, dim + 1)
                found = {**{r: x for r, x in found.items() if r not in members}, members[0]: whole}
    first = min(found)
    for rank, value in found.items():
        if not torch.equal(value.isnan(), found[first].isnan()) or not torch.equal(
            value.nan_to_num(), found[first].nan_to_num()
        ):
            raise FoldError(
                f"{what} differs between ranks {first} and {rank}, which hold replicas of it.",
                layout=str(layout),
                largest=f"{(value - found[first]).abs().max().item():.3e}",
            )
    return found[first]


def placements(layout: Layout, mesh: FoldedMesh) -> list[Any]:
    """The DTensor placements of a layout on `mesh.of_tensors`."""
    outer = {axis: (dim, blocks) for axis, dim, blocks in _steps(layout)}
    return [_placement(*outer[axis]) if axis in outer else Replicate() for axis in mesh.dividing(layout.view)]


def _placement(dim: int, blocks: int) -> Any:
    return DShard(dim) if blocks == 1 else _StridedShard(dim, split_factor=blocks)


def redistributed(x: DTensor, there: Sequence[Any], mesh: DeviceMesh | None = None) -> DTensor:
    """A DTensor with other placements, on its mesh or another.

    Raises:
        FoldError: one of the layouts is in blocks, which PyTorch 2.11 takes for an order of divisions, and refuses.
    """
    if not BLOCKS_ARE_JOINED and any(isinstance(p, _StridedShard) for p in (*x.placements, *there)):
        raise FoldError(
            f"A weight is cut in several blocks, which PyTorch {torch.__version__} neither stores, loads nor joins.",
            placements=x.placements,
            wanted=tuple(there),
            valid="PyTorch 2.12 or later; or a mesh that cuts no fused weight",
        )
    return x.redistribute(mesh, there)


def whole_terms(x: DTensor) -> DTensor:
    """The same value, with the terms of a sum, or of a norm, brought together."""
    if not any(p.is_partial() for p in x.placements):
        return x
    return x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])


def own_samples(x: Tensor, layout: Layout, mesh: FoldedMesh) -> Tensor:
    """What a rank holds of an output, as its own samples: a DTensor over the axes that divide it otherwise.

    Nothing is sent; `full_tensor()` brings the parts together. What only samples divide, or nothing, is an ordinary tensor.
    """
    over = {axis: (dim, blocks) for axis, dim, blocks in _steps(layout) if axis not in SAMPLES}
    if not over:
        return x
    side = mesh.attention if layout.view == "attention" else mesh.moe
    x, shape = x.contiguous(), list(x.shape)
    for axis, (dim, _) in over.items():
        shape[dim] *= mesh.size(axis)
    stride = torch.empty(shape, device="meta").stride()
    there = [_placement(dim, blocks) for dim, blocks in over.values()]
    return DTensor.from_local(x, side[tuple(over)], there, run_check=False, shape=torch.Size(shape), stride=stride)
