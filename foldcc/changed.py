"""Names of another module that stand for something else for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def changed(namespace: dict[str, Any], changes: dict[str, Any]) -> Iterator[None]:
    """Sets some names of a namespace inside this context; afterwards they are as they were."""
    before = {name: namespace[name] for name in changes if name in namespace}
    namespace.update(changes)
    try:
        yield
    finally:
        for name in changes:
            namespace.pop(name, None)
        namespace.update(before)
