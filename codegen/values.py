"""Values: which elements of its operands an element of a node of a region is made of, as text.

    y[r, c] = x[r, c] * rsqrt(sum over c of x[r, c] ** 2 / 32 + 1e-6)        becomes

    x = tl.load(x_ptr + r * x_s0 + c * x_s1, mask=r_ok & c_ok, other=0.0).to(tl.float32)
    sum_1 = tl.sum(tl.where(c_ok, x * x, 0.0), 1)[:, None]
    ...

An element is asked for at an index that is made of a row `r` and a column `c`; a node that only moves elements changes the
index and costs nothing. A reduction runs over all columns of a row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
from sympy import Expr, Integer, Symbol
from torch import Tensor, fx

from foldcc.codegen.dtypes import computed, converted, number_of
from foldcc.codegen.index import MOVES, Div, Index, Ranges, parted, product, source_index, value_sizes
from foldcc.codegen.lines import REDUCTIONS, Lines
from foldcc.codegen.names import C, NoText
from foldcc.codegen.pointwise import SLOW, expression, number
from foldcc.ir.node import argument, argument_or, name_of
from foldcc.rules.kinds import FILLS, filled_with
from foldcc.rules.reductions import dims_of

_FEW = 16  # places that a scatter writes to in a row, each compared with every column


@dataclass(kw_only=True)
class Values(Lines):
    """The text of one kernel's values.

    Attributes:
        inside: nodes that are computed; all others are loaded.
        width: columns of a row, over which reductions run.
        given: nodes whose elements are variables of the kernel already, and which variable the element at an index is.
        uniform: variables that have one value in the whole tile.
    """

    inside: set[fx.Node]
    width: Expr
    ranges: Ranges
    given: dict[fx.Node, Callable[[Index], str]] = field(default_factory=dict)
    uniform: frozenset[str] = frozenset()

    def at(self, node: Any, index: Index) -> str:
        """The name of, or a number for, an element of a node."""
        if not isinstance(node, fx.Node):
            return number(node)
        if node in self.given:
            return self.given[node](index)
        known = self.known(node, index)
        if known:
            return known
        if node not in self.inside:
            return self.load(node, index)
        name = name_of(node.target)
        if name in MOVES and name != "aten.clone":
            return self.at(node.args[0], source_index(node, index, self.ranges))
        if node.target is operator.getitem:
            return self._piece(node, index)
        special = SPECIAL.get(name)
        return self._pointwise(node, index) if special is None else special(self, node, index)

    # --- pointwise operators, and reductions ---

    def _pointwise(self, node: fx.Node, index: Index) -> str:
        if not isinstance(node.meta.get("val"), Tensor):
            raise NoText(f"{node.target} returns no tensor")
        if node.target in SLOW:
            self.once(node, "value", index)
        operands = []
        for x in node.args:
            if isinstance(x, fx.Node):
                operands.append(converted(self.at(x, self._broadcast(x, index)), x, node))
            elif isinstance(x, (int, float)):
                operands.append(number(x))
        text = expression(node, operands)
        if text is None:
            raise NoText(f"{node.target} has no Triton text")
        return self.keep(node, text, index)

    def _broadcast(self, x: fx.Node, index: Index) -> Index:
        sizes = value_sizes(x)
        ahead = len(index) - len(sizes)
        return tuple(Integer(0) if n == 1 else index[ahead + d] for d, n in enumerate(sizes))

    def _same(self, node: fx.Node, index: Index) -> str:
        return converted(self.at(node.args[0], index), node.args[0], node)

    def _reduction(self, node: fx.Node, index: Index) -> str:
        name = name_of(node.target)
        operand: Any = node.args[0]
        shape = value_sizes(operand)
        dims = sorted(dims_of(node, len(shape)))
        keep = bool(argument_or(node, "keepdim"))
        rest = iter(index)
        spread: list[Any] = []
        for d in range(len(shape)):
            spread.append(None if d in dims else next(rest))
            if d in dims and keep:
                next(rest)
        size = product([shape[d] for d in dims])
        if size != self.width:
            raise NoText(f"{node.name} reduces {size} elements, and a row has {self.width}")
        columns = iter(parted(C, [shape[d] for d in dims], self.ranges))
        found = tuple(next(columns) if i is None else i for i in spread)
        wide = computed(node.meta["val"].dtype)

        def element() -> str:
            return converted(self.at(operand, found), operand, node)

        total = self.reduce(node, REDUCTIONS[name], index, element, node.name, wide)
        if name != "aten.mean":
            return total
        return self.keep(node, f"{total} / {self.text(size)}", index)

    # --- operators with an index of their own ---

    def _piece(self, node: fx.Node, index: Index) -> str:
        """An element of one piece of a split."""
        whole, number_ = node.args
        assert isinstance(whole, fx.Node)
        if whole not in self.inside or name_of(whole.target) not in ("aten.split", "aten.split_with_sizes"):
            return self.load(node, index)
        source: Any = whole.args[0]
        rank = len(value_sizes(source))
        dim = int(argument(whole, "dim") or 0) % rank
        sizes: Any = whole.args[1]
        start = sizes * number_ if isinstance(sizes, int) else sum(sizes[:number_])
        return self.at(source, (*index[:dim], index[dim] + start, *index[dim + 1 :]))

    def _cat(self, node: fx.Node, index: Index) -> str:
        parts: Any = node.args[0]
        rank = len(index)
        dim = int(argument(node, "dim") or 0) % rank
        start: Expr = Integer(0)
        text = ""
        for part in parts:
            size = value_sizes(part)[dim]
            here = (*index[:dim], index[dim] - start, *index[dim + 1 :])
            if self.ranges.less(here[dim], size) and self.ranges.less(-here[dim], Integer(1)):
                return converted(self.at(part, here), part, node)
            if self.ranges.less(-here[dim], 1 - size) or self.ranges.less(here[dim], Integer(0)):
                start += size
                continue
            inside = f"({self.text(index[dim])} >= {self.text(start)}) & ({self.text(index[dim])} < {self.text(start + size)})"
            with self.under(inside, index):
                value = converted(self.at(part, here), part, node)
            text = f"tl.where({inside}, {value}, {text})" if text else value
            start += size
        return self.keep(node, text, index)

    def _placed(self, node: fx.Node, index: Index) -> str:
        """slice_backward and constant_pad_nd: an operand within a field of one number; slice_scatter: within another tensor."""
        name = name_of(node.target)
        shape = value_sizes(node)
        operand: Any = node.args[1] if name == "aten.slice_scatter" else node.args[0]
        starts, stops, steps = [Integer(0)] * len(shape), list(shape), [1] * len(shape)
        if name == "aten.constant_pad_nd":
            pads: Any = node.args[1]
            for k in range(len(pads) // 2):
                d = len(shape) - 1 - k
                starts[d], stops[d] = Integer(pads[2 * k]), shape[d] - pads[2 * k + 1]
            around = number_of(node, argument(node, "value"))
        else:
            d = int(argument(node, "dim") or 0) % len(shape)
            start, stop = argument(node, "start") or 0, argument(node, "end")
            starts[d] = Integer(start) if start >= 0 else shape[d] + start
            starts[d] = sympy.Min(starts[d], shape[d]) if starts[d].is_Integer and shape[d].is_Integer else starts[d]
            given = shape[d] if stop is None or stop > 2**62 else stop if stop >= 0 else shape[d] + stop
            stops[d] = sympy.Min(given, shape[d]) if shape[d].is_Integer else sympy.sympify(given)
            steps[d] = argument(node, "step") or 1
            around = "0.0" if name == "aten.slice_backward" else self.at(node.args[0], index)
        conditions, inner = [], list(index)
        for d, (start, stop, step) in enumerate(zip(starts, stops, steps, strict=True)):
            i, moved = self.text(index[d]), sympy.expand(index[d] - start)
            rest = self.ranges.rem(moved, Integer(step))
            if self.ranges.less(moved, Integer(0)) or self.ranges.less(stop - 1, index[d]) or (rest.is_Integer and rest != 0):
                return around
            if start != 0 and not self.ranges.less(-moved, Integer(1)):
                conditions.append(f"({i} >= {self.text(start)})")
            if stop != shape[d] and not self.ranges.less(index[d], stop):
                conditions.append(f"({i} < {self.text(stop)})")
            if rest != 0:
                conditions.append(f"(({i} - {self.text(start)}) % {step} == 0)")
            inner[d] = moved if step == 1 else self.ranges.div(moved, Integer(step)) if rest == 0 else Div(moved, Integer(step))
        if not conditions:
            return self.at(operand, tuple(inner))
        inside = " & ".join(conditions)
        with self.under(inside, index):
            value = self.at(operand, tuple(inner))
        text = f"tl.where({inside}, {value}, {around})"
        return self.keep(node, text, index)

    def _filled(self, node: fx.Node, index: Index) -> str:
        return number_of(node, filled_with(node))

    def _arange(self, node: fx.Node, index: Index) -> str:
        start = argument_or(node, "start") or 0
        step = argument_or(node, "step") or 1
        return f"({self.text(index[0] * step + start)})"

    def _tril(self, node: fx.Node, index: Index) -> str:
        inside = f"{self.text(index[-1])} <= {self.text(index[-2])} + {argument(node, 'diagonal')}"
        text = f"tl.where({inside}, {self.at(node.args[0], index)}, 0)"
        return self.keep(node, text, index)

    def _gathered(self, node: fx.Node, index: Index) -> str:
        """Operators that read an operand at a position which is data."""
        name = name_of(node.target)
        source: Any = node.args[0]
        if name == "aten.gather":
            dim = int(argument(node, "dim")) % len(index)
            at = self._position(argument(node, "index"), index)
            return self.at(source, (*index[:dim], at, *index[dim + 1 :]))
        if name == "aten.index_select":
            dim = int(argument(node, "dim")) % len(index)
            at = self._position(argument(node, "index"), (index[dim],))
            return self.at(source, (*index[:dim], at, *index[dim + 1 :]))
        if name == "foldcc.permute":
            copies: Any = node.args[2]
            return self.at(source, (self.ranges.div(self._position(node.args[1], (index[0],)), Integer(copies)), *index[1:]))
        ids: Any = node.args[1][0] if name == "aten.index" else node.args[1]
        if name == "aten.index" and len(node.args[1]) != 1:
            raise NoText("several index tensors")
        rank = len(value_sizes(ids))
        return self.at(source, (self._position(ids, index[:rank]), *index[rank:]))

    def _position(self, node: Any, index: Index) -> Expr:
        name = self.at(node, index)
        symbol = Symbol(name, integer=True, nonnegative=True)
        self.where[symbol] = frozenset() if name in self.uniform else self.depends(index)
        return symbol

    def _scattered(self, node: fx.Node, index: Index) -> str:
        """A row with a few elements set, or added to: every column is compared with every place."""
        dim = int(argument(node, "dim")) % len(index)
        places: Any = argument(node, "index")
        count = value_sizes(places)[dim]
        if dim != len(index) - 1 or not count.is_Integer or count > _FEW:
            raise NoText(f"{node.target} along {count} places of dimension {dim}")
        text = self.at(node.args[0], index)
        adds = name_of(node.target) == "aten.scatter_add"
        source = argument_or(node, "src")
        for k in range(int(count)):
            here = (*index[:-1], Integer(k))
            place = self.at(places, here)
            value = self.at(source, here) if isinstance(source, fx.Node) else number(argument(node, "value"))
            hit = f"{self.text(index[-1])} == {place}"
            text = f"{text} + tl.where({hit}, {value}, 0.0)" if adds else f"tl.where({hit}, {value}, {text})"
        return self.keep(node, text, index)

    def _softmax(self, node: fx.Node, index: Index) -> str:
        x: Any = node.args[0]
        self._last(node, len(index))
        row = index[:-1]
        columns = (*row, C)
        wide = computed(node.meta["val"].dtype)
        largest = self.reduce(node, "max", row, lambda: self.at(x, columns), f"{node.name}_max", wide)
        total = self.reduce(node, "sum", row, lambda: f"tl.exp({self.at(x, columns)} - {largest})", f"{node.name}_sum", wide)
        text = f"tl.exp({self.at(x, index)} - {largest}) / {total}"
        return self.keep(node, text, index)

    def _softmax_backward(self, node: fx.Node, index: Index) -> str:
        grad, y = node.args[:2]
        self._last(node, len(index))
        columns = (*index[:-1], C)
        wide = computed(node.meta["val"].dtype)

        def product() -> str:
            return f"{self.at(grad, columns)} * {self.at(y, columns)}"

        total = self.reduce(node, "sum", index[:-1], product, f"{node.name}_sum", wide)
        text = f"({self.at(grad, index)} - {total}) * {self.at(y, index)}"
        return self.keep(node, text, index)

    def _last(self, node: fx.Node, rank: int) -> None:
        dim: Any = argument_or(node, "dim")
        if dim % rank != rank - 1 or value_sizes(node)[-1] != self.width:
            raise NoText(f"{node.target} along dimension {dim}, and a row has {self.width} columns")


SPECIAL: dict[str, Callable[[Values, Any, Index], str]] = {
    "aten.clone": Values._same,
    "aten._to_copy": Values._same,
    **dict.fromkeys(REDUCTIONS, Values._reduction),
    "aten.cat": Values._cat,
    "aten.slice_backward": Values._placed,
    "aten.slice_scatter": Values._placed,
    "aten.constant_pad_nd": Values._placed,
    "aten.arange": Values._arange,
    "aten.tril": Values._tril,
    "aten.gather": Values._gathered,
    "aten.index_select": Values._gathered,
    "aten.index": Values._gathered,
    "aten.embedding": Values._gathered,
    "foldcc.permute": Values._gathered,
    "aten.scatter": Values._scattered,
    "aten.scatter_add": Values._scattered,
    "aten._softmax": Values._softmax,
    "aten._softmax_backward_data": Values._softmax_backward,
    **dict.fromkeys(FILLS, Values._filled),
}
