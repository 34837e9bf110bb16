"""What one micro-batch adds to a mean over those of a call: a program is of one, and does not know how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from foldcc.ops.operator import Operator, operator

_COUNT: ContextVar[int] = ContextVar("foldcc_micro_batches", default=1)


@contextmanager
def micro_batches(count: int) -> Iterator[None]:
    """Says how many a call has."""
    token = _COUNT.set(count)
    try:
        yield
    finally:
        _COUNT.reset(token)


share: Operator = operator(
    "share(Tensor x) -> Tensor",
    meaning="the value over the number of micro-batches of a call: itself, where there is one",
    eager=lambda x: x.clone() if _COUNT.get() == 1 else x / _COUNT.get(),
    shape=lambda x: torch.empty_like(x),
    transpose=lambda grad, x: share(grad),
)
