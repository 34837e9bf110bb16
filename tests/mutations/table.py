"""The table of mutants: how many each checker kills, by kind."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from foldcc.testing.mutate import KINDS, Mutant, equivalent
from tests.mutations.checkers import CHECKERS, PLAIN, RAISED
from tests.mutations.programs import PROGRAMS, Subject, subject

HEAD = ("mutation", "mutants", "equivalent", *CHECKERS, "raise", "alive", "float32 loss misses", "float32 gradients miss")
DOCUMENT = Path(__file__).parents[2] / "docs" / "mutations.md"
_BEGIN, _END = "<!-- begin: make mutations -->", "<!-- end: make mutations -->"


@dataclass(frozen=True)
class Row:
    """What became of one mutant.

    Attributes:
        reason: why it is equivalent, if it is; asked only of those whose numbers are right.
        said: by each checker against it.
    """

    program: str
    kind: str
    mutant: str
    reason: str | None
    said: dict[str, str | None]

    @property
    def alive(self) -> bool:
        """Neither caught by `foldcc.verify` nor equivalent."""
        return self.reason is None and self.said["exact"] is None


def examined(where: Subject, program: str, plain: Mutant, lifted: Mutant) -> Row:
    said = {name: checker(where, plain, lifted) for name, checker in (CHECKERS | PLAIN).items()}
    return Row(program, plain.kind, str(plain), None if said["numeric"] else equivalent(plain), said)


def share(program: tuple[str, str], number: int, shares: int) -> list[Row]:
    """Every `shares`-th mutant of a program, from `number` on."""
    torch.set_num_threads(1)
    where = subject(*program)
    pairs = list(where.pairs())[number::shares]
    return [examined(where, " ".join(program), plain, lifted) for plain, lifted in pairs]


def run(processes: int = 2) -> list[Row]:
    """Every mutant of every program."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(share, program, number, processes) for program in PROGRAMS for number in range(processes)]
        return [row for job in jobs for row in job.result()]


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """The body of the table: one line for each kind, and the sum."""
    parts: list[tuple[str, list[Row]]] = [(kind, [r for r in rows if r.kind == kind]) for kind in KINDS]
    return [_line(name, part) for name, part in [*parts, ("all", list(rows))]]


def _line(name: str, rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    real = [r for r in rows if r.reason is None]
    counts = [len(rows), len(rows) - len(real)]
    counts += [sum(r.said[c] is not None for r in real) for c in CHECKERS]
    counts += [sum((r.said["numeric"] or "").startswith(RAISED) for r in real), sum(r.alive for r in real)]
    counts += [sum(r.said[c] is None for r in real) for c in PLAIN]
    return [name, *map(str, counts)]


def write(rows: Sequence[Row], seconds: float) -> None:
    """Puts the table into the documentation."""
    table = ["| " + " | ".join(row) + " |" for row in [list(HEAD), ["---"] + ["---:"] * (len(HEAD) - 1), *lines(rows)]]
    told = f"`make mutations`, torch {torch.__version__}, {seconds / 60:.0f} minutes on two processes."
    before, _, rest = DOCUMENT.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    DOCUMENT.write_text("\n".join([before + _BEGIN, "", *table, "", told, "", _END + after]))


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    start = time.perf_counter()
    rows = run()
    seconds = time.perf_counter() - start
    shown = Table(title=f"mutants of {', '.join(' on '.join(p) for p in PROGRAMS)}")
    for column in HEAD:
        shown.add_column(column, justify="left" if column == "mutation" else "right")
    for line in lines(rows):
        shown.add_row(*line)
    console = Console()
    console.print(shown)
    for row in rows:
        if row.alive:
            console.print(f"alive: {row.mutant} in {row.program}; numeric: {row.said['numeric']}", highlight=False)
    write(rows, seconds)
    return 1 if any(row.alive for row in rows) else 0
