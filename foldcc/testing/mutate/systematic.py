"""The systematic mistakes: every kind at every place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatch

from torch import fx

from foldcc.errors import FoldError, listed
from foldcc.mesh import FoldedMesh
from foldcc.module import FoldedModule
from foldcc.testing.mutate.collectives import Mistakes, left_out, other_axes, other_blocks, other_kinds, scaled
from foldcc.testing.mutate.gradients import gradient_mutants
from foldcc.testing.mutate.means import summed
from foldcc.testing.mutate.mutant import Mutant, at, sites
from foldcc.testing.mutate.places import shifted, swapped
from foldcc.testing.mutate.shared import shared_mutants

_AT_A_NODE: dict[str, Callable[[fx.Node, FoldedMesh], Mistakes]] = {
    "left out": left_out,
    "other axis": other_axes,
    "other kind": other_kinds,
    "other blocks": other_blocks,
    "scale": scaled,
    "swap": swapped,
    "shift": shifted,
    "sum for mean": summed,
}
KINDS = (*_AT_A_NODE, "drop reduction", "reduce again", "shared")


def mutants(model: FoldedModule, *, stage: str | None = None) -> Iterator[Mutant]:
    """Every systematic mistake in the newest program of a folded model, always in the same order.

    Args:
        stage: in whose program they are planted, such as "localize"; None for the last one, where the backward pass is
            written out and a mistake is in one direction only.

    Raises:
        FoldError: nothing is compiled yet, or there is no such stage.
    """
    program = model.program if stage is None else model.stages[stage].program
    for site, node in sites(program):
        for kind, mistakes in _AT_A_NODE.items():
            for description, change in mistakes(node, model.mesh):
                yield Mutant(kind, site, description, model, at(node, change), stage)
    if stage is None:
        yield from gradient_mutants(model)
        yield from shared_mutants(model)


def find(
    model: FoldedModule,
    *,
    kind: str,
    stage: str | None = None,
    description: str = "*",
    module: str = "*",
    block: str = "*",
    direction: str = "*",
    node: str = "*",
) -> Mutant:
    """The first systematic mistake of a kind that matches every pattern, as a shell matches the names of files.

    Raises:
        FoldError: there is no such kind, or nothing matches.
    """
    if kind not in KINDS:
        raise FoldError(f"There is no mutation {kind!r}.", valid=listed(KINDS))
    patterns = {"module": module, "block": block, "direction": direction, "node": node}
    found = [m for m in mutants(model, stage=stage) if m.kind == kind]
    for m in found:
        if fnmatch(m.description, description) and all(fnmatch(getattr(m.site, n), p) for n, p in patterns.items()):
            return m
    asked = {"description": description, **patterns}
    raise FoldError(
        f"No mutation {kind!r} matches {listed(f'{name}={p!r}' for name, p in asked.items() if p != '*')}.",
        valid="\n".join(f"{m.site}: {m.description}" for m in found),
    )
