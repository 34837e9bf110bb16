"""Choice: what was chosen on one mesh axis, and what it makes of the layouts of values."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from foldcc.ir.node import operands
from foldcc.ir.plan import OpLayouts
from foldcc.ir.program import Program
from foldcc.layout import INVARIANT, REPLICATED, Layout, Shard, State
from foldcc.plan.strategies import Strategy, product_of, results_of


@dataclass(frozen=True)
class Choice:
    """What was chosen on one axis: a strategy for each node, a state for each value that enters or leaves a block."""

    strategies: dict[fx.Node, Strategy]
    slots: dict[Any, State]

    def state(self, node: fx.Node) -> State | None:
        """The state in which an operator in a block leaves a value."""
        of_several = node.target is operator.getitem
        strategy = self.strategies.get(node.args[0] if of_several else node)
        return None if strategy is None else strategy.results[node.args[1] if of_several else 0]


def plain(node: fx.Node, state: State) -> State:
    """Where no gradient flows, replicated and invariant are the same."""
    return INVARIANT if state == REPLICATED and not node.meta["grad"] else state


def laid_out(program: Program, node: fx.Node | None, states: Mapping[str, State | None]) -> Layout | None:
    """The layout of a value with the states that there are, by axis; None for a value without any."""
    if node is None or (states and not any(states.values())):
        return None
    there = {a: plain(node, s) for a, s in states.items() if s is not None}
    return Layout(node.meta["dims"], program.sizes, there, {a: program.mesh.size(a) for a in states})


def op_layouts(program: Program, node: fx.Node, strategies: Mapping[str, Strategy]) -> OpLayouts:
    """The layouts that an operator's strategies, by axis, need and leave."""
    given = [laid_out(program, x, {a: s.operands[i] for a, s in strategies.items()}) for i, x in enumerate(operands(node))]
    left = [laid_out(program, r, {a: s.results[k] for a, s in strategies.items()}) for k, r in enumerate(results_of(node))]
    return OpLayouts(tuple(given), tuple(left), {a: s.way for a, s in strategies.items() if s.way})


def take(program: Program, axis: str, choice: Choice, taken: dict[fx.Node, dict[Any, int]]) -> None:
    """Notes which part of which letter of each node an axis has divided, for the axes after it."""
    for node, strategy in choice.strategies.items():
        rule, letters = node.meta["rule"], node.meta.get("letters", {})
        if rule is None:
            continue
        patterns = [*zip(rule.operands, strategy.operands, strict=False), *zip(rule.results, strategy.results, strict=True)]
        for pattern, state in patterns:
            if pattern is not None and isinstance(state, Shard):
                left = program.mesh.size(axis)
                for key in product_of(pattern, state, letters):
                    size = program.sizes[letters[key[0]][key[1]]] // taken[node].get(key, 1)
                    share = min(left, size)
                    taken[node][key] = taken[node].get(key, 1) * share
                    left //= share
                break
