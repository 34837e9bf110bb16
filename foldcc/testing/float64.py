"""Comparing in real float64, although the model casts to float32 inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_LOW = {torch.float32, torch.float16, torch.bfloat16}
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


def in_float64() -> TorchFunctionMode:
    """A context in which every cast to a lower float type is a cast to float64.

    Models compute norms, routers and losses in float32 whatever the type of their weights, and so hide every error
    below 1e-7. In this context a float64 model stays in float64, when it runs and when it is captured, and two ways of
    computing the same thing agree to about 1e-15:

        with in_float64():
            folded = foldcc.parallelize(model.double(), mesh, example_inputs=inputs)
            error = folded(**inputs).loss - model(**inputs).loss

    Integers, and tensors that are in a lower type already, stay as they are.
    """
    return _InFloat64()


class _InFloat64(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        target = torch.Tensor.double if func in _CASTS else func
        return target(*map(_lifted, args), **{name: _lifted(x) for name, x in (kwargs or {}).items()})


def _lifted(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _LOW else argument
