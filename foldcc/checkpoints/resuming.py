"""Training that is resumed: what is on disk is looked at, and what does not fit is named, before anything is changed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from foldcc.checkpoints import optimizers as states
from foldcc.checkpoints.loading import set_unsaved
from foldcc.checkpoints.tensors import some
from foldcc.checkpoints.training import LATEST, MODEL, MORE, told_by_rank
from foldcc.errors import FoldError, listed
from foldcc.runtime.agreement import together

if TYPE_CHECKING:
    from foldcc.module import FoldedModule


def load(folder: Path, model: FoldedModule, optimizers: list[Optimizer] | None, step: int | None) -> dict[str, Any]:
    """Resumes training, see `foldcc.load`."""
    mesh = model.mesh
    place, stored = together(mesh, lambda: _opened(folder, step))
    together(mesh, lambda: _check(model, place, stored))
    whole: dict[str, Any] = {MORE: None}
    _read(whole, place, mesh.is_virtual)
    more = pickle.loads(whole[MORE])
    told = more["optimizers"]
    given = optimizers or []
    if optimizers is not None:
        together(mesh, lambda: states.check(model, given, told))
    with torch.no_grad():
        set_unsaved(model)
        state = model.state_dict()
        kept = states.room(model, given, told, stored.state_dict_metadata)
        _read({**{MODEL + name: x for name, x in state.items()}, **kept}, place, mesh.is_virtual)
        model.load_state_dict(state)
        states.take(model, given, told, kept)
    torch.set_rng_state(more["random"])
    return {"step": more["step"], **more["given"]}


def _read(state: dict[str, Any], place: Path, alone: bool) -> None:
    with told_by_rank(f"{place} could not be read."):
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.load(state, storage_reader=FileSystemReader(place), planner=planner, no_dist=alone)


def _opened(folder: Path, step: int | None) -> tuple[Path, Metadata]:
    """A checkpoint that is complete, and what it holds."""
    complete = sorted(p.parent.name for p in folder.glob("step-*/.metadata") if not p.parent.name.endswith(".incomplete"))
    if step is None:
        pointer = folder / LATEST
        name = pointer.read_text() if pointer.exists() else None
    else:
        name = next((n for n in reversed(complete) if n == f"step-{step}" or n.startswith(f"step-{step}-")), None)
    if name is None or name not in complete:
        raise FoldError(
            f"There is no checkpoint{'' if step is None else f' of step {step}'}"
            + (f" called {name}, which {LATEST} names." if name else "."),
            folder=folder,
            there=listed(complete) or "no complete one",
            valid="step=, one of those that are there; or a folder that foldcc.save wrote",
        )
    place = folder / name
    try:
        stored = FileSystemReader(place).read_metadata()
    except (EOFError, pickle.UnpicklingError) as error:
        raise FoldError(f"{place / '.metadata'} is cut off.", error=error, valid=_other(complete, name)) from error
    ends: dict[str, int] = {}
    for part in stored.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for file, end in sorted(ends.items()):
        size = (place / file).stat().st_size if (place / file).exists() else None
        if size is None or size < end:
            what = "is missing" if size is None else f"is cut off: {size} bytes of {end}"
            raise FoldError(f"{place / file} {what}.", valid=_other(complete, name))
    return place, stored


def _other(complete: list[str], name: str) -> str:
    others = [n for n in complete if n != name]
    return f"step=, for another checkpoint: {listed(others)}" if others else "a copy of the file"


def _check(model: FoldedModule, place: Path, stored: Metadata) -> None:
    on_meta = [name for name, p in model.named_parameters() if p.is_meta]
    if on_meta:
        raise FoldError(
            f"{on_meta[0]} is on meta and has no values to write over.",
            valid='folded.to_empty(device="cpu"), and the optimizer behind it',
        )
    there = {n.removeprefix(MODEL): x for n, x in stored.state_dict_metadata.items() if n.startswith(MODEL)}
    own = {name: x for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
    missing = sorted(own.keys() - there.keys())
    extra = sorted(there.keys() - own.keys() - model._elsewhere.names.keys())
    other = []
    for name in own.keys() & there.keys():
        entry, x = there[name], own[name]
        assert isinstance(entry, TensorStorageMetadata)
        if (entry.size, entry.properties.dtype) != (x.shape, x.dtype):
            other.append(f"{name}: {entry.properties.dtype} {list(entry.size)} for {x.dtype} {list(x.shape)}")
    if missing or extra or other:
        raise FoldError(
            f"The checkpoint is of another model: {len(missing)} tensors are missing, {len(extra)} are not the model's, "
            f"{len(other)} have another shape or dtype.",
            checkpoint=place,
            missing=some(missing),
            extra=some(extra),
            other=some(sorted(other)),
            valid="the model that was stored, in the same dtype",
        )
