"""The same random numbers in a model in one process as in the folded one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

from foldcc.verification.drawn import Drawn


@contextmanager
def drawing_alike() -> Iterator[None]:
    """A context in which a model in one process draws the random numbers that its folded one draws from the same seed.

        torch.manual_seed(0)
        loss = folded(**batch).loss
        torch.manual_seed(0)
        with foldcc.testing.drawing_alike():
            wanted = model(**batch).loss

    Each call of a random operator takes one number from PyTorch's default generator, which is the key of what it draws; a
    folded model takes one for each draw that its program has. So both leave the generator in one state, and go on alike.

    Raises:
        FoldError: an operator draws what no program does, such as `poisson`.
    """
    with sdpa_kernel(SDPBackend.MATH), Drawn():
        yield
