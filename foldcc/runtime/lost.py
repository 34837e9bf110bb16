"""When a rank does not come: what the others say, instead of a timeout without a name.

A rank that has waited in vain writes down where, in the store at which ranks met first, and reads what others wrote: those of
its group that wait at the same place have arrived, and the rest have not. A rank that ends with an exception leaves it there.
"""

from __future__ import annotations

import linecache
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import fx

from foldcc.errors import FoldError, listed
from foldcc.ir.sizes import axes_of, communicates
from foldcc.ir.walk import module_of
from foldcc.mesh import FoldedMesh
from foldcc.ops import record

_WAITS, _RAISED = "foldcc/waits/", "foldcc/raised/"
_GRACE = 2.0  # seconds until the others have noticed too: the first that gives up closes its connections


class Place(NamedTuple):
    """Where ranks meet.

    Attributes:
        what: the collective and its axes.
        module: that it serves, if it is known.
        ranks: of its group, counted in the world.
    """

    what: str
    module: str | None
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return self.what if self.module is None else f"{self.what}, for {self.module}"


class RankLost(FoldError):
    """Some ranks did not come."""

    __module__ = "foldcc"


@contextmanager
def meeting(place: Callable[[BaseException], Place | None]) -> Iterator[None]:
    """Says of an error of a process group inside this context who did not come.

    Args:
        place: where this rank was when it was raised; None if it is no error of a process group.
    """
    try:
        yield
    except RuntimeError as error:
        found = place(error)
        if found is None:
            raise
        raise _lost(found, error) from error


def collective_at(mesh: FoldedMesh, error: BaseException) -> Place | None:
    """The collective of a block that raised, read off the line of the block's code that was running."""
    node = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        graph = frame.f_locals.get("self")
        if isinstance(graph, fx.GraphModule) and "eval_with_key" in frame.f_code.co_filename:
            name = re.match(r"\s*(\w+)", linecache.getline(frame.f_code.co_filename, number))
            node = next((n for n in graph.graph.nodes if name and n.name == name[1]), None)
    if node is None or not communicates(node):
        return None
    known = record(node.target)
    assert known is not None
    first = dist.get_rank() - mesh.here
    ranks = tuple(first + r for r in mesh.group_of(mesh.here, axes_of(node)))
    return Place(f"{known.name} over {','.join(axes_of(node))}", module_of(node) or None, ranks)


def _lost(place: Place, error: BaseException) -> RankLost:
    waits: dict[int, str] = {}
    raised: dict[int, str] = {}
    me, told = dist.get_rank(), str(error).strip().splitlines()[0]
    store: Any = dist.distributed_c10d._get_default_store()
    try:
        store.set(f"{_WAITS}{me}", str(place))
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and not raised and not set(place.ranks) <= waits.keys():
            time.sleep(0.05)
            waits, raised = _read(store, _WAITS), _read(store, _RAISED)
    except dist.DistError:
        return RankLost(
            f"The rank that keeps the store at which ranks meet, usually 0, has ended, and {place.what} waits for others.",
            at=place.module,
            error=told,
            valid="its own output, which says why",
        )
    if raised:
        rank = min(raised)
        return RankLost(f"Rank {rank} raised, and {place.what} waited for it.", at=place.module, raised=raised[rank].strip())
    absent = [r for r in place.ranks if waits.get(r) != str(place)]
    others = [f"{r}: {waits[r]}" for r in absent if r in waits]
    alike = f"All ranks arrived at {place.what}, and it failed."
    return RankLost(
        f"Rank {listed(absent)} did not arrive at {place.what}." if absent else alike,
        at=place.module,
        ranks=listed(place.ranks),
        elsewhere="\n".join(others) or None,
        error=told,
    )


def _read(store: Any, kind: str) -> dict[int, str]:
    keys = {rank: f"{kind}{rank}" for rank in range(dist.get_world_size())}
    return {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}


def tell_what_is_raised() -> None:
    """From now on, an exception that ends this process is told to ranks that wait for it."""
    if not _before:  # once: torch.distributed wraps what it finds each time that it is initialised
        _before.append(sys.excepthook)
        sys.excepthook = _told


_before: list[Any] = []


def _told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if dist.is_initialized() and not isinstance(error, RankLost):
        store: Any = dist.distributed_c10d._get_default_store()
        try:
            store.set(f"{_RAISED}{dist.get_rank()}", "".join(traceback.format_exception(kind, error, trace)))
        except dist.DistError:
            pass  # who keeps it has ended before, and nobody can be told
    _before[0](kind, error, trace)
