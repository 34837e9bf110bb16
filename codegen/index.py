"""Which element of an operand an element of a result is: index expressions, exact, simplified by the ranges of symbols.

    result[i, j] of x.reshape(6, 4), x of [2, 3, 4]      is      x[i // 3, i % 3, j]
    result[i, j] of x.t()                                is      x[j, i]

Everything is a whole number from zero upwards, so that `//` and `%` in Python, in Triton and in C agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy import Expr, Integer, Symbol
from torch import fx

from foldcc.ir.node import argument, name_of
from foldcc.rules.kinds import RESHAPES, SAME, TRANSPOSES, UNITS, named

Index = tuple[Expr, ...]


class Div(sympy.Function):
    """x // n, of whole numbers from zero upwards."""

    nargs = 2


class Rem(sympy.Function):
    """x % n, of whole numbers from zero upwards."""

    nargs = 2


@dataclass(frozen=True)
class Ranges:
    """How many values each symbol of an index has: it runs from zero to one less."""

    sizes: Mapping[Symbol, Expr] = field(default_factory=dict)

    def below(self, x: Expr, n: Expr) -> bool:
        """Whether x < n is certain."""
        if x.is_Integer and n.is_Integer:
            return bool(x < n)
        if x.is_Symbol and self.sizes.get(x) == n:
            return True
        largest = self._largest(x)
        return largest is not None and n.is_Integer and bool(largest < n)

    def less(self, x: Expr, n: Expr) -> bool:
        """Whether x < n is certain, where either may be negative."""
        largest: Expr = Integer(0)
        for factor, rest in (term.as_coeff_Mul() for term in sympy.Add.make_args(sympy.expand(x - n))):
            size = self.sizes.get(rest)
            if rest != 1 and factor > 0 and (size is None or not size.is_Integer):
                return False
            largest += factor if rest == 1 else max(factor, 0) * (size - 1 if size is not None else 0)
        return bool(largest < 0)

    def div(self, x: Expr, n: Expr) -> Expr:
        """x // n."""
        if n == 1:
            return x
        whole, rest = _divided(x, n)
        return whole + (Integer(0) if self.below(rest, n) else Div(rest, n))

    def rem(self, x: Expr, n: Expr) -> Expr:
        """x % n."""
        if n == 1:
            return Integer(0)
        _, rest = _divided(x, n)
        return rest if self.below(rest, n) else Rem(rest, n)

    def _largest(self, x: Expr) -> Expr | None:
        if x.is_Integer:
            return x if x >= 0 else None
        if x.is_Symbol:
            size = self.sizes.get(x)
            return size - 1 if size is not None and size.is_Integer else None
        if isinstance(x, Rem) and x.args[1].is_Integer:
            return x.args[1] - 1
        parts = [self._largest(a) for a in x.args]
        if any(p is None for p in parts):
            return None
        if isinstance(x, Div):
            return parts[0] // parts[1]
        return sum(parts) if x.is_Add else math.prod(parts) if x.is_Mul else None


def _divided(x: Expr, n: Expr) -> tuple[Expr, Expr]:
    """x = n * whole + rest, as far as the terms of x show it."""
    whole, rest = Integer(0), Integer(0)
    for term in sympy.Add.make_args(sympy.expand(x)):
        quotient = term / n
        if all(f.is_Integer or f.is_Symbol or isinstance(f, (Div, Rem)) for f in sympy.Mul.make_args(quotient)):
            whole += quotient
        else:
            rest += term
    return whole, rest


def joined(index: Index, shape: Sequence[Expr], ranges: Ranges) -> Expr:
    """The position in row-major order."""
    total: Expr = Integer(0)
    for i, n in zip(index, shape, strict=True):
        total = total * n + i
    return _rejoined(sympy.expand(total), ranges)


def _rejoined(x: Expr, ranges: Ranges) -> Expr:
    """n * (y // n) + y % n is y, with whatever the sum is multiplied by."""
    for rem in x.atoms(Rem):
        y, n = rem.args
        factor = x.coeff(rem)
        if factor != 0 and sympy.expand(x.coeff(Div(y, n)) - factor * n) == 0:
            return _rejoined(sympy.expand(x - factor * rem - factor * n * Div(y, n) + factor * y), ranges)
    return x


