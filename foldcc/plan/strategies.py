"""Strategies: the ways in which one operator can run on the ranks of one mesh axis.

A strategy says in which state it needs each operand and in which state it leaves each result:

    linear "... k, n k -> ... n" on an axis of size 2:
        x I,   w I   -> I        every rank computes the same
        x R,   w R   -> R        the same, with a gradient that is partial
        x k@,  w k@  -> P        row-parallel
        x R,   w n@  -> n@       column-parallel
        x s@,  w R   -> s@       sequence-parallel
        x P,   w R   -> P        linear in x
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from foldcc.ir.node import operands
from foldcc.layout import INVARIANT, PARTIAL, REPLICATED, Shard, State, Symbol
from foldcc.ops.captured import Division, captured_record
from foldcc.plan import roles
from foldcc.rules.notation import Pattern, Rule

Dims = tuple[tuple[Symbol, ...], ...]


@dataclass(frozen=True)
class Strategy:
    """States of the operands (None where there is none to choose) and of the results, and the share of the work done.

    Attributes:
        division: how the operator is divided, if it is.
    """

    operands: tuple[State | None, ...]
    results: tuple[State, ...]
    share: float
    division: Division | None = None

    @property
    def way(self) -> str:
        """The name of the way to divide, where there are several."""
        return "" if self.division is None else self.division.way


def results_of(node: fx.Node) -> list[fx.Node | None]:
    """The values that a node leaves: itself, or what is taken out of its tuple."""
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return [node]
    found: list[fx.Node | None] = [None] * len(node.meta["val"])
    for user in node.users:
        found[user.args[1]] = user
    return found


def runs(sizes: Sequence[int], ranks: int) -> list[tuple[int, int]]:
    """The runs of factors, as (start, stop), that `ranks` can divide: all but the last of a run are used up."""
    found = []
    for start in range(len(sizes)):
        left, stop = ranks, start
        while left > 1 and stop < len(sizes):
            size = sizes[stop]
            if size == 1 or (size % left and left % size):
                break
            left = 1 if size % left == 0 else left // size
            stop += 1
        if left == 1:
            found.append((start, stop))
    return found


class Strategist:
    """Lists the strategies of nodes on one axis, given what earlier axes have already divided.

    Attributes:
        takes: the factors that this axis may divide.
        zigzags: those that ranks may have zig-zag.
        instead: those that it may divide where no parameter is summed over, instead of a sequence that must be whole; of a
            dimension that then has several positions left on each rank, also when the axes behind it divide it.
        behind: the ranks of these axes.
    """

    def __init__(
        self,
        axis: str,
        sizes: Mapping[Symbol, int],
        ranks: int,
        taken: Mapping[fx.Node, Mapping[Any, int]],
        takes: set[Symbol],
        zigzags: Collection[Symbol] = (),
        instead: Collection[Symbol] = (),
        behind: int = 1,
    ):
        self.axis = axis
        self.takes = takes
        self.zigzags = zigzags
        self.instead = instead
        self.behind = behind
        self.sizes = sizes
        self.ranks = ranks
        self.taken = taken

    def of(self, node: fx.Node) -> list[Strategy]:
        tensors, results = operands(node), results_of(node)
        rule: Rule | None = node.meta["rule"]
        found = []
        for state in (INVARIANT, REPLICATED):
            given = tuple(None if x is None else state for x in tensors)
            found.append(Strategy(given, (state,) * len(results), 1.0))
        if rule is None:
            return found
        if captured_record(node.target).placed:
            found = []  # a token that stands on several ranks would be sent several times, so each must stand on one
        for group in rule.linear:
            if all(i < len(tensors) and tensors[i] is not None for i in group):
                partial = {*group, *rule.add}
                given = tuple(None if x is None else PARTIAL if i in partial else REPLICATED for i, x in enumerate(tensors))
                found.append(Strategy(given, (PARTIAL,) * len(results), 1.0))
        for division in divisions(node):
            found += self._divided(node, rule, division)
        return found

    def _divided(self, node: fx.Node, rule: Rule, division: Division) -> list[Strategy]:
        letters, taken = node.meta["letters"], self.taken.get(node, {})
        if any(x not in letters or rule.sizes[x] == 0 for x in division.letters) or self.unfit(node, division):
            return []
        product = [(x, i, f) for x in division.letters for i, f in enumerate(letters[x])]
        takes = self.takes | self._instead(node)
        found = []
        for start, stop in runs([self.sizes[f] // taken.get((x, i), 1) for x, i, f in product], self.ranks):
            each = {x for x, _, _ in product[start:stop]} == set(division.letters)
            allowed = bool(division.only) or takes.issuperset(f for _, _, f in product[start:stop])
            if each and allowed and not (start and division.stretch):
                whole = not any(taken.get((x, i), 1) > 1 for x, i, _ in product[start:stop])
                zigzag = whole and not division.stretch and stop - start == 1 and product[start][2] in self.zigzags
                for order in [False] * (not division.zigzag) + [True] * zigzag:
                    strategy = self._run(node, rule, division, start, stop, order)
                    found += [] if strategy is None else [strategy]
        return found

    def _instead(self, node: fx.Node) -> set[Symbol]:
        if not self.instead or roles.summed_over_parameter(node):
            return set()
        dims = [dim for x in (*operands(node), *results_of(node)) if x is not None for dim in x.meta["dims"]]
        alone = {f for dim in dims if prod(self.sizes[g] for g in dim) <= self.ranks * self.behind for f in dim}
        return {f for f in self.instead if f not in alone}

    def unfit(self, node: fx.Node, division: Division) -> str:
        """Why a node cannot be divided in this way on this axis, as far as its arguments say it; empty if it can."""
        if division.only not in ("", self.axis):
            return f"it is for {division.only}"
        letters, first = node.meta["letters"], division.letters[0]
        if any(letters.get(x) != letters.get(first) for x in division.beside):
            return "what sees and what is seen are not one sequence"
        return "" if division.unfit is None else division.unfit(self.ranks, **captured_record(node.target).arguments(node))

    def _run(self, node: fx.Node, rule: Rule, division: Division, start: int, stop: int, zigzag: bool) -> Strategy | None:
        letters = node.meta["letters"]
        summed = all(rule.summed(x) for x in division.letters)

        def state(pattern: Pattern | None, absent: State) -> State | None:
            if pattern is None:
                return None
            there = {x for dim in pattern for x in dim}
            product = next((p for p in ((x,) for x in division.beside) if not there.isdisjoint(p)), division.letters)
            product = division.letters if division.letters[0] in there else product
            places = [(d, dim.index(product[0])) for d, dim in enumerate(pattern) if product[0] in dim]
            places = [(d, at) for d, at in places if pattern[d][at : at + len(product)] == product]
            if len(places) > 1:
                raise _Ambiguous
            if not places:
                return absent
            d, at = places[0]
            before = sum(len(letters.get(y, ())) for y in pattern[d][:at])
            return Shard(d, before + start, before + stop, zigzag=zigzag)

        placed = placed_operands(node)
        absent = [
            INVARIANT if i in placed else PARTIAL if summed and i in rule.add else REPLICATED for i in range(len(rule.operands))
        ]
        try:
            given = tuple(state(p, other) for p, other in zip(rule.operands, absent, strict=True))
            left = [state(p, PARTIAL) for p in rule.results]
        except _Ambiguous:
            return None
        if not summed and any(s == PARTIAL for s in left):
            return None
        if division.ends_sum:
            left = [INVARIANT for _ in left]
        given += (None,) * (len(operands(node)) - len(given))  # what only lowering gives it
        share = 1 / self.ranks
        if division.share is not None:
            share = division.share(self.ranks, **captured_record(node.target).arguments(node))
        return Strategy(given, tuple(s if s is not None else PARTIAL for s in left), share, division)


def divisions(node: fx.Node) -> list[Division]:
    """How a node may be divided: along each letter that need not be whole, and in the other ways that its record lists."""
    rule, own = node.meta["rule"], captured_record(node.target).divisions
    said = {d.letters for d in own if not d.only}
    return [*(Division((x,)) for x in rule.letters() if x not in rule.whole and (x,) not in said), *own]


def divided(node: fx.Node) -> dict[Division, str]:
    """How a node whose values have layouts is divided, and on which axes, comma separated in the order of the mesh.

    The layouts say which letters each axis divides; where several ways divide the same, `node.meta["ways"]` says which.
    """
    rule: Rule | None = node.meta.get("rule")
    if rule is None:
        return {}
    touched: dict[str, set[str]] = {}
    zigzag: set[str] = set()
    for x, pattern in [*zip(operands(node), rule.operands, strict=False), *zip(results_of(node), rule.results, strict=False)]:
        for axis, state in x.meta["layout"].states.items() if x is not None and pattern is not None else ():
            if isinstance(state, Shard):
                touched.setdefault(axis, set()).update(y for y, _ in product_of(pattern, state, node.meta["letters"]))
                zigzag |= {axis} if state.zigzag else set()
    axes, ways = node.meta["layout"].states, node.meta.get("ways", {})

    def runs_so(d: Division, axis: str) -> bool:
        order = not d.way or (axis in zigzag) == d.zigzag
        return touched.get(axis) == {*d.letters, *d.beside} and ways.get(axis, "") == d.way and order

    found = {d: ",".join(a for a in axes if runs_so(d, a)) for d in divisions(node)}
    return {d: axes for d, axes in found.items() if axes}


def product_of(pattern: Pattern, state: Shard, letters: Mapping[str, Sequence[Any]]) -> list[tuple[str, int]]:
    """The letters that a state divides in a value of this pattern, and which of each one's factors."""
    flat = [(x, i) for x in pattern[state.dim] for i in range(len(letters.get(x, ())))]
    return flat[state.start : state.stop]


