"""Whole rows: which tiles the tile of a node of a router is made of, as text.

y = x / sum(x, -1, keepdim)                becomes

x = tl.load(x_ptr + r1 * x_s0 + c1_0_8 * x_s1, mask=(r1 < n) & (c1_0_8 < 6), other=0).to(tl.float32)
sum_1 = tl.expand_dims(tl.sum(tl.where((c1_0_8 < 6), x, 0), 1), 1)
y = x / sum_1
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from foldcc.codegen.dtypes import computed, converted, number_of
from foldcc.codegen.index import value_sizes
from foldcc.codegen.lines import NEUTRAL, REDUCTIONS
from foldcc.codegen.names import NoText
from foldcc.codegen.padded import Padded
from foldcc.codegen.pointwise import expression, number
from foldcc.codegen.topk import largest
from foldcc.ir.node import argument, argument_or, name_of
from foldcc.rules.kinds import FILLS, RESHAPES, SAME, UNITS, filled_with
from foldcc.rules.reductions import dims_of


@dataclass(kw_only=True)
class WholeRows(Padded):
    """The text of one kernel's values.

    Attributes:
        inside: nodes that are computed; all others are loaded.
    """

    inside: set[fx.Node]
    _tiles: dict[tuple[fx.Node, int], str] = field(default_factory=dict)
    _tops: dict[tuple[fx.Node, int], tuple[str, str]] = field(default_factory=dict)

    def tile(self, node: fx.Node, lead: int) -> str:
        """The name of a node's tile, [BR, ...]; its first `lead` dimensions are the rows, or have one element: [1, ...]."""
        key = (node, lead)
        if key not in self._tiles:
            text = self._text(node, lead)
            self._tiles[key] = text if text.isidentifier() else self.keep(node.name, text)
        return self._tiles[key]

    def _text(self, node: fx.Node, lead: int) -> str:
        self.pads(node, lead)
        if node not in self.inside:
            return self.load(node, lead)
        if node.target is operator.getitem:
            return self._top(node.args[0], lead)[node.args[1]]
        name = name_of(node.target)
        special = SPECIAL.get(name)
        return self._pointwise(node, lead) if special is None else special(self, node, lead)

    # --- operators ---

    def _converted(self, x: fx.Node, lead: int, node: fx.Node) -> str:
        """An operand as the operator computes with it."""
        return converted(self.tile(x, lead), x, node)

    def _operand(self, x: fx.Node, node: fx.Node, lead: int) -> str:
        """An operand, with as many dimensions as the result."""
        ahead = len(value_sizes(node)) - len(value_sizes(x))
        text = self._converted(x, max(0, lead - ahead), node)
        if ahead <= lead:
            return text
        return f"tl.reshape({text}, {self.shape(x, 0, ahead - lead)})" if value_sizes(x) else text

    def _pointwise(self, node: fx.Node, lead: int) -> str:
        if not isinstance(node.meta.get("val"), Tensor):
            raise NoText(f"{node.target} returns no tensor")
        operands = [self._operand(x, node, lead) if isinstance(x, fx.Node) else number(x) for x in _given(node)]
        text = expression(node, operands)
        if text is None:
            raise NoText(f"{node.target} has no Triton text")
        return text

    def _same(self, node: Any, lead: int) -> str:
        return self._converted(node.args[0], lead, node)

    def _filled(self, node: Any, lead: int) -> str:
        dtype, value = node.meta["val"].dtype, number_of(node, filled_with(node))
        if dtype == torch.bool:
            return f"tl.full({self.shape(node, lead)}, {value}, tl.int32) != 0"
        return f"tl.full({self.shape(node, lead)}, {value}, {computed(dtype)})"

    def _reshaped(self, node: Any, lead: int) -> str:
        """A row in other dimensions: with padding, only if they differ in dimensions of one element."""
        source = node.args[0]
        before = self.lead(source) if self.by_row(node, lead) else _ones(source)
        x = self.tile(source, before)
        have, want = self.pads(source, before), self.pads(node, lead)
        plain = [[int(n) for n in value_sizes(m)[d:] if n != 1] for m, d in ((source, before), (node, lead))]
        if plain[0] != plain[1] and [n for n in have + want if n > 1] != plain[0] + plain[1]:
            raise NoText(f"rows of {plain[0]} as {plain[1]}, which are no powers of two")
        return x if have == want else f"tl.reshape({x}, {self.shape(node, lead)})"

    def _expanded(self, node: Any, lead: int) -> str:
        return f"tl.broadcast_to({self._operand(node.args[0], node, lead)}, {self.shape(node, lead)})"

    def _reduced(self, node: Any, lead: int) -> str:
        source = node.args[0]
        dims = sorted(dims_of(node, len(value_sizes(source))))
        if dims[0] < lead or not self.by_row(source, lead):
            raise NoText(f"{node.target} over rows")
        kind = REDUCTIONS[name_of(node.target)]
        if kind != "sum" and not source.meta["val"].is_floating_point():
            raise NoText(f"{node.target} of whole numbers")
        inner = [d - lead for d in dims]
        text = self.without_padding(self._converted(source, lead, node), source, lead, inner, NEUTRAL[kind])
        for d in reversed(inner):
            text = f"tl.{kind}({text}, {d + 1})"
        if argument_or(node, "keepdim"):
            for d in inner:
                text = f"tl.expand_dims({text}, {d + 1})"
        return f"{text} / {sympy.prod([value_sizes(source)[d] for d in dims])}" if name_of(node.target) == "aten.mean" else text

    def _top(self, node: Any, lead: int) -> tuple[str, str]:
        """Values and positions of a top-k."""
        if (node, lead) not in self._tops:
            self._tops[node, lead] = largest(self, node, lead, self.tile(node.args[0], lead))
        return self._tops[node, lead]

    def _softmax(self, node: Any, lead: int) -> str:
        source = node.args[0]
        axis = self.last(node, source, lead, argument(node, "dim"))
        x = self.without_padding(self._converted(source, lead, node), source, lead, [axis - 1], "float('-inf')")
        x = self.keep(f"{node.name}_x", x)
        x = self.keep(f"{node.name}_exp", f"tl.exp({x} - tl.expand_dims(tl.max({x}, {axis}), {axis}))")
        return f"{x} / tl.expand_dims(tl.sum({x}, {axis}), {axis})"

    def _gathered(self, node: Any, lead: int) -> str:
        source, ids = node.args[0], argument(node, "index")
        axis = self._along(node, source, ids, lead)
        places = f"{self.tile(ids, lead)} & {self.pads(source, lead)[-1] - 1}"  # padding reads some column as well
        return f"tl.gather({self.tile(source, lead)}, ({places}).to(tl.int32), {axis})"

    def _scattered(self, node: Any, lead: int) -> str:
        base, ids = node.args[0], argument(node, "index")
        axis = self._along(node, base, ids, lead)
        x = self._converted(base, lead, node)
        hit = self.keep(f"{node.name}_hit", self._hit(ids, lead, self.pads(base, lead)[-1]))
        ok = self.ok(ids, lead, [axis - 1])
        if ok:
            hit = self.keep(f"{node.name}_hit", f"{hit} & tl.expand_dims({ok[0]}, {axis + 1})")
        value = argument_or(node, "src")
        if isinstance(value, fx.Node):
            here = f"tl.expand_dims({self._converted(value, lead, node)}, {axis + 1})"
            new = f"tl.sum(tl.where({hit}, {here}, 0), {axis})"
        else:
            new = number(argument(node, "value"))
        if name_of(node.target) == "aten.scatter_add":
            return f"{x} + {new}"
        return f"tl.where(tl.max({hit}.to(tl.int32), {axis}) != 0, {new}, {x})"

    def _along(self, node: fx.Node, source: fx.Node, ids: fx.Node, lead: int) -> int:
        axis = self.last(node, source, lead, argument(node, "dim"))
        if value_sizes(source)[:-1] != value_sizes(ids)[:-1] or source.meta["val"].dtype == torch.bool:
            raise NoText(f"{node.target} of {value_sizes(source)} at {value_sizes(ids)}")
        return axis

    def _hit(self, ids: fx.Node, lead: int, width: int) -> str:
        """Which column each of a row's positions names."""
        pads = self.pads(ids, lead)
        self.room(sympy.prod(pads) * width)
        x = self.tile(ids, lead)
        return f"tl.expand_dims({x}, {len(pads) + 1}) == {self.columns(len(pads) + 1, -1, width)}"


SPECIAL: dict[str, Callable[[WholeRows, Any, int], str]] = {
    **dict.fromkeys({*SAME, "aten._to_copy"}, WholeRows._same),
    **dict.fromkeys(RESHAPES | UNITS, WholeRows._reshaped),
    **dict.fromkeys(FILLS, WholeRows._filled),
    **dict.fromkeys(REDUCTIONS, WholeRows._reduced),
    "aten.expand": WholeRows._expanded,
    "aten._softmax": WholeRows._softmax,
    "aten.gather": WholeRows._gathered,
    "aten.scatter": WholeRows._scattered,
    "aten.scatter_add": WholeRows._scattered,
}


def _given(node: fx.Node) -> list[Any]:
    return [x for x in node.args if isinstance(x, (fx.Node, int, float))]


def _ones(node: fx.Node) -> int:
    """How many leading dimensions of one element a node has."""
    return next((d for d, n in enumerate(value_sizes(node)) if n != 1), len(value_sizes(node)))
