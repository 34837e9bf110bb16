"""Names: what a kernel calls its values, and expressions of sizes and positions as text.

    r * 32 + c // 4        becomes        ((r * 32) + (c // 4))

A value whose name is taken gets another one, and so do the sizes that data decide: a launcher has to find them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
from sympy import Symbol

from foldcc.codegen.index import Div, Index, Rem

R, C = Symbol("r", integer=True, nonnegative=True), Symbol("c", integer=True, nonnegative=True)


class NoText(Exception):
    """A node cannot be computed in a tile, for the reason given; its region is made smaller."""


@dataclass
class Names:
    """The names of one kernel.

    Attributes:
        symbols: sizes in the text that data decide.
        where: the variables that positions are made of, and which of `r` and `c` each depends on.
        taken: names that are given.
    """

    symbols: set[Symbol] = field(default_factory=set)
    where: dict[Symbol, frozenset[Symbol]] = field(default_factory=lambda: {R: frozenset({R}), C: frozenset({C})})
    taken: set[str] = field(default_factory=set)

    def text(self, x: Any) -> str:
        """An index expression as text."""
        x = sympy.sympify(x)
        if x.is_Symbol:
            if x not in self.where:
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

    def depends(self, index: Index) -> frozenset[Symbol]:
        found: frozenset[Symbol] = frozenset()
        for i in index:
            for s in i.free_symbols:
                found |= self.where.get(s, frozenset())
        return found

    def new(self, name: str) -> str:
        """A name that no other value has."""
        found, i = name, 1
        while found in self.taken or found in ("r", "c", "r_ok", "c_ok"):
            found, i = f"{name}_at{i}", i + 1
        self.taken.add(found)
        return found