def placed_operands(node: fx.Node) -> set[int]:
    """The operands that hold a letter which the experts' side divides; their layouts are dispatch's to give."""
    placed, rule = captured_record(node.target).placed, node.meta.get("rule")
    patterns = rule.operands if placed and rule is not None else ()
    return {i for i, p in enumerate(patterns) if any(x in placed for dim in p or () for x in dim)}


class _Ambiguous(Exception):
    """A letter stands twice in one value, so sharding it would not say which dimension is meant."""


def find_letters(node: fx.Node, sizes: Mapping[Symbol, int]) -> None:
    """Keeps in `node.meta["letters"]` the factors that each letter of the node's rule stands for."""
    rule: Rule | None = node.meta.get("rule")
    if rule is None:
        return
    values = [*operands(node)[: len(rule.operands)], *results_of(node)]
    dims = [None if v is None or not isinstance(v.meta["val"], torch.Tensor) else v.meta["dims"] for v in values]
    node.meta["letters"] = letter_factors(rule, dims, dict(sizes))


def letter_factors(rule: Rule, factors: list[tuple[tuple[object, ...], ...] | None], sizes: dict) -> dict:
    """The factors that each letter of a rule stands for, read off the dimensions of operands and results.

    Returns a dict from letter to a tuple of factors; a letter whose factors cannot be told apart from its neighbours'
    is missing.
    """
    found: dict[str, tuple[object, ...]] = {}
    for pattern, dims in zip([*rule.operands, *rule.results], factors, strict=True):
        for product, dim in zip(pattern or (), dims or (), strict=False):
            rest = list(dim)
            for x in product:
                taken, size = [], 1
                while rest and size < rule.sizes[x]:
                    size *= sizes[rest[0]]
                    taken.append(rest.pop(0))
                if size != rule.sizes[x]:
                    break
                found.setdefault(x, tuple(taken))
    return found