def parted(position: Expr, shape: Sequence[Expr], ranges: Ranges) -> Index:
    """The index at a position in row-major order."""
    found: list[Expr] = []
    for n in reversed(list(shape)[1:]):
        found.append(ranges.rem(position, n))
        position = ranges.div(position, n)
    return (position, *reversed(found)) if shape else ()


def reshaped(index: Index, result: Sequence[Expr], source: Sequence[Expr], ranges: Ranges) -> Index:
    """Where an element of a reshaped tensor is: dimensions that both have in common stay as they are."""
    found: list[Expr] = []
    i = j = 0
    while i < len(result) or j < len(source):
        first, last = i, j
        ours, theirs = Integer(1), Integer(1)
        while (i, j) == (first, last) or ours != theirs:  # the shortest piece of both shapes with as many elements
            if j < len(source) and (i == len(result) or not _less(ours, theirs)):
                theirs, j = theirs * source[j], j + 1
            else:
                ours, i = ours * result[i], i + 1
        found += parted(joined(index[first:i], result[first:i], ranges), source[last:j], ranges)
    return tuple(found)


def _less(a: Expr, b: Expr) -> bool:
    """Whether a product of sizes is less than another: one with more sizes that data decide counts as larger."""
    unknown = len(a.free_symbols), len(b.free_symbols)
    known = [x.subs(dict.fromkeys(x.free_symbols, 1)) for x in (a, b)]
    return unknown[0] < unknown[1] if unknown[0] != unknown[1] else bool(known[0] < known[1])


def sizes(shape: Sequence[Any]) -> Index:
    """A shape as expressions: numbers, or the symbols of sizes that data decide."""
    return tuple(n.node.expr if isinstance(n, torch.SymInt) else Integer(n) for n in shape)


def product(shape: Sequence[Any]) -> Expr:
    """How many elements a shape has."""
    return sympy.sympify(math.prod(shape))


def value_sizes(node: fx.Node) -> Index:
    return sizes(node.meta["val"].shape)


def dimension(node: fx.Node, name: str, rank: int) -> int:
    given = argument(node, name)
    return int(given or 0) % rank if rank else 0


# --- operators that only move elements ---

MOVES = SAME | RESHAPES | UNITS | TRANSPOSES | named("expand slice select")


def source_index(node: fx.Node, index: Index, ranges: Ranges) -> Index:
    """Where an element of the result of one of MOVES is in its operand."""
    name = name_of(node.target)
    operand: Any = node.args[0]
    source = value_sizes(operand)
    rank = len(source)
    if name in RESHAPES:
        return reshaped(index, value_sizes(node), source, ranges)
    if name in TRANSPOSES:
        order = list(range(rank))
        if name == "aten.permute":
            order = [d % rank for d in argument(node, "dims")]
        else:
            a, b = (0, 1) if name == "aten.t" else (dimension(node, "dim0", rank), dimension(node, "dim1", rank))
            if rank > 1:
                order[a], order[b] = b, a
        return tuple(index[order.index(d)] for d in range(rank))
    if name == "aten.unsqueeze":
        dim = dimension(node, "dim", rank + 1)
        return index[:dim] + index[dim + 1 :]
    if name == "aten.squeeze":
        result = iter(index)
        left_out = _squeezed(node, source)
        return tuple(Integer(0) if d in left_out else next(result) for d in range(rank))
    if name == "aten.expand":
        ahead = len(index) - rank
        result_sizes = value_sizes(node)
        return tuple(Integer(0) if n == 1 and result_sizes[ahead + d] != 1 else index[ahead + d] for d, n in enumerate(source))
    if name == "aten.slice":
        dim = dimension(node, "dim", rank)
        start, step = argument(node, "start") or 0, argument(node, "step") or 1
        start = start % source[dim] if start < 0 else min(start, source[dim])
        return (*index[:dim], index[dim] * step + start, *index[dim + 1 :])
    if name == "aten.select":
        dim = dimension(node, "dim", rank)
        at = argument(node, "index")
        return (*index[:dim], Integer(at) if at >= 0 else source[dim] + at, *index[dim:])
    return index


def _squeezed(node: fx.Node, source: Index) -> set[int]:
    given = argument(node, "dim") if len(node.args) > 1 or "dim" in node.kwargs else None
    dims = range(len(source)) if given is None else [given] if isinstance(given, int) else given
    return {d % len(source) for d in dims if source[d % len(source)] == 1}
