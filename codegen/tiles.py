"""Tiles of the grouped products: one table, by chip, by width of an element and by what is multiplied.

    many    rows times weights, where experts have more than `MANY` rows on average
    few     the same, where they have fewer
    outer   the gradient of the weights

The table is tiles.json, which `python -m foldcc tune` writes. Nothing is tuned while a program runs: an emitted launcher holds
the tiles of its chip.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from foldcc.codegen import source
from foldcc.errors import FoldError, listed

MANY = 64  # rows of an expert, on average, from which on they are many
CLASSES = ("many", "few", "outer")
PATH = Path(__file__).with_name("tiles.json")
# Bytes of shared memory that one program may have (CUDA C++ Programming Guide, table of technical specifications).
SHARED = {"sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376}
_CHIPS = ("other", "interpreter")  # those that every table has
_ELEMENTS = (2, 4, 8)  # bytes
_LEAST = 16  # of each side of a product in a step

_INSTEAD: ContextVar[Mapping[tuple[str, int, str], Tile]] = ContextVar("instead", default=MappingProxyType({}))

Key = tuple[str, int, str]  # chip, bytes of an element, class


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

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.step}, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True)
class Table:
    """What tiles.json says; `str` is its text, to the letter.

    Attributes:
        origins: where the tiles come from, by chip and bytes of an element.
    """

    tiles: Mapping[Key, Tile]
    origins: Mapping[tuple[str, int], str]

    @classmethod
    def read(cls, path: Path = PATH) -> Table:
        """The table in a file.

        Raises:
            FoldError: it is not there, or wrong; at which chip and class.
        """
        try:
            chips = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise FoldError(f"The table of tiles cannot be read: {error}.", at=str(path)) from None
        tiles: dict[Key, Tile] = {}
        origins: dict[tuple[str, int], str] = {}
        for chip, elements in _named("chips", chips, _CHIPS, path, more=True).items():
            for width, classes in _named(f"bytes of {chip}", elements, tuple(map(str, _ELEMENTS)), path).items():
                element = int(width)
                _named(f"classes of {chip}, {width} bytes,", classes, ("from", *CLASSES), path)
                origins[chip, element] = classes["from"]
                tiles |= {(chip, element, name): _tile(classes[name], (chip, element, name), path) for name in CLASSES}
        return cls(tiles, origins)

    def with_chip(self, chip: str) -> Table:
        """A table that has a chip: with the tiles of "other", if it has none of its own."""
        if any(c == chip for c, _ in self.origins):
            return self
        tiles = {(chip, e, name): x for (c, e, name), x in self.tiles.items() if c == "other"}
        origins = {(chip, e): x for (c, e), x in self.origins.items() if c == "other"}
        return Table({**self.tiles, **tiles}, {**self.origins, **origins})

    def __str__(self) -> str:
        chips = {chip: [e for c, e in self.origins if c == chip] for chip, _ in self.origins}
        blocks = [
            f'  "{chip}": {{\n' + ",\n".join(self._block(chip, element) for element in elements) + "\n  }"
            for chip, elements in chips.items()
        ]
        return "{\n" + ",\n".join(blocks) + "\n}\n"

    def _block(self, chip: str, element: int) -> str:
        tiles = [f'      "{name}": {json.dumps(asdict(self.tiles[chip, element, name]))}' for name in CLASSES]
        lines = ",\n".join([f'      "from": {json.dumps(self.origins[chip, element])}', *tiles])
        return f'    "{element}": {{\n{lines}\n    }}'


def chip() -> str:
    """What kernels are emitted for: the GPU that they are only compiled for, that of this process, or the interpreter."""
    found = source.target()
    if found is None and not torch.cuda.is_available():
        return "interpreter"
    found = found or gpu()
    return found if (found, 2) in table().origins else "other"


def gpu() -> str:
    """The GPU of this process, such as "sm_90"."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def tiles(dtype: torch.dtype) -> tuple[Tile, Tile]:
    """The tiles for many and for few rows of an expert, for operands of a dtype."""
    return _found(dtype, "many"), _found(dtype, "few")


def outer(dtype: torch.dtype) -> Tile:
    """The tile for the gradient of the weights, for operands of a dtype."""
    return _found(dtype, "outer")


@cache
def table() -> Table:
    """The table that kernels are emitted with."""
    return Table.read()


@contextmanager
def using(
    chip: str, element: int, *, many: Tile | None = None, few: Tile | None = None, outer: Tile | None = None
) -> Iterator[None]:
    """Inside, kernels are emitted with these tiles instead of the table's, for a chip and bytes of an element."""
    given = {"many": many, "few": few, "outer": outer}
    token = _INSTEAD.set({**_INSTEAD.get(), **{(chip, element, name): x for name, x in given.items() if x is not None}})
    try:
        yield
    finally:
        _INSTEAD.reset(token)


def shared_memory(chip: str) -> int:
    """Bytes of shared memory that a program may have on a chip: the least of any, if it is not known."""
    return SHARED.get(chip, min(SHARED.values()))


# --- parts ---


def _found(dtype: torch.dtype, name: str) -> Tile:
    key = chip(), dtype.itemsize, name
    instead = _INSTEAD.get().get(key)
    return table().tiles[key] if instead is None else instead


def _named(what: str, given: Any, names: tuple[str, ...], path: Path, *, more: bool = False) -> dict[str, Any]:
    """A part of the table that has these names, and perhaps more.

    Raises:
        FoldError: it has not.
    """
    if not isinstance(given, dict) or not set(names) <= set(given) or (set(given) > set(names) and not more):
        told = listed(given) if isinstance(given, dict) else json.dumps(given)
        valid = listed(names) + (", and others" if more else "")
        raise FoldError(f"The {what} in the table of tiles are {told}.", at=str(path), valid=valid)
    return given


def _tile(given: Any, key: Key, path: Path) -> Tile:
    """A tile of the table.

    Raises:
        FoldError: it is none, or does not fit into shared memory.
    """
    chip, element, name = key
    what, wanted = f"The tile {name!r} of {chip}, {element} bytes,", tuple(f.name for f in fields(Tile))
    if not isinstance(given, dict) or set(given) != set(wanted) or any(type(x) is not int for x in given.values()):
        raise FoldError(f"{what} is {json.dumps(given)}.", at=str(path), valid=f"whole numbers of {listed(wanted)}")
    for part, least in (("rows", _LEAST), ("columns", _LEAST), ("step", _LEAST), ("warps", 1), ("stages", 1)):
        n, power = given[part], part != "stages"
        if n < least or (power and n & (n - 1)):
            raise FoldError(f"{what} has {part}={n}.", at=str(path), valid=f"{'powers of two ' * power}from {least} on")
    tile = Tile(**given)
    limit, taken = shared_memory(chip), tile.shared(element)
    if taken > limit:
        sum_ = f"{tile.stages} * ({tile.rows} + {tile.columns}) * {tile.step} * {element}"
        raise FoldError(
            f"{what} takes {taken:,} bytes of shared memory ({sum_}), and there are {limit:,}.",
            at=str(path),
            valid="fewer stages, or a smaller tile",
        )
    return tile
