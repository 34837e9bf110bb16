"""Weights as the model's library has them on disk: nobody holds all of them to write them.

The ranks of a pipeline stage gather one tensor after the other, and each rank writes other files. They write beside what there
is, and what is complete is moved into its place.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from foldcc.capture.pretrained import as_stored, is_adapted, kept_name, store_configuration
from foldcc.checkpoints import files
from foldcc.checkpoints.pieces import Piece, leaf, whole
from foldcc.checkpoints.tensors import held, some, tensors
from foldcc.errors import FoldError
from foldcc.mesh import FoldedMesh
from foldcc.runtime.agreement import together, told_by_all
from foldcc.runtime.placement import redistributed
from foldcc.runtime.wires import on_all_places

if TYPE_CHECKING:
    from foldcc.module import FoldedModule

Names = Mapping[str, list[str]]  # of each tensor, by the one that it has in the checkpoint


def store(model: FoldedModule, folder: Path, *, most: int) -> None:
    """Writes a folded model, see `FoldedModule.save_pretrained`."""
    mesh, original, beside = model.mesh, model._compiler.model, folder / ".incomplete"
    here = 0 if mesh.is_virtual else dist.get_rank()
    names, unread, now = {}, {}, _Gathered(model)
    for all_names, shape, dtype in _all(model):
        name = kept_name(original, all_names)
        names[name] = all_names
        unread[name] = leaf(shape, dtype, name, now.reader(name))
    outputs: dict[str, Any] = as_stored(original, unread)
    adapted = is_adapted(original)
    # PEFT reads one file, of all stages.
    plan = {files.ADAPTER: (0, outputs)} if adapted else _planned(mesh, outputs, _homes(model, names), most)
    together(mesh, lambda: _writable(folder, lambda: _emptied(beside)) if here == 0 else None)
    failed: OSError | None = None
    for title, (writer, each) in plan.items():
        if not adapted and writer // mesh.stage.world_size != here // mesh.stage.world_size:
            continue
        file = files.Writer(beside / title, each) if writer == here else None
        for output, x in each.items():
            now.gather(names, x.leaves, {name: unread[name] for name in x.leaves} if adapted else {})
            if file is not None:
                file.write(output, whole(x))
        if file is not None:
            file.close()
            failed = failed or file.failed
    now.clear()

    def complete() -> None:
        if failed is not None:
            raise failed
        _synced([beside / title for title, (writer, _) in plan.items() if writer == here])

    try:
        together(mesh, lambda: _writable(folder, complete))
    except FoldError:
        if here == 0:
            shutil.rmtree(beside, ignore_errors=True)  # what is half written would only fill the disk
        raise
    dtype = next((x.dtype for x in unread.values() if x.dtype.is_floating_point), torch.get_default_dtype())

    def moved() -> None:
        store_configuration(original, beside, dtype)
        if len(plan) > 1:
            size = sum(x.numel() * x.element_size() for x in outputs.values())
            (beside / files.INDEX).write_text(files.index_of({t: list(each) for t, (_, each) in plan.items()}, size))
        _moved(beside, folder)

    together(mesh, lambda: _writable(folder, moved) if here == 0 else None)


class _Gathered(dict[str, Tensor]):
    """The tensors that are whole at the moment, by name."""

    def __init__(self, model: FoldedModule):
        super().__init__()
        self.model = model

    def reader(self, name: str) -> Callable[[tuple[slice, ...]], Tensor]:
        return lambda at: self[name][at] if at else self[name]

    def gather(self, names: Names, wanted: tuple[str, ...], like: Mapping[str, Piece]) -> None:
        """Has these tensors, and no others. Collective over the ranks of a pipeline stage.

        Args:
            like: those that may be on another stage; then it is collective over the world.
        """
        for name in self.keys() - set(wanted):
            del self[name]
        for name in wanted:
            if name not in self:
                x = _whole(self.model, names[name])
                if name in like:
                    x = _wherever(self.model, x, like[name].shape, like[name].dtype)
                assert x is not None
                self[name] = x.cpu()


def whole_values(model: FoldedModule) -> Iterator[tuple[list[str], Tensor]]:
    """Each tensor that checkpoints hold, on every rank, with its names, wherever it is. Collective over the world."""
    for names, shape, dtype in _all(model):
        yield names, _wherever(model, _whole(model, names), shape, dtype)


def _all(model: FoldedModule) -> list[tuple[list[str], torch.Size, torch.dtype]]:
    """The names, the shape and the dtype of each tensor. Collective over the world, where stages hold different ones."""
    elsewhere, found = model._elsewhere, []
    if elsewhere.divided:
        elsewhere.hear(told_by_all(model.mesh, elsewhere.own(model)))  # they may have been cast
    for names, own in tensors(model._compiler.model):
        x = held(model, names)
        found.append((names, own.shape, elsewhere.names[names[0]].dtype if x is None else x.dtype))
    return found


def _whole(model: FoldedModule, names: list[str]) -> Tensor | None:
    """A tensor, if this rank's stage holds it. Collective over the ranks of the stage."""
    x = held(model, names)
    with torch.no_grad():
        if isinstance(x, DTensor):
            x = redistributed(x, [Replicate()] * x.device_mesh.ndim).to_local()
        return None if x is None else x.detach()


