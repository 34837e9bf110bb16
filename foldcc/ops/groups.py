"""Where the operators find their ranks: the mesh that is active, and this rank's place on it.

A graph names axes ("tp", "dp,tp"), never ranks or process groups, so that one graph serves every rank and process.
The mesh is made active around each run; backward passes may run in another thread, so they make it active themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

from foldcc.errors import FoldError
from foldcc.mesh import FoldedMesh

_ACTIVE: ContextVar[FoldedMesh | None] = ContextVar("foldcc_mesh", default=None)
# By the world's process group, since the groups of one that was destroyed are of no use to the next, and by ranks alone: a mesh
# with its DeviceMeshes refers to the world's group, which would then never go, and each of its groups has three threads.
_GROUPS: WeakKeyDictionary[Any, dict[tuple[FoldedMesh, str], Any]] = WeakKeyDictionary()


@contextmanager
def active(mesh: FoldedMesh) -> Iterator[None]:
    """Makes `mesh` the one that axis names refer to."""
    token = _ACTIVE.set(mesh)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def current() -> FoldedMesh:
    mesh = _ACTIVE.get()
    if mesh is None:
        raise FoldError("A foldcc collective ran outside of a folded module, so its axes have no mesh.")
    return mesh


def size(axes: str) -> int:
    """Ranks of a group over `axes` on the active mesh."""
    mesh, ranks = current(), 1
    for axis in axes.split(","):
        ranks *= mesh.size(axis)
    return ranks


def index(axes: str) -> int:
    """This process's position in its group over `axes`."""
    mesh = current()
    return mesh.index(mesh.here, tuple(axes.split(",")))


def create_groups(mesh: FoldedMesh, all_axes: list[str]) -> None:
    """Creates the process groups for each combination of axes, in the same order on every rank.

    Of a mesh that is one pipeline stage, those of every stage.
    """
    import torch.distributed as dist

    firsts = range(0, dist.get_world_size(), mesh.world_size)

    known = _GROUPS.setdefault(dist.group.WORLD, {})
    for axes in sorted(set(all_axes)):
        if (mesh.virtual, axes) not in known:
            groups = [[first + r for r in group] for first in firsts for group in mesh.groups(tuple(axes.split(",")))]
            known[mesh.virtual, axes], _ = dist.new_subgroups_by_enumeration(groups, timeout=patience(mesh))


def patience(mesh: FoldedMesh) -> timedelta:
    """How long ranks wait for others: as long as in the group of the world, which the user has made."""
    import torch
    import torch.distributed as dist

    world: Any = dist.group.WORLD
    options = world._get_backend(torch.device("cpu" if mesh.is_virtual else mesh.device_type)).options
    found: timedelta = dist.constants.default_pg_timeout if options is None else options._timeout  # a fake group has none
    return found


def process_group(axes: str) -> Any:
    """The process group of this rank over `axes`; `create_groups` has made it."""
    import torch.distributed as dist

    return _GROUPS[dist.group.WORLD][current().virtual, axes]
