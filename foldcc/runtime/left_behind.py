"""An optimizer that was made before the model was folded, over parameters that nobody trains any more."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from foldcc.errors import FoldError

_folded: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by a parameter of an original: a reference to the folded module
_watching: list[Any] = []


def notice_optimizers(model: nn.Module, folded: nn.Module) -> None:
    """From now on a step over parameters of the original is an error, if it is the folded ones that have gradients."""
    reference = weakref.ref(folded)
    for parameter in model.parameters():
        _folded[parameter] = reference
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"] if p in _folded]
    if not held or any(p.grad is not None for p in held):
        return  # it trains other parameters, or the original itself
    folded = _folded[held[0]]()
    if folded is not None and any(p.grad is not None for p in folded.parameters()):
        raise FoldError(
            f"{type(optimizer).__name__} was made before parallelize: its {len(held)} parameters are the original model's, "
            "none has a gradient, and those of the folded model are others.",
            valid="an optimizer that is made afterwards, over folded.parameters()",
        )
