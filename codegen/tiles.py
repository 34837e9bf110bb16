"""Tiles of the grouped products: one table, by chip, by width of an element and by how many rows an expert has.

Nothing is tuned while a program runs: an emitted launcher holds the two tiles of its chip and takes the first where experts
have many rows on average, else the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foldcc.codegen import source

MANY = 64  # rows of an expert, on average, from which on they are many


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a result that one program computes, elements of a step along what is summed, and how it runs."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int

    def shared(self, element: int) -> int:
        """Bytes of shared memory that the steps in flight take."""
        return self.stages * (self.rows + self.columns) * self.step * element


# Chip, bytes of an element: the tile for many rows, the tile for few.
_TILES = {
    ("sm_90", 2): (Tile(128, 256, 64, 8, 4), Tile(64, 128, 64, 4, 4)),
    ("sm_90", 4): (Tile(64, 64, 32, 4, 3), Tile(32, 64, 32, 4, 3)),
    ("sm_90", 8): (Tile(32, 32, 16, 4, 2), Tile(16, 32, 16, 4, 2)),
    ("sm_100", 2): (Tile(128, 256, 64, 8, 4), Tile(64, 128, 64, 4, 4)),
    ("sm_100", 4): (Tile(64, 64, 32, 4, 3), Tile(32, 64, 32, 4, 3)),
    ("sm_100", 8): (Tile(32, 32, 16, 4, 2), Tile(16, 32, 16, 4, 2)),
    ("other", 2): (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    ("other", 4): (Tile(64, 64, 32, 4, 2), Tile(32, 64, 32, 4, 2)),
    ("other", 8): (Tile(32, 32, 16, 4, 2), Tile(16, 32, 16, 4, 2)),
    ("interpreter", 2): (Tile(32, 32, 32, 1, 1), Tile(16, 32, 16, 1, 1)),
    ("interpreter", 4): (Tile(32, 32, 32, 1, 1), Tile(16, 32, 16, 1, 1)),
    ("interpreter", 8): (Tile(32, 32, 32, 1, 1), Tile(16, 32, 16, 1, 1)),
}


def chip() -> str:
    """What kernels are emitted for: the GPU that they are only compiled for, that of this process, or the interpreter."""
    found = source.target()
    if found is None and not torch.cuda.is_available():
        return "interpreter"
    found = found or "sm_{}{}".format(*torch.cuda.get_device_capability())
    return found if (found, 2) in _TILES else "other"


def tiles(dtype: torch.dtype) -> tuple[Tile, Tile]:
    """The tiles for many and for few rows of an expert, for operands of a dtype."""
    return _TILES[chip(), dtype.itemsize]