def _wherever(model: FoldedModule, x: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What some stage holds, on every rank."""
    return on_all_places(torch.empty(shape, dtype=dtype, device="meta") if x is None else x, model.mesh)


def _planned(mesh: FoldedMesh, outputs: Mapping[str, Any], homes: Mapping[str, int], most: int) -> dict[str, Any]:
    """The files by name: the rank that writes each, and the tensors in it. The same on every rank."""
    plan = []
    for stage in range(mesh.size("pp")):
        theirs = {name: x for name, x in outputs.items() if _home(name, x, homes) == stage}
        ranks = 1 if mesh.is_virtual else mesh.stage.world_size
        for i, each in enumerate(files.split(theirs, most)):
            plan.append((0 if mesh.is_virtual else stage * ranks + i % ranks, each))
    if len(plan) == 1:
        return {files.SINGLE: plan[0]}
    return {f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors": each for i, each in enumerate(plan)}


def _homes(model: FoldedModule, names: Names) -> dict[str, int]:
    """The first pipeline stage that holds each tensor. Collective over the world."""
    mesh = model.mesh
    if mesh.is_virtual or mesh.size("pp") == 1:
        return dict.fromkeys(names, 0)
    told: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(told, [name for name, its in names.items() if held(model, its) is not None])
    homes: dict[str, int] = {}
    for rank, theirs in enumerate(told):
        for name in theirs:
            homes.setdefault(name, rank // mesh.stage.world_size)
    return homes


def _home(name: str, x: Piece, homes: Mapping[str, int]) -> int:
    stages = {homes[leaf] for leaf in x.leaves}
    if len(stages) > 1:
        raise FoldError(
            f"{name} is made of tensors on several pipeline stages.",
            of=some(f"{leaf} on stage {homes[leaf]}" for leaf in x.leaves),
            valid="foldcc.save; or a plan that puts these layers on one stage",
        )
    return stages.pop()


# --- on disk -----------------------------------------------------------------------------------------------------------


def _writable(folder: Path, work: Callable[[], None]) -> None:
    try:
        work()
    except OSError as error:
        raise FoldError(
            f"{folder} cannot be written, and is as it was: {error.strerror or error}.",
            file=error.filename,
            valid="a folder that may be written, with room for the weights",
        ) from error


def _emptied(beside: Path) -> None:
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)


def _synced(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _moved(beside: Path, folder: Path) -> None:
    """Moves what is complete into its place. What says which files make up a checkpoint goes first and comes last."""
    for old in (folder / files.INDEX, *folder.glob("model*.safetensors")):
        old.unlink(missing_ok=True)
    for new in sorted(beside.iterdir(), key=lambda p: p.name in (files.INDEX, files.SINGLE)):
        new.replace(folder / new.name)
    beside.rmdir()
