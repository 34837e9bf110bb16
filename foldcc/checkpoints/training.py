"""Everything that training resumes from, on any fold: weights, optimizers, the step, random numbers, and what a script adds.

torch.distributed.checkpoint stores it, each rank its part. A checkpoint is written beside the others; when every rank is
through, it is given its name, and then `latest` names it. What is interrupted has no name and is removed by the next one.

    run/latest          the name of the last complete one
    run/step-2000/      .metadata, and the parts of each rank
    run/step-3000.incomplete/
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Optimizer

from foldcc.checkpoints import optimizers as states
from foldcc.errors import FoldError, listed
from foldcc.runtime.agreement import on_one_rank

if TYPE_CHECKING:
    from foldcc.module import FoldedModule

LATEST, MODEL, MORE = "latest", "model.", "more"
_UNFINISHED = ".incomplete"
_GROUPS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # for what is stored while training goes on, by the world's
_running: list[Saving] = []


@dataclass
class Saving:
    """A checkpoint that is being written."""

    folder: Path
    future: Future[Any] | None

    def wait(self) -> Path:
        """The folder of the checkpoint, when it is complete.

        Raises:
            FoldError: it was not written: on which rank, and why. The ones before are as they were.
        """
        if self.future is not None:
            with told_by_rank(f"{self.folder} was not written."):
                self.future.result()
        return self.folder


def save(
    folder: Path, model: FoldedModule, optimizers: list[Optimizer], step: int, more: Mapping[str, Any], wait: bool
) -> Saving:
    """Stores training, see `foldcc.save`."""
    while _running:
        _running.pop().wait()
    place, beside = on_one_rank(model.mesh, lambda: _prepared(folder, step))
    tensors, options_of = states.stored(model, optimizers)
    alike = {"step": step, "random": torch.get_rng_state(), "given": dict(more)}
    if not model.mesh.is_virtual:
        alike = _of_first(alike)
        options_of = states.of_all_stages(model.mesh, options_of)
    state: dict[str, Any] = {MODEL + name: x for name, x in model.state_dict().items()} | tensors
    state[MORE] = pickle.dumps({**alike, "optimizers": options_of})  # of containers, what is empty would be left out
    options: dict[str, Any] = {
        "storage_writer": _Writer(beside, place),
        "planner": DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        "no_dist": model.mesh.is_virtual,
    }
    if wait:
        with told_by_rank(f"{place} was not written."):
            dcp.save(state, **options)
        return Saving(place, None)
    group = None if model.mesh.is_virtual else _own_group()
    future = dcp.async_save(state, process_group=group, **options)
    assert isinstance(future, Future)
    saving = Saving(place, future)
    _running.append(saving)
    return saving


def _of_first(x: dict[str, Any]) -> dict[str, Any]:
    told = [x]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _own_group() -> Any:
    """A group for what threads send, so that it does not come between what programs send."""
    world = dist.group.WORLD
    if world not in _GROUPS:
        _GROUPS[world] = dist.new_group(backend="gloo")
    return _GROUPS[world]


def _prepared(folder: Path, step: int) -> tuple[Path, Path]:
    """Where a checkpoint will be, and where it is written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"*{_UNFINISHED}"):
            shutil.rmtree(left)
        names = [f"step-{step}", *(f"step-{step}-{i}" for i in range(2, 1000))]
        place = next(folder / name for name in names if not (folder / name).exists())
        beside = place.with_name(place.name + _UNFINISHED)
        beside.mkdir()
    except OSError as error:
        raise FoldError(
            f"{folder} cannot be written: {error.strerror}.", valid="a folder that may be written, the same for all ranks"
        ) from error
    return place, beside


class _Writer(FileSystemWriter):
    """Gives a checkpoint its name when every rank has written its part: `finish` runs on the first rank, behind all others."""

    def __init__(self, beside: Path, place: Path):
        super().__init__(beside)
        self.place = place

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, results)
        os.replace(self.path, self.place)
        pointer = self.place.with_name(LATEST)
        beside = pointer.with_name(LATEST + ".new")
        with beside.open("w") as file:
            file.write(self.place.name)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, pointer)


@contextmanager
def told_by_rank(message: str) -> Iterator[None]:
    """What torch.distributed.checkpoint raises, as an error of which rank and why."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on a virtual mesh it is
            yield
    except CheckpointException as error:
        cause, _ = error.failures[min(error.failures)]
        raise FoldError(message, rank=listed(error.failures), error=f"{type(cause).__name__}: {cause}") from error
