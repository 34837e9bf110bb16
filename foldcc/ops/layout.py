"""Operators that say how a value lies on the ranks and compute nothing: localize turns them into collectives, or nothing."""

from __future__ import annotations

from typing import Any

from foldcc.layout import Layout


def reshard(x: Any, layout: Layout) -> Any:
    """The same global value in another layout."""
    return x


def cross_fold(x: Any, layout: Layout | None = None) -> Any:
    """The same local value, read on the other side of the mesh; free, because both sides count the same ranks in order."""
    return x
