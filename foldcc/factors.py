"""Factors: which tensor dimensions across a whole graph are the same thing.

A dimension is an ordered product of factors, written `(h d)`. Union-find over the rules of every operator leaves a handful
of factors; where one dimension is a product of two others, the factor is split, and every dimension that holds it with it.

    factors = Factors()
    h, d = factors.new(4), factors.new(8)
    factors.unify((factors.new(32),), (h, d))      # that dimension is now (h d)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import sympy

Dim = tuple[int, ...]
Dims = tuple[Dim, ...]


class Factors:
    """Union-find over factors, with refinement: a factor may turn out to be a product of smaller ones.

    Factors are numbers while they are being inferred; `symbols` names the ones that are left.
    """

    def __init__(self) -> None:
        self._size: list[int] = []
        self._parent: list[int] = []
        self._parts: dict[int, tuple[int, int]] = {}
        self._wish: dict[int, dict[str, int]] = {}
        self._symbols: dict[int, sympy.Symbol] = {}

    def new(self, size: int, name: str = "") -> int:
        """A new factor; `name` is a wish, the most frequent wish of a factor becomes its name."""
        self._size.append(size)
        self._parent.append(len(self._parent))
        if name:
            self._wish[len(self._parent) - 1] = {name: 1}
        return len(self._parent) - 1

    def _find(self, f: int) -> int:
        while self._parent[f] != f:
            self._parent[f] = self._parent[self._parent[f]]
            f = self._parent[f]
        return f

    def flat(self, dim: Iterable[int]) -> Dim:
        """The finest product that a dimension is known to be; factors of size 1 vanish."""
        found: list[int] = []
        for f in dim:
            f = self._find(f)
            if f in self._parts:
                found += self.flat(self._parts[f])
            elif self._size[f] != 1:
                found.append(f)
        return tuple(found)

    def size(self, dim: Iterable[int]) -> int:
        return math.prod(self._size[f] for f in self.flat(dim))

    def unify(self, first: Sequence[int], second: Sequence[int]) -> bool:
        """Makes two products the same, splitting factors where needed; False if their sizes do not nest."""
        a, b = list(self.flat(first)), list(self.flat(second))
        while a and b:
            x, y = a[0], b[0]
            m, n = self._size[x], self._size[y]
            if x == y or m == n:
                self._merge(x, y)
                a.pop(0)
                b.pop(0)
            elif m > n and m % n == 0:
                self._split(x, n)
                a[:1] = self.flat([x])
            elif n > m and n % m == 0:
                self._split(y, m)
                b[:1] = self.flat([y])
            else:
                return False
            a, b = list(self.flat(a)), list(self.flat(b))
        return not a and not b

    def _merge(self, x: int, y: int) -> None:
        if x == y:
            return
        self._parent[y] = x
        wishes = self._wish.setdefault(x, {})
        for name, votes in self._wish.pop(y, {}).items():
            wishes[name] = wishes.get(name, 0) + votes

    def _split(self, f: int, outer: int) -> None:
        self._parts[f] = (self.new(outer), self.new(self._size[f] // outer))

    def symbols(self, dim: Iterable[int]) -> tuple[sympy.Symbol, ...]:
        """The dimension as a product of `sympy` symbols."""
        return tuple(self._symbol(f) for f in self.flat(dim))

    def _symbol(self, f: int) -> sympy.Symbol:
        if f not in self._symbols:
            wishes = self._wish.get(f, {})
            name = max(wishes, key=lambda w: wishes[w]) if wishes else "w"
            taken = {s.name for s in self._symbols.values()}
            number, chosen = 1, name if wishes else "w1"
            while chosen in taken:
                number += 1
                chosen = f"{name}{number}"
            self._symbols[f] = sympy.Symbol(chosen, integer=True, positive=True)
        return self._symbols[f]

    @property
    def sizes(self) -> dict[sympy.Symbol, int]:
        """Size of every named factor."""
        return {symbol: self._size[f] for f, symbol in self._symbols.items()}
