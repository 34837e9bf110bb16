"""What training resumes from, and weights that come from a model's library: stored by each rank, and read by each rank."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from foldcc.checkpoints.loading import load as _load_pretrained
from foldcc.checkpoints.resuming import load as _load
from foldcc.checkpoints.training import Saving
from foldcc.checkpoints.training import save as _save
from foldcc.errors import FoldError
from foldcc.module import FoldedModule


def load_pretrained(
    model: FoldedModule, folder: str | os.PathLike[str], *, cast: bool = False, strict: bool = True
) -> FoldedModule:
    """Fills a folded model from safetensors, as `from_pretrained` fills a plain one; each rank reads the part that it holds.

    Collective. The tensors are renamed and rearranged by the model's library, by the functions that `from_pretrained` uses, and
    a plain module's are called as its own. A model on meta is allocated. Nothing is changed unless everything fits.

    Args:
        folder: holds model.safetensors, or several files and an index.
        cast: also where numbers are rounded, such as float32 in a model of bfloat16. Other casts are made anyway.
        strict: False leaves what the checkpoint lacks as it is, and ignores what the model lacks.

    Returns:
        The model.

    Raises:
        FoldError: a file is missing or cut off, weights are quantised, or names, shapes or dtypes do not fit: which.
    """
    _check_folded(model, "load_pretrained")
    _load_pretrained(model, Path(folder), cast=cast, strict=strict)
    return model


def save(
    folder: str | os.PathLike[str],
    model: FoldedModule,
    optimizer: Optimizer | Iterable[Optimizer] = (),
    *,
    step: int = 0,
    wait: bool = True,
    **more: Any,
) -> Saving:
    """Stores all that training resumes from, by torch.distributed.checkpoint: each rank its part. Collective.

    It is written beside the checkpoints that there are, gets the name `step-{step}` when it is complete, and then the file
    `latest` names it. Whatever interrupts that, the one before is what `load` finds.

    Args:
        folder: of all checkpoints of a run, in a file system that all ranks see.
        optimizer: one, or several in an order that `load` is given too.
        step: how many steps were made.
        wait: False returns as soon as everything is copied to host memory, and threads write it. Another `save` waits for them.
        more: anything that can be pickled, such as the position in the data and the state of a schedule; the first rank's.
            The state of PyTorch's random generator is stored as well.

    Returns:
        With `wait()`, which gives the checkpoint's folder when it is complete.

    Raises:
        FoldError: the folder cannot be written, a rank could not write its part, or an optimizer is of other parameters.
    """
    _check_folded(model, "save")
    return _save(Path(folder), model, _several(optimizer), step, more, wait)


def load(
    folder: str | os.PathLike[str],
    model: FoldedModule,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    step: int | None = None,
) -> dict[str, Any]:
    """Resumes from what `save` stored, on the same fold or any other. Collective.

    Parameters, buffers and what optimizers keep are equal bit for bit. What is missing, cut off or does not fit is named before
    anything is changed.

    Args:
        folder: the one that `save` was given.
        optimizer: as for `save`, stepped or new; None loads the model alone.
        step: the last complete checkpoint, unless it is said.

    Returns:
        `step`, and `more` as `save` was given it. PyTorch's random generator is where it was.

    Raises:
        FoldError: there is no such checkpoint, or it is of another model or optimizer.
    """
    _check_folded(model, "load")
    return _load(Path(folder), model, None if optimizer is None else _several(optimizer), step)


def _several(optimizer: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def _check_folded(model: nn.Module, what: str) -> None:
    if not isinstance(model, FoldedModule):
        raise FoldError(f"{what} takes a folded model, not {type(model).__name__}.", valid="what parallelize returns")
