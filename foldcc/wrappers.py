"""What other tools wrap around a model: no model is folded inside a wrapper, and no folded model is put into one."""

from __future__ import annotations

from typing import Any

from torch import nn

from foldcc.errors import FoldError
from foldcc.hooks import named

# By the name of its class, what a wrapper does, and where it has the model.
_WRAPPERS = {
    "DataParallel": ("parallel already", "module"),
    "DistributedDataParallel": ("parallel already", "module"),
    "FullyShardedDataParallel": ("parallel already", "module"),
    "OptimizedModule": ("compiled already", "_orig_mod"),
}


def refuse_wrapped(model: nn.Module) -> None:
    """Raises for a model that is inside a wrapper, or whose parameters are quantised."""
    for path, module in model.named_modules():
        names = [c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.") and c.__name__ in _WRAPPERS]
        for done, attribute in map(_WRAPPERS.__getitem__, names[:1]):
            raise FoldError(
                f"{named(path, module)} is {done}.",
                valid=f"what is inside: .{attribute}; parallelize is told what else is wanted, as by zero= and kernels=",
            )
    for name, p in model.named_parameters():
        if not p.dtype.is_floating_point and not p.dtype.is_complex:
            raise FoldError(
                f"Parameter {name} holds {str(p.dtype).removeprefix('torch.')}, as quantised weights do.",
                valid="the model before it is quantised; a buffer, for integers that are no weights",
            )


class AsksFirst:
    """An attribute that a wrapper asks a model for before it wraps it; on processes, folded models answer with an error."""

    def __init__(self, wrapper: str, valid: str):
        self.wrapper, self.valid = wrapper, valid

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, folded: Any, owner: type | None = None) -> Any:
        if folded is None or "mesh" not in vars(folded) or folded.mesh.is_virtual:
            raise AttributeError(self.name)
        raise FoldError(f"A folded model reduces its own gradients, and {self.wrapper} would do so again.", valid=self.valid)
