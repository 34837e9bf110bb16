"""Precision: in which dtypes a model is computed, and its gradients are added."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from foldcc.errors import FoldError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Dtype = Any  # a torch.dtype, or its name


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtypes of a program whose parameters and optimizer keep theirs. Each is a `torch.dtype` or its name.

    Attributes:
        compute: of matrix products, attention and experts, and of what is made of their results alone, element by element. What
            is read of wider values is cast where it is read. Norms, softmax, exponentials, sums and losses are computed in
            float32 at least, and so is what is made of values of both kinds, such as residual streams.
        reduce: in which the gradients of parameters are added over ranks, whatever dtype they have before and behind it; those
            in float64 stay so.
        router: of the products whose results choose and weigh experts.
    """

    compute: Dtype = torch.bfloat16
    reduce: Dtype = torch.float32
    router: Dtype = torch.float32

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _dtype(field.name, getattr(self, field.name)))
        if self.reduce == torch.float16:
            most = int(torch.finfo(torch.float16).max)
            raise FoldError(
                f"reduce=float16 adds gradients up to {most}, and one of 1 is 65536 where GradScaler begins to scale losses.",
                valid="reduce='float32'",
            )
        for name in ("reduce", "router"):
            own = getattr(self, name)
            if _digits(own) < _digits(self.compute):
                raise FoldError(
                    f"{name}={_name(own)} keeps {_digits(own)} binary digits of the {_digits(self.compute)} that "
                    f"compute={_name(self.compute)} has.",
                    valid=", ".join(_name(d) for d in _DTYPES if _digits(d) >= _digits(self.compute) and d != torch.float16),
                )

    def __str__(self) -> str:
        return " ".join(f"{field.name}={_name(getattr(self, field.name))}" for field in fields(self))

    @classmethod
    def parse(cls, text: str) -> Precision:
        """The policy that prints as `text`."""
        given = dict(part.partition("=")[::2] for part in text.split())
        unknown = [name for name in given if name not in {field.name for field in fields(cls)}]
        if unknown:
            raise FoldError(f"A precision says nothing of {unknown[0]!r}.", valid=str(cls()))
        return cls(**given)


def _dtype(field: str, given: Dtype) -> torch.dtype:
    for dtype in _DTYPES:
        if given in (dtype, _name(dtype)):
            return dtype
    raise FoldError(f"{field}={given} is no dtype of a precision.", valid=", ".join(map(_name, _DTYPES)))


def _digits(dtype: torch.dtype) -> int:
    return 1 - int(math.log2(torch.finfo(dtype).eps))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
