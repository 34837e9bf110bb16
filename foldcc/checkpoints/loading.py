"""Weights as the model's library has them on disk: each rank reads the part that it holds.

Every name, shape and dtype is looked at before the first value is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from foldcc.capture.pretrained import as_loaded
from foldcc.capture.transformers import initialiser
from foldcc.checkpoints import files
from foldcc.checkpoints.pieces import Piece, part
from foldcc.checkpoints.tensors import held, some, tensors
from foldcc.errors import FoldError
from foldcc.ops.random import everywhere
from foldcc.runtime.agreement import together
from foldcc.runtime.placement import positions

if TYPE_CHECKING:
    from foldcc.module import FoldedModule


def load(model: FoldedModule, folder: Path, *, cast: bool, strict: bool) -> None:
    """Fills a folded model, see `foldcc.load_pretrained`."""
    with ExitStack() as stack:
        wanted = together(model.mesh, lambda: _checked(model, stack.enter_context(files.opened(folder)), folder, cast, strict))
        if any(p.is_meta for p in model.parameters()):
            model.to_empty(device="cpu" if model.mesh.is_virtual else model.mesh.device_type)
        together(model.mesh, lambda: _read(model, wanted))


Wanted = list[tuple[list[str], list[Piece]]]  # the names of each tensor of the model, and what it is read from


def _checked(model: FoldedModule, stored: Mapping[str, Piece], folder: Path, cast: bool, strict: bool) -> Wanted:
    original = model._compiler.model
    loaded = as_loaded(original, stored)
    wanted: Wanted = []
    missing, shapes, rounded = [], [], []
    for names, own in tensors(original):
        mine = held(model, names)
        own = own if mine is None else mine
        found = [x.detach() for n in names if isinstance(x := loaded.tensors.get(n), Tensor)]
        if not found:
            missing += names[:1] if strict or (mine is not None and mine.is_meta) else []
            continue
        shapes += [f"{names[0]}: {list(x.shape)} for {list(own.shape)}" for x in found if x.shape != own.shape]
        read = [x for x in found if isinstance(x, Piece)]
        dtypes = {dtype for x in read for _, dtype in x.leaves}
        rounded += [f"{names[0]}: {d} for {own.dtype}" for d in dtypes if not _holds(own.dtype, d)]
        if mine is not None:
            wanted.append((names, read))
    extra = sorted(loaded.extra) if strict else []
    if missing or shapes or extra or loaded.failed:
        raise FoldError(
            f"The checkpoint is of another model than {type(original).__name__}: {len(missing)} tensors are missing, "
            f"{len(extra)} are not the model's, {len(shapes)} have other shapes.",
            folder=folder,
            missing=some(missing),
            extra=some(extra),
            shapes=some(shapes),
            failed=some(loaded.failed.values()),
            valid="the configuration that the checkpoint was made with; strict=False, for what both have, of the same shapes",
        )
    if rounded and not cast:
        raise FoldError(
            f"{len(rounded)} tensors would be rounded to another dtype.",
            rounded=some(rounded),
            valid="a model of the checkpoint's dtype, with precision=foldcc.Precision(...) to compute in another; or cast=True",
        )
    return wanted


def _holds(dtype: torch.dtype, stored: torch.dtype) -> bool:
    """Whether each number of one dtype is one of another."""
    if dtype == stored:
        return True
    if not (dtype.is_floating_point and stored.is_floating_point and min(dtype.itemsize, stored.itemsize) > 1):
        return False
    return torch.promote_types(dtype, stored) == dtype


def _read(model: FoldedModule, wanted: Wanted) -> None:
    with torch.no_grad():
        set_unsaved(model)
        for names, pieces in wanted:
            mine = held(model, names)
            assert mine is not None
            local = mine.to_local() if isinstance(mine, DTensor) else mine
            at = _own_positions(model, names, mine)
            if local.device.type == "cpu" and len(pieces) == 1:
                pieces[0].read(local, at)
                continue
            read = [part(x, at) for x in pieces]
            if any(not torch.equal(x, read[0]) for x in read[1:]):
                raise FoldError(f"{' and '.join(names)} are one tensor of the model, and several ones of the checkpoint.")
            local.copy_(read[0])


def _own_positions(model: FoldedModule, names: Iterable[str], x: Tensor) -> list[Tensor]:
    at = everywhere(x.shape, torch.device("cpu"))
    places = model._places
    layout = next((places.layouts[n] for n in names if n in places.layouts), None)
    if layout is None or not isinstance(x, DTensor):
        return at
    return positions(at, layout, places.mesh, places.mesh.here)


def set_unsaved(model: FoldedModule) -> None:
    """Buffers that no checkpoint holds, and that were on meta, as the model's library computes them."""
    original = model._compiler.model
    initialise, unset = initialiser(original), {name.rpartition(".")[0] for name in model._unset}
    if initialise is not None:
        for path in unset:
            initialise(model.get_submodule(path))
