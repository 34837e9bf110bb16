"""Work: what operators compute, and what values weigh, at the reference load and with what earlier axes have divided."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import fx

from foldcc.ir.program import Program
from foldcc.layout import Shard
from foldcc.ops.captured import PLAIN, captured_record
from foldcc.plan import costs, roles
from foldcc.plan.choice import Choice
from foldcc.plan.strategies import Strategy, results_of


class Work:
    """The work of a program, in the units of `costs`.

    Attributes:
        hidden: the width of the residual stream.
        start: what starting a collective costs.
    """

    def __init__(self, program: Program, chosen: Mapping[str, Choice], slot_of: Mapping[fx.Node, fx.Node]):
        self.program, self.chosen, self.slot_of = program, chosen, slot_of
        self.hidden, self.batch = roles.hidden(program), roles.batch(program)
        self.start = costs.START * costs.TOKENS * self.hidden**2
        self.scale = self._reference()

    def _reference(self) -> float:
        """The factor by which the batch is scaled so that each data-parallel rank holds the reference load."""
        tokens = 1
        for node in self.program.placeholders:
            if self.program.slot(node.name).kind == "input":
                tokens = max(tokens, int(np.prod([int(n) for n in node.meta["val"].shape[:2]])))
        return costs.TOKENS * self.hidden * self.program.mesh.data_parallel / tokens

    def elements(self, node: fx.Node) -> float:
        """Elements of a value that a rank holds if no further axis divides it."""
        count = float(np.prod([int(n) for n in node.meta["val"].shape]) or 1.0)
        if any(self.batch in dim for dim in node.meta["dims"]):
            count *= self.scale
        for axis, choice in self.chosen.items():
            state = choice.slots.get(self.slot_of.get(node)) if node in self.slot_of else choice.state(node)
            if isinstance(state, Shard):
                count /= self.program.mesh.size(axis)
        return count

    def of(self, node: fx.Node) -> float:
        """What an operator costs a rank, forward and backward."""
        rule, known = node.meta["rule"], captured_record(node.target)
        passes = 3.0 if node.meta["grad"] else 1.0
        results = [r for r in results_of(node) if r is not None]
        traffic = costs.TRAFFIC * sum(self.elements(r) for r in results)
        flops = 0.0
        if known.products and not known.placed:  # what is placed elsewhere runs there
            shapes = {k: x.meta["val"].shape for k, x in known.arguments(node).items() if isinstance(x, fx.Node)}
            each = sum(self.elements(r) / r.meta["val"].numel() for r in results)
            flops = each * sum(count for count, *_ in known.products(**shapes))
        if rule is not None and known is PLAIN:
            contracted = [x for x in rule.letters() if rule.summed(x) and len(rule.operands) > 1]
            if contracted:
                product = float(np.prod([rule.sizes[x] for x in contracted]))
                flops = 2 * product * sum(self.elements(r) for r in results)
        return passes * (traffic + costs.FLOPS * flops / self.hidden)

    def sent(self, node: fx.Node, strategy: Strategy, ranks: int) -> float:
        """What the exchanges of the way in which an operator is divided cost a rank, forward and backward."""
        if strategy.division is None or strategy.division.sent is None:
            return 0.0
        arguments = captured_record(node.target).arguments(node)
        times, starts = strategy.division.sent(ranks, **arguments)
        return sum(n * self.elements(arguments[name]) for name, n in times.items()) + starts * self.start

    def holding(self, slot: fx.Node) -> float:
        """What holding a whole weight matrix costs; vectors are too small to count."""
        if self.program.slot(slot.name).kind != "parameter" or sum(bool(dim) for dim in slot.meta["dims"]) < 2:
            return 0.0
        return costs.HOLDING * costs.TOKENS * float(np.prod([int(n) for n in slot.meta["val"].shape]))
