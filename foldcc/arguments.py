"""What a user gives has to be of a kind: an error says of which, where it is given."""

from __future__ import annotations

from typing import Any

from foldcc.errors import FoldError


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
