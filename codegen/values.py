"""Values: the text that computes elements of nodes of a region, each once, from the elements of its inputs.

    y[r, c] = x[r, c] * rsqrt(sum over c of x[r, c] ** 2 / 32 + 1e-6)        becomes

    x = tl.load(x_ptr + r * x_s0 + c * x_s1, mask=r_ok & c_ok, other=0.0).to(tl.float32)
    sum_1 = tl.sum(tl.where(c_ok, x * x, 0.0), 1)[:, None]
    ...

A tile has rows `r`, [BR, 1], and columns `c`, [1, BW]. An element is asked for at an index that is made of these two; a
node that only moves elements changes the index and costs nothing. A reduction runs over all columns of a row, in a loop
where a row is longer than a tile.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy import Expr, Integer, Symbol
from torch import Tensor, fx

from foldcc.codegen.index import (
    MOVES,
    Div,
    Index,
    Ranges,
    Rem,
    parted,
    product,
    source_index,
    value_sizes,
)
from foldcc.codegen.pointwise import FLOATS, SLOW, expression, number
from foldcc.ir.node import argument, argument_or, name_of
from foldcc.rules.kinds import FILLS, filled_with

aten = torch.ops.aten
R, C = Symbol("r", integer=True, nonnegative=True), Symbol("c", integer=True, nonnegative=True)
_FEW = 16  # places that a scatter writes to in a row, each compared with every column
REDUCTIONS = {"aten.sum": "sum", "aten.mean": "sum", "aten.amax": "max", "aten.amin": "min"}
_NEUTRAL = {"sum": "0", "max": "float('-inf')", "min": "float('inf')"}


class NoText(Exception):
    """A node cannot be computed in a tile, for the reason given; its region is made smaller."""


@dataclass
class Values:
    """The text of one kernel's values.

    Attributes:
        inside: nodes that are computed; all others are loaded.
        width: columns of a row, over which reductions run.
        looped: a row is longer than a tile, so that each reduction, and the result, is a loop over columns of its own.
        lines: text that runs once for a tile of rows; `body`: text that runs for each tile of columns.
        loads: nodes that are loaded, in the order of first use.
        given: nodes whose elements are variables of the kernel already, and which variable the element at an index is.
        uniform: variables that have one value in the whole tile.
    """

    inside: set[fx.Node]
    width: Expr
    ranges: Ranges
    looped: bool = False
    lines: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    loads: dict[fx.Node, None] = field(default_factory=dict)
    symbols: set[Symbol] = field(default_factory=set)
    given: dict[fx.Node, Callable[[Index], str]] = field(default_factory=dict)
    uniform: frozenset[str] = frozenset()
    _rows: dict[Any, str] = field(default_factory=dict)
    _columns: dict[Any, str] = field(default_factory=dict)
    _where: dict[Symbol, frozenset[Symbol]] = field(default_factory=lambda: {R: frozenset({R}), C: frozenset({C})})
    _masks: tuple[tuple[str, frozenset[Symbol]], ...] = ()
    _taken: set[str] = field(default_factory=set)
    _reduced: dict[tuple[fx.Node, str], Index] = field(default_factory=dict)

    def at(self, node: Any, index: Index) -> str:
        """The name of, or a number for, an element of a node."""
        if not isinstance(node, fx.Node):
            return number(node)
        if node in self.given:
            return self.given[node](index)
        if node not in self.inside:
            return self._load(node, index)
        name = name_of(node.target)
        if name in MOVES and name not in ("aten.clone",):
            return self.at(node.args[0], source_index(node, index, self.ranges))
        if node.target is operator.getitem:
            return self._piece(node, index)
        if name in ("aten._to_copy", "aten.clone"):
            return self.converted(self.at(node.args[0], index), node.args[0], node)
        if name in REDUCTIONS:
            return self._reduction(node, name, index)
        special = SPECIAL.get(name)
        return self._pointwise(node, index) if special is None else special(self, node, index)

    # --- elements ---

    def _pointwise(self, node: fx.Node, index: Index) -> str:
        key = (node, index, self._masks)
        known = self._known(key)
        if known:
            return known
        if not isinstance(node.meta.get("val"), Tensor):
            raise NoText(f"{node.target} returns no tensor")
        if node.target in SLOW and self._reduced.setdefault((node, "once"), index) != index:
            raise NoText(f"{node.name}, which is slow, is needed at two places of a row")
        operands = []
        for x in node.args:
            if isinstance(x, fx.Node):
                operands.append(self.converted(self.at(x, self._broadcast(x, index)), x, node))
            elif isinstance(x, (int, float)):
                operands.append(number(x))
        text = expression(node, operands)
        if text is None:
            raise NoText(f"{node.target} has no Triton text")
        return self._keep(node.name, text, key, self._depends(index))

    def _broadcast(self, x: fx.Node, index: Index) -> Index:
        sizes = value_sizes(x)
        ahead = len(index) - len(sizes)
        return tuple(Integer(0) if n == 1 else index[ahead + d] for d, n in enumerate(sizes))

    def converted(self, text: str, x: Any, node: fx.Node) -> str:
        """An operand as the operator computes with it: whole numbers become floating-point ones beside such."""
        have, want = x.meta["val"].dtype, node.meta["val"].dtype
        if want == torch.bool and node.target not in FLOATS:
            return f"({text} != 0)" if name_of(node.target) == "aten._to_copy" and have != torch.bool else text
        if have.is_floating_point and want.is_floating_point:
            return f"{text}.to(tl.float64)" if want == torch.float64 and have != torch.float64 else text
        if want.is_floating_point and not (have == torch.bool and _chooses(node, x)):
            return f"{text}.to({computed(want)})"
        if not want.is_floating_point and (have.is_floating_point or (have == torch.bool and not _chooses(node, x))):
            return f"{text}.to(tl.int64)"
        return text

    def _load(self, node: fx.Node, index: Index) -> str:
        key = (node, index, self._masks)
        known = self._known(key)
        if known:
            return known
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise NoText(f"{node.name} is no tensor")
        self.loads[node] = None
        depends = self._depends(index)
        terms = [f"{self.text(i)} * {node.name}_s{d}" if i != 1 else f"{node.name}_s{d}" for d, i in enumerate(index) if i != 0]
        masks = [f"{s.name}_ok" for s in (R, C) if s in depends] + [m for m, _ in self._masks]
        for _, needs in self._masks:
            depends = depends | needs
        mask = f", mask={' & '.join(masks)}, other=0" if masks else ""
        text = f"tl.load({' + '.join([f'{node.name}_ptr', *terms])}{mask})"
        if value.dtype.is_floating_point:
            text += f".to({computed(value.dtype)})"
        elif value.dtype != torch.bool:
            text += ".to(tl.int64)"
        else:
            text = f"({text} != 0)"
        return self._keep(node.name, text, key, depends)

    def _reduction(self, node: fx.Node, name: str, index: Index) -> str:
        operand: Any = node.args[0]
        shape = value_sizes(operand)
        given = argument_or(node, "dim")
        dims = sorted({d % len(shape) for d in ([given] if isinstance(given, int) else given or range(len(shape)))})
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
            return self.converted(self.at(operand, found), operand, node)

        total = self.reduce(node, REDUCTIONS[name], index, element, node.name, wide)
        if name != "aten.mean":
            return total
        return self._keep(node.name, f"{total} / {self.text(size)}", (node, index, "mean"), frozenset({R}))

    def reduce(self, node: Any, kind: str, index: Index, element: Callable[[], str], name: str, wide: str) -> str:
        """A sum, maximum or minimum over all columns of a row, at an index that does not name a column."""
        if C in self._depends(index):
            raise NoText(f"{name} is no value of a row")
        if any(C in needs for _, needs in self._masks):
            raise NoText(f"{name} is computed in some columns only")
        if self._reduced.setdefault((node, kind), index) != index:
            raise NoText(f"{name} is needed at two places of a row")
        key = (node, index, kind)
        if key in self._rows:
            return self._rows[key]
        outer_body, outer_known, outer_masks = self.body, self._columns, self._masks
        self._masks = ()
        if self.looped:
            self.body, self._columns = [], {}
        text = element()
        found = self._name(name)
        masked = f"tl.where(r_ok & c_ok, {text}, {_NEUTRAL[kind]}).to({wide})"
        if self.looped:
            join = {"sum": "{0} + {1}", "max": "tl.maximum({0}, {1})", "min": "tl.minimum({0}, {1})"}[kind]
            loop = [*self.body, f"{found} = {join.format(found, masked)}"]
            self.lines.append(f"{found} = tl.full([BR, BW], {_NEUTRAL[kind]}, {wide})")
            self.lines += ["for c0 in range(0, {W}, BW):", *(f"    {x}" for x in [*COLUMNS, *loop])]
            self.lines.append(f"{found} = tl.{kind}({found}, 1)[:, None]")
            self.body, self._columns = outer_body, outer_known
        else:
            self.body.append(f"{found} = tl.{kind}(tl.broadcast_to({masked}, (BR, BW)), 1)[:, None]")
        self._masks = outer_masks
        self._rows[key] = found
        return found

    # --- operators with an index of their own ---

    def _piece(self, node: fx.Node, index: Index) -> str:
        """An element of one piece of a split."""
        whole, number_ = node.args
        assert isinstance(whole, fx.Node)
        if whole not in self.inside or name_of(whole.target) not in ("aten.split", "aten.split_with_sizes"):
            return self._load(node, index)
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
            if self._below(here[dim], size) and self._below(-here[dim], Integer(1)):
                return self.converted(self.at(part, here), part, node)
            if self._below(-here[dim], 1 - size) or self._below(here[dim], Integer(0)):
                start += size
                continue
            inside = f"({self.text(index[dim])} >= {self.text(start)}) & ({self.text(index[dim])} < {self.text(start + size)})"
            value = self.converted(self._under(inside, here, part, index), part, node)
            text = f"tl.where({inside}, {value}, {text})" if text else value
            start += size
        return self._keep(node.name, text, (node, index, self._masks), self._depends(index))

    def _below(self, x: Expr, n: Expr) -> bool:
        """Whether x < n is certain, where either may be negative."""
        largest: Expr = Integer(0)
        for factor, rest in (term.as_coeff_Mul() for term in sympy.Add.make_args(sympy.expand(x - n))):
            size = self.ranges.sizes.get(rest)
            if rest != 1 and factor > 0 and (size is None or not size.is_Integer):
                return False
            largest += factor if rest == 1 else max(factor, 0) * (size - 1 if size is not None else 0)
        return bool(largest < 0)

    def _under(self, condition: str, index: Index, node: Any, whole: Index) -> str:
        """An element that exists only where a condition holds."""
        before = self._masks
        self._masks = (*before, (condition, self._depends(whole)))
        try:
            return self.at(node, index)
        finally:
            self._masks = before

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
            around = _number_of(node, argument(node, "value"))
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
            if self._below(moved, Integer(0)) or self._below(stop - 1, index[d]) or (rest.is_Integer and rest != 0):
                return around
            if start != 0 and not self._below(-moved, Integer(1)):
                conditions.append(f"({i} >= {self.text(start)})")
            if stop != shape[d] and not self._below(index[d], stop):
                conditions.append(f"({i} < {self.text(stop)})")
            if rest != 0:
                conditions.append(f"(({i} - {self.text(start)}) % {step} == 0)")
            inner[d] = moved if step == 1 else self.ranges.div(moved, Integer(step)) if rest == 0 else Div(moved, Integer(step))
        if not conditions:
            return self.at(operand, tuple(inner))
        inside = " & ".join(conditions)
        value = self._under(inside, tuple(inner), operand, index)
        text = f"tl.where({inside}, {value}, {around})"
        return self._keep(node.name, text, (node, index, self._masks), self._depends(index))

    def _filled(self, node: fx.Node, index: Index) -> str:
        return _number_of(node, filled_with(node))

    def _arange(self, node: fx.Node, index: Index) -> str:
        start = argument_or(node, "start") or 0
        step = argument_or(node, "step") or 1
        return f"({self.text(index[0] * step + start)})"

    def _tril(self, node: fx.Node, index: Index) -> str:
        inside = f"{self.text(index[-1])} <= {self.text(index[-2])} + {argument(node, 'diagonal')}"
        text = f"tl.where({inside}, {self.at(node.args[0], index)}, 0)"
        return self._keep(node.name, text, (node, index, self._masks), self._depends(index))

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
        self._where[symbol] = frozenset() if name in self.uniform else self._depends(index)
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
        return self._keep(node.name, text, (node, index, self._masks), self._depends(index))

    def _softmax(self, node: fx.Node, index: Index) -> str:
        x: Any = node.args[0]
        self._last(node, len(index))
        row = index[:-1]
        columns = (*row, C)
        wide = computed(node.meta["val"].dtype)
        largest = self.reduce(node, "max", row, lambda: self.at(x, columns), f"{node.name}_max", wide)
        total = self.reduce(node, "sum", row, lambda: f"tl.exp({self.at(x, columns)} - {largest})", f"{node.name}_sum", wide)
        text = f"tl.exp({self.at(x, index)} - {largest}) / {total}"
        return self._keep(node.name, text, (node, index, self._masks), self._depends(index))

    def _softmax_backward(self, node: fx.Node, index: Index) -> str:
        grad, y = node.args[:2]
        self._last(node, len(index))
        columns = (*index[:-1], C)
        wide = computed(node.meta["val"].dtype)

        def product() -> str:
            return f"{self.at(grad, columns)} * {self.at(y, columns)}"

        total = self.reduce(node, "sum", index[:-1], product, f"{node.name}_sum", wide)
        text = f"({self.at(grad, index)} - {total}) * {self.at(y, index)}"
        return self._keep(node.name, text, (node, index, self._masks), self._depends(index))

    def _last(self, node: fx.Node, rank: int) -> None:
        dim: Any = argument_or(node, "dim")
        if dim % rank != rank - 1 or value_sizes(node)[-1] != self.width:
            raise NoText(f"{node.target} along dimension {dim}, and a row has {self.width} columns")

    # --- names ---

    def text(self, x: Any) -> str:
        """An index expression as text."""
        x = sympy.sympify(x)
        if x.is_Symbol:
            if x not in self._where:
                self.symbols.add(x)
            return str(x.name)
        if x.is_Integer:
            return str(x)
        if isinstance(x, (Div, Rem)):
            sign = "//" if isinstance(x, Div) else "%"
            return f"({self.text(x.args[0])} {sign} {self.text(x.args[1])})"
        parts = [self.text(a) for a in x.as_ordered_terms()] if x.is_Add else [self.text(a) for a in x.as_ordered_factors()]
        if x.is_Add or x.is_Mul:
            return "(" + (" + " if x.is_Add else " * ").join(parts) + ")"
        raise NoText(f"the index {x}")

    def _depends(self, index: Index) -> frozenset[Symbol]:
        found: frozenset[Symbol] = frozenset()
        for i in index:
            for s in i.free_symbols:
                found |= self._where.get(s, frozenset())
        return found

    def _known(self, key: Any) -> str | None:
        return self._rows.get(key) or self._columns.get(key)

    def _keep(self, name: str, text: str, key: Any, depends: frozenset[Symbol]) -> str:
        """Gives a text a name. What is the same in all columns is computed before the loop over them, if there is one."""
        known = self._known(key)
        if known:
            return known
        found = self._name(name)
        once = self.looped and C not in depends and not any(C in needs for _, needs in self._masks)
        (self.lines if once else self.body).append(f"{found} = {text}")
        (self._rows if once else self._columns)[key] = found
        return found

    def _name(self, name: str) -> str:
        found, i = name, 1
        while found in self._taken or found in ("r", "c", "r_ok", "c_ok"):
            found, i = f"{name}_at{i}", i + 1
        self._taken.add(found)
        return found


COLUMNS = ("c = c0 + tl.arange(0, BW)[None, :]", "c_ok = c < {W}")

SPECIAL: dict[str, Callable[[Values, Any, Index], str]] = {
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


def _number_of(node: fx.Node, x: Any) -> str:
    """A number as an element of a node: whole, if the node's elements are."""
    return number(float(x) if node.meta["val"].is_floating_point() else int(x))


def _chooses(node: fx.Node, x: Any) -> bool:
    """Whether an operand is the condition of a choice, or of another condition."""
    name = name_of(node.target)
    return (name == "aten.where" and x is node.args[0]) or (name == "aten.masked_fill" and x is node.args[1])


def computed(dtype: torch.dtype) -> str:
    """The type that values of a dtype are computed in."""
    if dtype == torch.float64:
        return "tl.float64"
    return "tl.float32" if dtype.is_floating_point else "tl.int64"
