"""Between pipeline stages: what a stage sends its neighbours, and what all stages come to have."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, fx

from foldcc.ir.walk import module_of
from foldcc.mesh import FoldedMesh
from foldcc.ops.groups import patience
from foldcc.runtime.lost import Place, meeting
from foldcc.runtime.schedule import RECEIVES, Action, Channel, Pipelining
from foldcc.runtime.stages import like

# By the world's process group and the ranks: a group over pp for each channel that a place sends on, so that what goes one way
# waits for nothing that comes the other way: to the next stage or the one before, on a later place or an earlier one. And by
# the places that hold a parameter, a group over them.
_GROUPS: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
_EVERY = (1, False)  # a channel whose group, like that of each, is of all places
_WHOLE: WeakKeyDictionary[Any, FoldedMesh] = WeakKeyDictionary()  # by a stage's device mesh, which no value refers to
_COUNTED_ELSEWHERE = "_foldcc_counted_elsewhere"  # an attribute, for PyTorch swaps no parameter that has weak references


def create_wires(mesh: FoldedMesh, held: Sequence[tuple[int, ...]] = ()) -> None:
    """Creates the process groups between the stages of a mesh, in the same order on every rank.

    Args:
        held: places of pp that hold the same parameter, for each one that several hold.
    """
    known = _GROUPS.setdefault(dist.group.WORLD, {})
    _WHOLE.update(dict.fromkeys(mesh.stage.of_tensors.values(), replace(mesh)))
    every = tuple(range(mesh.size("pp")))
    wires = [((step, against), every) for step in (1, -1) for against in (False, True)]
    for key, places in wires + [(places, places) for places in sorted(set(held))]:
        if (mesh.virtual, key) not in known:
            size = mesh.stage.world_size
            groups = [[place * size + r for place in places] for r in range(size)]
            known[mesh.virtual, key], _ = dist.new_subgroups_by_enumeration(groups, timeout=patience(mesh))


def from_place(x: Tensor, mesh: FoldedMesh, place: int) -> Tensor:
    """A value of one place of pp on all of them."""
    x = x.contiguous()
    dist.broadcast(x, src=place * mesh.stage.world_size + mesh.stage.here, group=_group(mesh, _EVERY))
    return x


def on_all_places(x: Tensor, mesh: FoldedMesh) -> Tensor:
    """A value that some places of pp have, on all of them; elsewhere it is on meta. Collective over the world."""
    if mesh.is_virtual or mesh.size("pp") == 1:
        return x
    create_wires(mesh)
    here = torch.tensor(-1 if x.is_meta else mesh.coordinate(mesh.here, "pp"), device=mesh.device_type)
    place = int(over_all_places(here, mesh, largest=True))
    return from_place(torch.empty_like(x, device=mesh.device_type) if x.is_meta else x, mesh, place)


def over_places(x: Tensor, mesh: FoldedMesh, places: tuple[int, ...]) -> Tensor:
    """The sum of what these places of pp have, one of which is this process's."""
    x = x.contiguous()
    dist.all_reduce(x, group=_group(mesh, places))
    return x


def counted_elsewhere(parameter: Tensor) -> None:
    """Norms of all parameters count this one on another stage."""
    setattr(parameter, _COUNTED_ELSEWHERE, True)


def is_counted_here(parameter: Tensor) -> bool:
    return not hasattr(parameter, _COUNTED_ELSEWHERE)


def whole_mesh(parameters: Iterable[Tensor]) -> FoldedMesh | None:
    """The mesh with its stages, of parameters that are on one of several stages."""
    on = (getattr(p, "device_mesh", None) for p in parameters)
    return next((_WHOLE[m] for m in on if m is not None and m in _WHOLE), None)


def over_all_places(x: Tensor, mesh: FoldedMesh, *, largest: bool) -> Tensor:
    """The sum, or the largest, of what every place of pp has."""
    dist.all_reduce(x, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=_group(mesh, _EVERY))
    return x


def _group(mesh: FoldedMesh, key: Any) -> Any:
    return _GROUPS[dist.group.WORLD][mesh.virtual, key]


class Wires:
    """What is under way in one call: between processes, or between the stages that one process plays or has."""

    def __init__(self, mesh: FoldedMesh, pipelining: Pipelining):
        self.mesh, self.pipelining = mesh, pipelining
        self.under_way: dict[Channel, deque[Any]] = defaultdict(deque)

    def send(self, action: Action, values: Sequence[Any]) -> None:
        """Sends to a neighbour, when it has received enough of what was sent before."""
        wire = self.pipelining.channel(action)
        if self._inside(wire):
            self.under_way[wire].append(values)
            return
        self._wait(wire, self.pipelining.under_way - 1)
        peer, group = self._peer(wire[1]), self._group(wire)
        self.under_way[wire].append([(dist.isend(x, peer, group), x) for x in (v.contiguous() for v in values)])

    def receive(self, action: Action, nodes: Sequence[fx.Node]) -> list[Any]:
        """What comes from a neighbour: the values of these nodes."""
        wire = self.pipelining.channel(action)
        if self._inside(wire):
            found: list[Any] = self.under_way[wire].popleft()
            return found
        peer, group = self._peer(wire[0]), self._group(wire)
        buffers = [torch.empty_like(like(n), device=self.mesh.device_type) for n in nodes]
        sender = action.stage + RECEIVES[action.kind]
        with self._meeting(f"what stage {action.stage} receives from stage {sender} over pp", peer, nodes):
            for work in [dist.irecv(x, peer, group) for x in buffers]:
                self._wait_for(work)
        return buffers

    def finish(self) -> None:
        """Waits until all that was sent has been received."""
        for wire in self.under_way:
            if not self._inside(wire):
                self._wait(wire, 0)

    def _wait(self, wire: Channel, many: int) -> None:
        """Waits until no more than so many sends are under way."""
        place, to, _ = wire
        with self._meeting(f"what stage {place} sends to stage {to} over pp", self._peer(to)):
            while len(self.under_way[wire]) > many:
                for work, _ in self.under_way[wire].popleft():
                    self._wait_for(work)

    def _inside(self, wire: Channel) -> bool:
        """Whether one process is at both ends."""
        return self.mesh.is_virtual or wire[0] == wire[1]

    def _wait_for(self, work: Any) -> None:
        """Gloo takes the timeout of a group for what is sent to one rank only when it is told; NCCL would block this thread."""
        work.wait(patience(self.mesh)) if self.mesh.device_type == "cpu" else work.wait()

    def _meeting(self, what: str, peer: int, nodes: Sequence[fx.Node] = ()) -> AbstractContextManager[None]:
        module = next(filter(None, map(module_of, nodes)), None)
        return meeting(lambda error: Place(what, module, tuple(sorted((peer, dist.get_rank())))))

    def _group(self, wire: Channel) -> Any:
        sender, receiver, step = wire
        return _group(self.mesh, (step, (receiver - sender) * step < 0))

    def _peer(self, place: int) -> int:
        return place * self.mesh.stage.world_size + self.mesh.stage.here
