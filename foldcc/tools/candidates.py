"""Candidates: the tiles that are tried for each class of grouped products, and the choice among them once they are timed.

The tile of a class is the candidate with the lowest geometric mean of its times over all places; one that is infinitely slow
somewhere does not run there, and is none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import product

from foldcc.codegen import tiles
from foldcc.codegen.tiles import Table, Tile
from foldcc.errors import FoldError

# Rows and columns of candidates, for elements of two bytes; wider ones have as many bytes.
_SIDES = {
    "many": ((64, 128, 256), (64, 128, 256)),
    "few": ((16, 32, 64, 128), (64, 128, 256)),
    "outer": ((64, 128, 256), (64, 128, 256)),
}
_STEPS = ((32, 3), (32, 4), (64, 2), (64, 3), (64, 4), (128, 2))  # elements of a step, and stages
_WARPS = (4, 8)
HELD = (32, 200)  # registers of a thread that accumulators may take, at least and at most

Candidates = Mapping[str, Sequence[Tile]]  # by class, the present tile first
Seconds = Mapping[str, Mapping[Tile, Mapping[str, float]]]  # by class, tile and place; infinite where a tile is none


def candidates(table: Table, chip: str, element: int) -> dict[str, list[Tile]]:
    """For each class, the present tile and all others that fit a chip: its registers, and its shared memory."""

    def scaled(n: int) -> int:
        return max(16, 2 * n // element)

    found = {}
    for name, sides in _SIDES.items():
        grid = [
            Tile(scaled(rows), scaled(columns), scaled(step), warps, stages)
            for rows, columns, (step, stages), warps in product(*sides, _STEPS, _WARPS)
        ]
        fitting = [t for t in grid if fits(t, chip, element)]
        found[name] = list(dict.fromkeys([table.tiles[chip, element, name], *fitting]))
    return found


def fits(tile: Tile, chip: str, element: int) -> bool:
    return tile.shared(element) <= tiles.shared_memory(chip) and HELD[0] <= registers(tile, element) <= HELD[1]


def registers(tile: Tile, element: int) -> int:
    """Registers of a thread that the accumulators take."""
    return tile.rows * tile.columns * max(4, element) // 4 // (32 * tile.warps)


def chosen(seconds: Mapping[Tile, Mapping[str, float]], present: Tile) -> Tile:
    """The tile with the lowest geometric mean of its times; the present one, where none is faster.

    The times of all are of the same places, so that times relative to the present one's would choose the same.

    Raises:
        FoldError: every tile fails somewhere.
    """
    means = {tile: statistics.geometric_mean(at.values()) for tile, at in seconds.items()}
    best = min(means, key=lambda tile: (means[tile], tile != present))
    if math.isinf(means[best]):
        raise FoldError(f"None of {len(means)} candidates runs everywhere.", valid="other candidates")
    return best


def tuned(table: Table, chip: str, element: int, seconds: Seconds, origin: str) -> Table:
    """A table with the tiles that measurements choose for a chip and bytes of an element; the others stay.

    Raises:
        FoldError: a class was measured nowhere, or none of its candidates runs everywhere.
    """
    for name, at in seconds.items():
        if not any(at.values()):
            raise FoldError(f"Nothing of the class {name!r} was measured.", valid="shapes that fit into memory")
    new = {(chip, element, name): chosen(at, table.tiles[chip, element, name]) for name, at in seconds.items()}
    return Table({**table.tiles, **new}, {**table.origins, (chip, element): origin})
