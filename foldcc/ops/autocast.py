"""What autocast does with the nodes of our own: like matrix products, they compute in its dtype.

It makes casts of them while a model is captured, as it does of every operator of PyTorch's. So casts are in the graph,
and what runs later needs no autocast.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from foldcc.ops.operator import LIBRARY

_DEVICES = ("cpu", "cuda")


def computes_in_autocast_dtype(overload: Any, cast: Collection[str], *, returns: str | None = None) -> None:
    """Registers what autocast does with an operator.

    Args:
        cast: the arguments that are cast.
        returns: the argument whose dtype the result is cast back to; None if it stays in autocast's.
    """
    names = [a.name for a in overload._schema.arguments]
    for device in _DEVICES:

        def call(*args: Any, device: str = device) -> Any:
            dtype = torch.get_autocast_dtype(device)
            with torch._C._DisableAutocast():
                named = zip(names, args, strict=False)  # a call may leave defaults out
                given = [_cast(x, dtype) if name in cast else x for name, x in named]
                result = overload(*given)
                return result if returns is None else result.to(args[names.index(returns)].dtype)

        LIBRARY.impl(overload._schema.name.split("::")[1], call, f"Autocast{device.upper()}")


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As PyTorch casts: not what is no real number, and not float64."""
    return x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)
