"""What autocast does with the nodes of our own: like matrix products, they compute in its dtype.

It makes casts of them while a model is captured, as it does of every operator of PyTorch's. So casts are in the graph,
and what runs later needs no autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
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
    narrowed, returned = [i for i, n in enumerate(names) if n in cast], None if returns is None else names.index(returns)
    for device in _DEVICES:

        def call(*args: Any, device: str = device) -> Any:
            return in_autocast_dtype(overload, args, device, narrowed, returned)

        LIBRARY.impl(overload._schema.name.split("::")[1], call, f"Autocast{device.upper()}")


def in_autocast_dtype(
    function: Callable[..., Any], args: Sequence[Any], device: str, cast: Collection[int], returned: int | None
) -> Any:
    """What a function makes of arguments of which some are cast to autocast's dtype, in that of another one if it is said.

    Args:
        cast: positions of the arguments that are cast; a call may leave defaults out.
        returned: the position of the one whose dtype the result is cast back to.
    """
    dtype = torch.get_autocast_dtype(device)
    with torch._C._DisableAutocast():
        result = function(*(_cast(x, dtype) if i in cast else x for i, x in enumerate(args)))
        return result if returned is None else result.to(args[returned].dtype)


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As PyTorch casts: not what is no real number, and not float64."""
    return x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)
