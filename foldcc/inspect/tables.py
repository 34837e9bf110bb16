"""Plain tables, and the one of the stages of a compilation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from foldcc.passes.manager import Stage


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Columns aligned under their heads, those numbered in `right` to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    flush = set(right)
    texts = [
        "  ".join(c.rjust(w) if i in flush else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    rule = "  ".join("-" * w for w in widths)
    return "\n".join(t.rstrip() for t in [texts[0], rule, *texts[1:]])


def stages_table(stages: Iterable[Stage]) -> str:
    """Each pass: its name, its time, and the nodes of the whole program before and after it."""
    rows = [[s.name, f"{1000 * s.seconds:.0f} ms", str(s.before), str(s.after), f"{s.after - s.before:+d}"] for s in stages]
    return table(["stage", "time", "before", "after", "nodes"], rows, right=(1, 2, 3, 4))
