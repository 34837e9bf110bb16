"""The error a user sees: what is wrong in one sentence, then where, on which mesh, and what would be valid.

foldcc.FoldError: 60 experts do not divide over ep=8 (60 = 7 * 8 + 4).
  at      model.layers.3.mlp.experts (modeling_qwen2_moe.py:241)
  mesh    dp=4,tp=2|ep=8
  valid   ep: 1, 2, 3, 4, 5, 6
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt
from typing import Any


class FoldError(ValueError):
    """A model, a mesh or an input that foldcc cannot fold, with the facts that say why.

    `message` is one sentence with the arithmetic in it. Every keyword is one fact and becomes one aligned line, in the
    order given (`at`, `mesh`, `valid`, ...); a fact that is None is left out. Both stay readable as attributes.
    """

    __module__ = "foldcc"  # a traceback shows the name that a user imports

    def __init__(self, message: str, **facts: object) -> None:
        self.message = message
        self.facts = {label: fact for label, fact in facts.items() if fact is not None}
        super().__init__(_render(message, self.facts))

    def __str__(self) -> str:
        return _render(self.message, self.facts)  # whatever an interpreter of graphs has added to the arguments


class NotFolded(FoldError, AttributeError):
    """An attribute of the original model that the folded one does not have; `hasattr` is False."""

    __module__ = "foldcc"


def _render(message: str, facts: dict[str, object]) -> str:
    width = max([7, *map(len, facts)])
    below = "\n" + " " * (width + 3)  # the further lines of a fact stand under its first
    return "\n".join([message, *(f"  {label:<{width}} {fact}".replace("\n", below) for label, fact in facts.items())])


def require(name: str, x: Any, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Raises unless an argument is of one of these kinds; True and False are numbers only where they are named.

    Args:
        wanted: what it has to be, as in "a mesh as text".

    Raises:
        FoldError: it is something else.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(x, kinds) or (isinstance(x, bool) and bool not in kinds):
        told = f"{type(x).__name__}" if len(repr(x)) > 40 else f"{type(x).__name__} {x!r}"
        raise FoldError(f"{name} is {wanted}, not the {told}.")


def divides(what: str, size: int, axis: str, n: int, **facts: object) -> int:
    """The share of one rank when `size` things, named `what`, are split over the `n` ranks of `axis`.

    Raises:
        FoldError: `n` does not divide `size`. Unless the caller knows better (`valid=`), the valid sizes are the
            divisors of `size` below `n`.
    """
    share, rest = divmod(size, n)
    if not rest:
        return share
    facts.setdefault("valid", f"{axis}: {listed(d for d in divisors(size) if d < n)}")
    raise FoldError(f"{size} {what} do not divide over {axis}={n} ({size} = {share} * {n} + {rest}).", **facts)


def divisors(n: int) -> tuple[int, ...]:
    """All divisors of a positive `n`, ascending."""
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


def listed(things: Iterable[object]) -> str:
    """`1, 2, 4`: values as an error shows them."""
    return ", ".join(map(str, things))
