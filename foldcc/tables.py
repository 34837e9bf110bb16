"""Plain tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Columns aligned under their heads, those numbered in `right` to the right."""
    flush = set(right)
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(head):
        shown.add_column(name, justify="right" if i in flush else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    # A text without colours, as wide as it must be, in which brackets and colons mean nothing.
    console = Console(width=10_000, markup=False, emoji=False, highlight=False)
    text = "".join(segment.text for segment in console.render(shown))
    return "\n".join(line.rstrip() for line in text.splitlines())
