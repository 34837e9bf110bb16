"""Lines: the text of a kernel that goes over rows `r`, [BR, 1], and their columns `c`, [1, BW], each value once.

    x = tl.load(x_ptr + r * x_s0 + c * x_s1, mask=r_ok & c_ok, other=0).to(tl.float32)
    y = tl.sum(tl.where(r_ok & c_ok, x, 0).to(tl.float32), 1)[:, None]

Where a row is longer than a tile, each reduction is a loop over columns of its own, and so is what is stored. What is the same
in all columns is computed before the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sympy import Symbol
from torch import Tensor, fx

from foldcc.codegen.dtypes import loaded
from foldcc.codegen.index import Index
from foldcc.codegen.names import C, Names, NoText, R

COLUMNS = ("c = c0 + tl.arange(0, BW)[None, :]", "c_ok = c < {W}")
REDUCTIONS = {"aten.sum": "sum", "aten.mean": "sum", "aten.amax": "max", "aten.amin": "min"}
NEUTRAL = {"sum": "0", "max": "float('-inf')", "min": "float('inf')"}


@dataclass(kw_only=True)
class Lines(Names):
    """The text of one kernel, in which `{W}` is how many columns there are.

    Attributes:
        looped: a row is longer than a tile.
        lines: text that runs once for a tile of rows; `body`: text that runs for each tile of columns.
        loads: nodes that are loaded, in the order of first use.
    """

    looped: bool = False
    lines: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    loads: dict[fx.Node, None] = field(default_factory=dict)
    _rows: dict[Any, str] = field(default_factory=dict)
    _columns: dict[Any, str] = field(default_factory=dict)
    _masks: tuple[tuple[str, frozenset[Symbol]], ...] = ()
    _places: dict[tuple[fx.Node, str], Index] = field(default_factory=dict)

    def known(self, node: fx.Node, index: Index) -> str | None:
        """The name of an element that is computed already."""
        key = (node, index, self._masks)
        return self._rows.get(key) or self._columns.get(key)

    def keep(self, node: fx.Node, text: str, index: Index) -> str:
        """Gives the text of an element a name, if it has none."""
        known = self.known(node, index)
        if known:
            return known
        found = self.new(node.name)
        once = self.looped and C not in self.depends(index) and not any(C in needs for _, needs in self._masks)
        (self.lines if once else self.body).append(f"{found} = {text}")
        (self._rows if once else self._columns)[node, index, self._masks] = found
        return found

    def once(self, node: fx.Node, what: str, index: Index) -> None:
        """Makes sure that what is dear is computed at one place of a row only."""
        if self._places.setdefault((node, what), index) != index:
            raise NoText(f"{node.name} is needed at two places of a row")

    @contextmanager
    def under(self, condition: str, index: Index) -> Iterator[None]:
        """What is loaded in here is loaded only where a condition holds that depends on an index."""
        before = self._masks
        self._masks = (*before, (condition, self.depends(index)))
        try:
            yield
        finally:
            self._masks = before

    def load(self, node: fx.Node, index: Index) -> str:
        """An element of a tensor that the kernel reads."""
        if not isinstance(node.meta.get("val"), Tensor):
            raise NoText(f"{node.name} is no tensor")
        self.loads[node] = None
        depends = self.depends(index)
        terms = [f"{self.text(i)} * {node.name}_s{d}" if i != 1 else f"{node.name}_s{d}" for d, i in enumerate(index) if i != 0]
        masks = [f"{s.name}_ok" for s in (R, C) if s in depends] + [m for m, _ in self._masks]
        mask = f", mask={' & '.join(masks)}, other=0" if masks else ""
        text = f"tl.load({' + '.join([f'{node.name}_ptr', *terms])}{mask})"
        return self.keep(node, loaded(text, node), index)

    def reduce(self, node: fx.Node, kind: str, index: Index, element: Callable[[], str], name: str, wide: str) -> str:
        """A sum, maximum or minimum over all columns of a row, at an index that does not name a column."""
        if C in self.depends(index):
            raise NoText(f"{name} is no value of a row")
        if any(C in needs for _, needs in self._masks):
            raise NoText(f"{name} is computed in some columns only")
        self.once(node, kind, index)
        key = (node, index, kind)
        if key in self._rows:
            return self._rows[key]
        outer_body, outer_known, outer_masks = self.body, self._columns, self._masks
        self._masks = ()
        if self.looped:
            self.body, self._columns = [], {}
        text = element()
        found = self.new(name)
        masked = f"tl.where(r_ok & c_ok, {text}, {NEUTRAL[kind]}).to({wide})"
        if self.looped:
            join = {"sum": "{0} + {1}", "max": "tl.maximum({0}, {1})", "min": "tl.minimum({0}, {1})"}[kind]
            loop = [*self.body, f"{found} = {join.format(found, masked)}"]
            self.lines.append(f"{found} = tl.full([BR, BW], {NEUTRAL[kind]}, {wide})")
            self.lines += ["for c0 in range(0, {W}, BW):", *(f"    {x}" for x in [*COLUMNS, *loop])]
            self.lines.append(f"{found} = tl.{kind}({found}, 1)[:, None]")
            self.body, self._columns = outer_body, outer_known
        else:
            self.body.append(f"{found} = tl.{kind}(tl.broadcast_to({masked}, (BR, BW)), 1)[:, None]")
        self._masks = outer_masks
        self._rows[key] = found
        return found
