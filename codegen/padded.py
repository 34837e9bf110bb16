"""Padded: tiles that hold whole rows, [BR, ...], whose other dimensions are padded to powers of two: where elements are.

    [tokens, 8, 20], of which the tokens are rows        is a tile        [BR, 8, 32]

Dimensions in front of a row's own make up the rows, or have one element, where all rows are the same. Padding is left out
where a row is reduced or searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from sympy import Expr, Integer, Symbol
from torch import fx

from foldcc.codegen.dtypes import loaded
from foldcc.codegen.index import Ranges, parted, value_sizes
from foldcc.codegen.names import Names, NoText

_MOST = 1 << 15  # elements in a row of a tile, at most


@dataclass(kw_only=True)
class Padded(Names):
    """The text of one kernel's tiles.

    Attributes:
        rows: how many rows there are.
        lines: text of the kernel; `loads`: nodes that are loaded, in the order of first use.
        largest: elements in a row of the largest tile.
    """

    rows: Expr
    lines: list[str] = field(default_factory=list)
    loads: dict[fx.Node, None] = field(default_factory=dict)
    largest: int = 1
    _positions: set[str] = field(default_factory=set)

    # --- shapes ---

    def pads(self, node: fx.Node, lead: int) -> list[int]:
        """The dimensions of a row of a node, each padded to a power of two."""
        sizes = value_sizes(node)[lead:]
        if not all(n.is_Integer and n > 0 for n in sizes):
            raise NoText(f"{node.name} has rows of {sizes}")
        found = [1 << (int(n) - 1).bit_length() for n in sizes]
        self.room(sympy.prod(found))
        return found

    def room(self, elements: Any) -> None:
        """Makes sure that a row of a tile is not too long."""
        self.largest = max(self.largest, int(elements))
        if self.largest > _MOST:
            raise NoText(f"a tile with {elements} elements in a row")

    def by_row(self, node: fx.Node, lead: int) -> bool:
        """Whether the leading dimensions are the rows; otherwise all rows are the same."""
        count = sympy.prod(value_sizes(node)[:lead])
        if lead and sympy.expand(count - self.rows) == 0:
            return True
        if count == 1:
            return False
        raise NoText(f"the first {lead} dimensions of {node.name} are not {self.rows} rows")

    def lead(self, node: fx.Node) -> int:
        """How many leading dimensions of a node are the rows."""
        sizes = value_sizes(node)
        for d in range(1, len(sizes) + 1):
            if sympy.expand(sympy.prod(sizes[:d]) - self.rows) == 0:
                return d
        raise NoText(f"{node.name} has no {self.rows} rows")

    def shape(self, node: fx.Node, lead: int, ones: int = 0) -> str:
        """The shape of a tile as text, with some dimensions of one element after the rows."""
        first = "BR" if self.by_row(node, lead) else "1"
        return f"[{', '.join(map(str, [first, *[1] * ones, *self.pads(node, lead)]))}]"

    def row(self, rank: int) -> str:
        """Positions along the rows of a tile with `rank` more dimensions."""
        found = f"r{rank}"
        if rank and found not in self._positions:
            self.lines.append(f"{found} = r0[:, {', '.join(['None'] * rank)}]")
            self._positions.add(found)
        return found

    def columns(self, rank: int, dim: int, width: int) -> str:
        """Positions along a dimension of a row of a tile with `rank` of them; negative ones count from the end."""
        dim %= rank
        found = f"c{rank}_{dim}_{width}"
        if found not in self._positions:
            at = ["None"] * (rank + 1)
            at[dim + 1] = ":"
            self.lines.append(f"{found} = tl.arange(0, {width})[{', '.join(at)}]")
            self._positions.add(found)
        return found

    def ok(self, node: fx.Node, lead: int, dims: Sequence[int] | None = None) -> list[str]:
        """What is true of the positions of a tile that are not padding along some dimensions of a row."""
        sizes, pads = value_sizes(node)[lead:], self.pads(node, lead)
        dims = range(len(pads)) if dims is None else dims
        return [f"({self.columns(len(pads), d, pads[d])} < {sizes[d]})" for d in dims if pads[d] != sizes[d]]

    def without_padding(self, text: str, node: fx.Node, lead: int, dims: Sequence[int], neutral: str) -> str:
        ok = self.ok(node, lead, dims)
        return f"tl.where({' & '.join(ok)}, {text}, {neutral})" if ok else text

    def last(self, node: fx.Node, source: fx.Node, lead: int, dim: int) -> int:
        """The last axis of the tile of a source, which an operator works along."""
        rank = len(value_sizes(source))
        if dim % rank != rank - 1 or rank == lead or not self.by_row(source, lead):
            raise NoText(f"{node.target} along dimension {dim}")
        return rank - lead

    # --- text ---

    def keep(self, name: str, text: str) -> str:
        found = self.new(name)
        self.lines.append(f"{found} = {text}")
        return found

    def places(self, node: fx.Node, lead: int) -> list[str]:
        """Where an element of a tile is along each dimension of a node."""
        sizes, pads = value_sizes(node), self.pads(node, lead)
        row = Symbol(self.row(len(pads)), integer=True, nonnegative=True)
        self.where[row] = frozenset()
        spread = parted(row, sizes[:lead], Ranges({row: self.rows})) if self.by_row(node, lead) else [Integer(0)] * lead
        columns = [self.columns(len(pads), d, n) if n > 1 else "0" for d, n in enumerate(pads)]
        return [*map(self.text, spread), *columns]

    def mask(self, node: fx.Node, lead: int) -> str:
        ok = [f"({self.row(len(self.pads(node, lead)))} < {self.text(self.rows)})"] if self.by_row(node, lead) else []
        return " & ".join([*ok, *self.ok(node, lead)])

    def load(self, node: fx.Node, lead: int) -> str:
        """The tile of a tensor that the kernel reads."""
        self.loads[node] = None
        terms = [f"{x} * {node.name}_s{d}" for d, x in enumerate(self.places(node, lead)) if x != "0"]
        mask = self.mask(node, lead)
        text = f"tl.load({' + '.join([f'{node.name}_ptr', *terms])}{f', mask={mask}, other=0' if mask else ''})"
        return loaded(text, node)

    def store(self, node: fx.Node, lead: int, value: str) -> None:
        """Writes an output."""
        at = "0"
        for place, size in zip(self.places(node, lead), value_sizes(node), strict=True):
            at = place if at == "0" else f"({at}) * {self.text(size)} + {place}"
        self.lines.append(f"tl.store({node.name}_out + {at}, {value}, mask={self.mask(node, lead)})")
