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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from foldcc import ops
from foldcc.ir.node import operands
from foldcc.layout import INVARIANT, PARTIAL, REPLICATED, Shard, State, Symbol
from foldcc.rules.notation import Pattern, Rule

Dims = tuple[tuple[Symbol, ...], ...]
# Operators that find their rows of a replicated operand themselves, when another operand's product is cut more finely.
SELECTS = {ops.attention}
# Operators that end their own sum over a sharded letter, on every rank.
COMPLETES = {ops.token_loss}
# Letters that an operator counts along: a rank's part of them must be one stretch, so the outermost factor is divided.
COUNTED = {torch.ops.aten.embedding.default: "vocab", ops.token_loss: "vocab"}


@dataclass(frozen=True)
class Strategy:
    """States of the operands (None where there is none to choose) and of the results, and the share of the work done."""

    operands: tuple[State | None, ...]
    results: tuple[State, ...]
    share: float


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
    """

    def __init__(
        self,
        sizes: Mapping[Symbol, int],
        ranks: int,
        taken: Mapping[fx.Node, Mapping[Any, int]],
        takes: set[Symbol],
    ):
        self.takes = takes
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
        if node.target is ops.experts_node:
            # A token that stands on several ranks would be sent several times, so each must stand on one.
            return self._letter(node, rule, "t")
        for group in rule.linear:
            if all(i < len(tensors) and tensors[i] is not None for i in group):
                partial = {*group, *rule.add}
                given = tuple(None if x is None else PARTIAL if i in partial else REPLICATED for i, x in enumerate(tensors))
                found.append(Strategy(given, (PARTIAL,) * len(results), 1.0))
        for x in rule.letters():
            if x not in rule.whole:
                found += self._letter(node, rule, x)
        if node.target in SELECTS:
            found += self._selected(node, rule)
        return found

    def _letter(self, node: fx.Node, rule: Rule, x: str) -> list[Strategy]:
        letters = node.meta["letters"]
        if x not in letters:
            return []
        taken = self.taken.get(node, {})
        sizes = [self.sizes[f] // taken.get((x, i), 1) for i, f in enumerate(letters[x])]
        found = []
        for start, stop in runs(sizes, self.ranks):
            if not self.takes.issuperset(letters[x][start:stop]):
                continue
            if start and COUNTED.get(node.target) == x:
                continue
            strategy = self._run(node, rule, (x,), start, stop)
            if strategy is not None:
                found.append(strategy)
        return found

    def _selected(self, node: fx.Node, rule: Rule) -> list[Strategy]:
        """Heads cut more finely than key/value heads: each rank takes the key/value heads that its queries use."""
        letters = node.meta["letters"]
        pair = ("kv_heads", "group")
        if any(x not in letters for x in pair):
            return []
        first = [self.sizes[f] for f in letters["kv_heads"]]
        both = first + [self.sizes[f] for f in letters["group"]]
        spanning = [(a, b) for a, b in runs(both, self.ranks) if a == 0 and b > len(first)]
        return [s for a, b in spanning if (s := self._run(node, rule, pair, a, b)) is not None]

    def _run(self, node: fx.Node, rule: Rule, product: tuple[str, ...], start: int, stop: int) -> Strategy | None:
        letters = node.meta["letters"]
        summed = all(rule.summed(x) for x in product)

        def state(pattern: Pattern | None, absent: State) -> State | None:
            if pattern is None:
                return None
            places = [(d, dim.index(product[0])) for d, dim in enumerate(pattern) if product[0] in dim]
            places = [(d, at) for d, at in places if pattern[d][at : at + len(product)] == product]
            if len(places) > 1:
                raise _Ambiguous
            if not places:
                return absent
            d, at = places[0]
            before = sum(len(letters.get(y, ())) for y in pattern[d][:at])
            return Shard(d, before + start, before + stop)

        try:
            given = [state(p, PARTIAL if summed and i in rule.add else REPLICATED) for i, p in enumerate(rule.operands)]
            left = [state(p, PARTIAL) for p in rule.results]
        except _Ambiguous:
            return None
        if node.target is ops.experts_node:
            given[3:] = [None if g is None else INVARIANT for g in given[3:]]
        if not summed and any(s == PARTIAL for s in left):
            return None
        if summed and node.target in COMPLETES:
            left = [INVARIANT for _ in left]
        states = tuple(s if s is not None else PARTIAL for s in left)
        return Strategy(tuple(given), states, 1 / self.ranks)


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
