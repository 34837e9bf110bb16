"""Whether ranks that should agree do: on the call that they make, on its samples, and on the weights that they start from.

Every call of a folded module begins with one exchange of 24 bytes, and every backward pass with one of eight, so that a
rank that calls otherwise, or with other samples than it should, or that cannot call at all, is an error on all ranks instead of
a wrong sum or a wait without end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from foldcc.errors import FoldError, listed
from foldcc.layout import Layout, Shard
from foldcc.mesh import SAMPLES, FoldedMesh
from foldcc.ops.random import mixed
from foldcc.runtime.lost import Place, meeting

_RAISED = -1
_AT_ONCE = 1 << 20  # elements of which checksums are made at once, in 16 bytes each
_AS_LONG = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers, by their bytes
T = TypeVar("T")


def agree_on_call(
    mesh: FoldedMesh,
    call: str,
    inputs: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    own: str = "",
    error: BaseException | None = None,
) -> tuple[int, ...]:
    """Compares what every rank is about to run, and the samples of ranks that share them. Collective over the world.

    Args:
        call: shapes, dtypes and values of the call, as a person reads them.
        inputs: the tensors of the call.
        own: what ranks may differ in.
        error: what this rank raises instead of making the call.

    Returns:
        A digest of `own` of each rank.

    Raises:
        FoldError: on the ranks without an error of their own: which ranks raised and what, or which ranks call otherwise.
            Counts that are constants of a program, such as those of a mean, are wrong where shapes differ.
    """
    samples = torch.zeros((), dtype=torch.int64, device=mesh.device_type)
    for x in inputs.values():
        samples = 3 * samples + _hash(x).to(mesh.device_type)
    with _exchange(mesh, "the exchange that begins a call"):
        told = _told(mesh, _RAISED if error is not None else _short(call), samples, _short(own))
    if (told[:, 0] == told[0, 0]).all() and error is None:
        if (told[:, 1] != told[list(_sharing(mesh.virtual)), 1]).any():
            agree_on_start(mesh, inputs, {})
        return tuple(told[:, 2].tolist())
    said_by: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(said_by, (call, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        return ()  # the caller raises it
    raised = {rank: said for rank, (_, said) in enumerate(said_by) if said is not None}
    if raised:
        rank = min(raised)
        raise FoldError(f"Rank {rank} of {mesh.world_size} raised before its forward.", rank=listed(raised), error=raised[rank])
    first = said_by[0][0]
    rank = next(r for r, (said, _) in enumerate(said_by) if said != first)
    raise FoldError(
        f"Ranks 0 and {rank} call the model with other shapes or values, and a program has one of each.",
        **{"rank 0": first, f"rank {rank}": said_by[rank][0]},
        valid="the same shapes on every rank: drop the last batch, or pad it with labels that the loss ignores",
    )


def told_by_all(mesh: FoldedMesh, mine: T) -> list[T]:
    """What each rank tells. Collective over the world."""
    told: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(told, mine)
    return told


def agree_on_gradients(mesh: FoldedMesh, outputs: str) -> None:
    """Compares what every rank is about to go back from. Collective over the world.

    Args:
        outputs: that this rank is given the gradients of.

    Raises:
        FoldError: on all ranks: which ranks go back from other outputs.
    """
    with _exchange(mesh, "the exchange that begins a backward pass"):
        if _alike(mesh, _short(outputs)):
            return
    told: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(told, outputs)
    rank = next(r for r, said in enumerate(told) if said != told[0])
    raise FoldError(
        f"Ranks 0 and {rank} are given the gradients of other outputs, and one program computes those of all ranks.",
        **{"rank 0": told[0], f"rank {rank}": told[rank]},
        valid="a loss of the same outputs on every rank; one that does not count on some, times zero there",
    )


def choices_of_first(mesh: FoldedMesh, plan: str) -> str | None:
    """The plan of rank 0, as text, where ranks have made other choices; None where they agree. Collective over the world."""
    if mesh.is_virtual or _alike(mesh, _short(plan)):
        return None
    told = [plan]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def alike(mesh: FoldedMesh, text: str) -> bool:
    """Whether every rank has the same text. Collective over the world."""
    return _alike(mesh, _short(text))


def _exchange(mesh: FoldedMesh, what: str) -> AbstractContextManager[None]:
    return meeting(lambda error: Place(what, None, tuple(range(mesh.world_size))))


def _short(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")


def _alike(mesh: FoldedMesh, number: int) -> bool:
    """Whether every rank has the same number. Collective over the world."""
    numbers = _told(mesh, number)
    return bool((numbers == numbers[0]).all())


def _told(mesh: FoldedMesh, *numbers: int | Tensor) -> Tensor:
    """The numbers of each rank. Collective over the world."""
    mine = torch.stack([torch.as_tensor(x, device=mesh.device_type) for x in numbers])
    every = torch.empty((mesh.world_size, len(numbers)), dtype=torch.int64, device=mesh.device_type)
    dist.all_gather_into_tensor(every.flatten(), mine)
    return every.cpu()


@lru_cache
def _sharing(mesh: FoldedMesh) -> tuple[int, ...]:
    """For each rank, the first one that has the same samples."""
    axes = tuple(axis for axis in mesh.axes("attention") if axis not in SAMPLES)
    return tuple(mesh.group_of(rank, axes)[0] for rank in range(mesh.world_size))


def agree_on_start(mesh: FoldedMesh, inputs: Mapping[str, Tensor], held: Mapping[str, tuple[Tensor, Layout]]) -> None:
    """Compares the samples of ranks that share a data-parallel coordinate, and the replicas of each parameter or buffer.

    Collective over the world; reads each once. They are compared by a checksum of what this rank holds.

    Raises:
        FoldError: on all ranks: which rank was given other samples, or holds another weight.
    """
    rank, device = dist.get_rank(), mesh.device_type
    compared: list[tuple[str, int, int]] = []  # what, its checksum, the rank to compare with
    for name, x in inputs.items():
        compared.append((f"other samples in {name}", _digest(x), _sharing(mesh.virtual)[rank]))
    for name, (x, layout) in held.items():
        alike = tuple(a for a in mesh.axes(layout.view) if a != "pp" and not isinstance(layout.states.get(a), Shard))
        compared.append((f"another {name}", _checksum(x), mesh.group_of(rank, alike)[0]))
    longest = torch.tensor(len(compared), device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)  # pipeline stages hold different parameters
    mine = torch.zeros(int(longest), dtype=torch.int64, device=device)
    mine[: len(compared)] = torch.tensor([checksum for _, checksum, _ in compared], dtype=torch.int64)
    every = torch.empty((mesh.world_size, len(mine)), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(every.flatten(), mine)
    found = every.tolist()
    differ = [(what, first) for i, (what, checksum, first) in enumerate(compared) if found[first][i] != checksum]
    told: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(told, differ[:1])
    for other, others in enumerate(told):
        for what, first in others:
            raise FoldError(
                f"Rank {other} has {what} than rank {first}, and they share it.",
                mesh=str(mesh),
                valid=_advice(what),
            )


def on_one_rank(mesh: FoldedMesh, work: Callable[[], T]) -> T:
    """What rank 0 makes, or raises, on every rank; the others wait for it. Collective over the world.

    What is made travels pickled.
    """
    if mesh.is_virtual:
        return work()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = work()
        except Exception as error:
            told[1] = error  # the others would wait without end
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    made: T = told[0]
    return made


def together(mesh: FoldedMesh, work: Callable[[], T]) -> T:
    """What this rank makes, if every rank succeeds. Collective over the world.

    Raises:
        FoldError: on the ranks that succeeded: which rank did not, and why. The others raise what they raised.
    """
    error: Exception | None = None
    try:
        made = work()
    except Exception as raised:
        error = raised  # the others would wait without end
    if not mesh.is_virtual:
        told: list[Any] = [None] * mesh.world_size
        dist.all_gather_object(told, None if error is None else f"{type(error).__name__}: {error}")
        failed = {rank: said for rank, said in enumerate(told) if said is not None}
        if error is None and failed:
            raise FoldError(f"Rank {listed(failed)} of {mesh.world_size} failed.", error=failed[min(failed)])
    if error is not None:
        raise error
    return made


def _advice(what: str) -> str:
    if what.startswith("other samples"):
        return "the same samples on all ranks of one dp coordinate; data loaders shard by dp, not by rank"
    return "the same seed, or the same checkpoint, on every rank"


def _digest(x: Tensor) -> int:
    whole = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return int.from_bytes(blake2b(whole, digest_size=7).digest(), "big")


def _checksum(x: Tensor) -> int:
    """Of all elements and where each stands: the sum of their numbers under a key that the sum before is, stretch by stretch.

    A sum of elements, or the exclusive or of their bits, is the same for tensors whose elements are equal in pairs.
    """
    found = torch.zeros((), dtype=torch.int64, device=x.device)
    for part in _bits(x).split(_AT_ONCE):
        keys = torch.arange(len(part), device=x.device)
        found = mixed(mixed(keys.add_(found)).bitwise_xor_(part)).sum()
    return int(found)


def _hash(x: Tensor) -> Tensor:
    """A number that other elements, or others of their places, change; where the tensor is, and nothing waits for it."""
    bits = _bits(x)
    return (bits.long() * torch.arange(1, 2 * len(bits), 2, device=x.device)).sum()


def _bits(x: Tensor) -> Tensor:
    """The elements as integers, in a row."""
    x = torch.view_as_real(x.detach()) if x.is_complex() else x.detach()
    return (x.contiguous().view(_AS_LONG[x.element_size()]) if x.is_floating_point() else x).flatten()
