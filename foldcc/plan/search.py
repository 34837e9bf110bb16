"""Choose: on one mesh axis, a strategy for each operator and a state for each value between blocks, at the least cost.

A small integer program: one binary choice per distinct operator, a cost for each move between states. Blocks that repeat
share their choices, and so do the values that the main graph passes between blocks.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from math import prod
from typing import Any, NoReturn

import numpy as np
from torch import fx

from foldcc.errors import FoldError, divisors, listed
from foldcc.ir.node import name_of, operands
from foldcc.ir.plan import OpLayouts, Plan, UnfitPlan
from foldcc.ir.program import Program, where
from foldcc.layout import REPLICATED, Shard, State
from foldcc.mesh import SAMPLES
from foldcc.ops.captured import Division, captured_record
from foldcc.plan import costs, roles
from foldcc.plan.choice import Choice, laid_out, op_layouts, plain, take
from foldcc.plan.interface import interface, returns
from foldcc.plan.solve import IntegerProgram
from foldcc.plan.states import between_blocks, instead, takes, zigzags
from foldcc.plan.strategies import Strategist, Strategy, results_of
from foldcc.plan.work import Work


class _AxisProblem:
    def __init__(
        self,
        program: Program,
        axis: str,
        chosen: dict[str, Choice],
        taken: dict[fx.Node, dict[Any, int]],
        plan: Plan,
    ):
        self.program, self.axis, self.chosen, self.plan = program, axis, chosen, plan
        self.ranks = program.mesh.size(axis)
        self.model = IntegerProgram()
        self.slot_of = interface(program)
        self.said = self._said()
        self.outside = {self.slot_of.get(n, n) for n in (*program.placeholders, *program.outputs)}
        self.work = Work(program, chosen, self.slot_of)
        self.batch = roles.batch(program)
        self.takes = takes(program, axis)
        self.zigzags = zigzags(program, axis) & self.takes if plan.order != "natural" else set()
        others, behind = instead(program, axis, self.takes), program.mesh.size("tp")
        self.strategist = Strategist(axis, program.sizes, self.ranks, taken, self.takes, self.zigzags, others, behind)
        self.strategies: dict[fx.Node, list[tuple[Strategy, int]]] = {}
        self.slots: dict[fx.Node, dict[State, int]] = {}
        # For each value inside a block: the states it is left in and, for each reader, those it is needed in.
        self.made: dict[fx.Node, dict[State, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.needed: dict[fx.Node, list[dict[State, list[int]]]] = defaultdict(list)

    def _said(self) -> dict[fx.Node, tuple[str, State]]:
        """What the plan says of values that enter the main graph or pass between blocks: by whose name, and the state."""
        found: dict[fx.Node, tuple[str, State]] = {}
        for node in self.program.graph.graph.nodes:
            name, layout = node.name, self.plan.values.get(node.name)
            if node.op == "placeholder" and (slot := self.program.slot(name)).kind == "parameter":
                name, layout = slot.names[0], self.plan.parameters.get(slot.names[0])
            if layout is not None and layout.view == "attention" and self.axis in layout.states:
                found.setdefault(self.slot_of.get(node, node), (name, layout.states[self.axis]))
        return found

    def build(self) -> None:
        program = self.program
        for name, block in program.blocks.items():
            times = program.count(name)
            for node in block.graph.nodes:
                if node.op == "placeholder":
                    self._slot(self.slot_of[node])
                elif node.op == "call_function" and node.target is not operator.getitem:
                    self._node(name, node, times)
        for node in program.placeholders:
            if node.users:
                self._slot(self.slot_of.setdefault(node, node))
        self._returned()
        self._moves()

    def _node(self, block: str, node: fx.Node, times: int) -> None:
        options = self.strategist.of(node)
        if self.axis in SAMPLES:
            # Only an operator that cannot run on a part of the samples is given them whole.
            options = [s for s in options if self._keeps_samples(node, s)] or options
        if not any(x is not None and x.meta["grad"] for x in (node, *operands(node))):
            options = [s for s in options if REPLICATED not in s.results or s.operands == ()]
        if not options:
            self._infeasible(node)
        said = self.plan.blocks.get(block, {}).get(node.name)
        if said is not None:
            there = [s for s in options if self._agrees(node, s, said)]
            if not there:
                self._unfit(f"{block} {node.name}", said, *(op_layouts(self.program, node, {self.axis: s}) for s in options))
            options = there
        elif self.plan.attention or self.plan.order == "zigzag":
            options = self._asked(node, options)
        if self.axis == "tp" and "kv_heads" in node.meta.get("letters", ()):
            self._check_heads(node, options)
        work = self.work.of(node) * times
        found = []
        for s in options:
            found.append((s, self.model.variable(work * s.share + self.work.sent(node, s, self.ranks) * times, integer=True)))
        self.model.row([v for _, v in found], [1.0] * len(found), 1, 1)
        self.strategies[node] = found
        for i, x in enumerate(operands(node)):
            if x is None:
                continue
            wanted: dict[State, list[int]] = defaultdict(list)
            for s, v in found:
                state = s.operands[i]
                if state is not None:
                    wanted[plain(x, state)].append(v)
            self.needed[x].append(wanted)
        for k, r in enumerate(results_of(node)):
            if r is not None:
                for s, v in found:
                    self.made[r][plain(r, s.results[k])].append(v)

    def _keeps_samples(self, node: fx.Node, strategy: Strategy) -> bool:
        """Whether each value that has the batch factor is divided along it: no rank holds another's samples."""
        values = [*zip(operands(node), strategy.operands, strict=False), *zip(results_of(node), strategy.results, strict=True)]
        return all(
            isinstance(state, Shard) and self.batch in x.meta["dims"][state.dim][state.start : state.stop]
            for x, state in values
            if x is not None and state is not None and any(self.batch in dim for dim in x.meta["dims"])
        )

    def _agrees(self, node: fx.Node, strategy: Strategy, said: OpLayouts) -> bool:
        """Whether a strategy is the one that the plan says, as far as it says one for this axis."""
        pairs = [
            *zip(operands(node), strategy.operands, said.operands, strict=False),
            *zip(results_of(node), strategy.results, said.results, strict=False),
        ]
        return said.ways.get(self.axis, strategy.way) == strategy.way and all(
            plain(x, state) == layout.states[self.axis]
            for x, state, layout in pairs
            if x is not None and state is not None and layout is not None and self.axis in layout.states
        )

    def _asked(self, node: fx.Node, options: list[Strategy]) -> list[Strategy]:
        """The strategies of the way to divide, and of the order, that the plan asks for, where there are several."""
        attention, zigzag = self.plan.attention, self.plan.order == "zigzag"

        def fits(d: Division | None) -> bool:
            return d is not None and attention in ("", d.way) and (d.zigzag or not zigzag)

        ways = [d for d in captured_record(node.target).divisions if d.way and d.only == self.axis]
        there = [s for s in options if fits(s.division)]
        if ways and not there:
            d = next(d for d in reversed(ways) if fits(d))
            factors = {x: node.meta["letters"].get(x, ()) for x in d.letters}
            sizes = " ".join(f"{x}={'*'.join(str(self.strategist.sizes[f]) for f in factors[x])}" for x in d.letters)
            why = self.strategist.unfit(node, d) or f"{sizes} cannot be cut in {self.ranks * (1 + zigzag)} equal parts"
            told = ", ".join(f"{x}={y!r}" for x, y in (("attention", attention), ("order", self.plan.order)) if y)
            raise FoldError(
                f"{told} cannot be on {self.axis}={self.ranks}: {why}.",
                at=where(node),
                mesh=str(self.program.mesh),
                valid=f"{listed(dict.fromkeys(s.way for s in options if s.way))}; or without it, the cheapest for each layer",
            )
        return there if ways else options

    def _unfit(self, what: str, said: object, *options: object) -> NoReturn:
        raise UnfitPlan(
            f"The plan's {what} is not possible on {self.axis}={self.ranks}.",
            plan=said,
            valid="\n".join(dict.fromkeys(map(str, options))),
            mesh=str(self.program.mesh),
        )

    def _slot(self, slot: fx.Node) -> dict[State, int]:
        if slot in self.slots:
            return self.slots[slot]
        zigzags = () if slot in self.outside else self.zigzags  # of which DTensor has no word
        states = between_blocks(self.program, self.axis, slot, self.chosen, self.takes, zigzags)
        if slot in self.said:
            name, state = self.said[slot]
            if state not in states:
                self._unfit(name, *(laid_out(self.program, slot, {self.axis: s}) for s in (state, *states)))
            states = [state]
        held = [node for node in self.program.placeholders if self.slot_of.get(node) is slot and self.axis not in SAMPLES]
        holding = sum(map(self.work.holding, held))
        found = {}
        for state in states:
            cost = holding / self.ranks if isinstance(state, Shard) else holding
            found[state] = self.model.variable(cost, integer=True)
        self.model.row(list(found.values()), [1.0] * len(found), 1, 1)
        self.slots[slot] = found
        return found

    def _returned(self) -> None:
        done = set()
        for inner, outer in returns(self.program):
            slot = self.slot_of[outer]
            if (inner, slot) in done:
                continue
            done.add((inner, slot))
            self.needed[inner].append({plain(inner, s): [v] for s, v in self._slot(slot).items()})

    def _moves(self) -> None:
        """A cost for every pair of a state in which a value is left and one in which it is needed."""
        for name, block in self.program.blocks.items():
            times = self.program.count(name)
            for x in block.graph.nodes:
                if x not in self.needed:
                    continue
                made: dict[State, list[int]]
                if x.op == "placeholder":
                    made = {s: [v] for s, v in self.slots[self.slot_of[x]].items()}
                    made = {plain(x, s): v for s, v in made.items()}
                else:
                    made = self.made[x]
                size = self.work.elements(x)
                # A move is paid once, however many consumers share it; each consumer's own plan keeps the bound tight.
                paid: dict[tuple[State, State], int] = {}
                for wanted in self.needed[x]:
                    into: dict[State, list[int]] = defaultdict(list)
                    for source, variables in made.items():
                        out = []
                        for target in wanted:
                            cost = self._move(x, source, target, size)
                            if cost is None:
                                continue
                            moved = self.model.variable()
                            if cost:
                                if (source, target) not in paid:
                                    paid[source, target] = self.model.variable(cost * times)
                                self.model.row([moved, paid[source, target]], [1.0, -1.0], -np.inf, 0)
                            out.append(moved)
                            into[target].append(moved)
                        self.model.row([*out, *variables], [*[1.0] * len(out), *[-1.0] * len(variables)], -np.inf, 0)
                    for target, needs in wanted.items():
                        self.model.row([*needs, *into[target]], [*[1.0] * len(needs), *[-1.0] * len(into[target])], -np.inf, 0)

    def _move(self, x: fx.Node, source: State, target: State, size: float) -> float | None:
        """Cost of a move. A parameter is used where it is kept, also cast: gathering it for use is another pass's business."""
        if roles.is_parameter(x) and isinstance(source, Shard) and source != target:
            return None
        start = 0.0 if x.meta.get("parameter") else self.work.start
        # An exchange over tp would be cheaper than it is counted here. Counting on it there gives other layouts, such as an
        # embedding that is divided along its width.
        return costs.move(source, target, size, self.ranks, x.meta["grad"], start, whole=self.axis != "cp")

    def _check_heads(self, node: fx.Node, options: list[Strategy]) -> None:
        """Attention that cannot be divided would run whole on every rank, which nobody means who asks for tp."""

        def divided(strategies: list[Strategy]) -> bool:
            return any(isinstance(state, Shard) for s in strategies for state in s.results)

        first, second = (node.meta["letters"][x] for x in ("kv_heads", "group"))
        if divided(options) or not self.takes.issuperset(first + second):
            return
        shared, each = (prod(self.program.sizes[f] for f in x) for x in (first, second))
        heads = shared * each
        if heads == 1:  # there are none, of queries without such a dimension; that all ranks compute it, the summary says
            return
        taken = self.strategist.taken
        left = heads // prod(n for (x, _), n in taken.get(node, {}).items() if x in ("kv_heads", "group"))
        others = f", of which the axes before leave {left} to a rank" if left < heads else ""
        possible = [
            d
            for d in divisors(heads)
            if d > 1 and divided(Strategist(self.axis, self.program.sizes, d, taken, self.takes).of(node))
        ]
        raise FoldError(
            f"{heads} attention heads, {each} to each of {shared} key/value heads{others}, do not divide over tp={self.ranks}.",
            at=where(node),
            mesh=str(self.program.mesh),
            valid=f"tp: {listed([1, *possible])}",
        )

    def _infeasible(self, node: fx.Node) -> None:
        tokens = operands(node)[0]
        assert tokens is not None
        dims = " ".join(f"{f}={self.program.sizes[f]}" for f in tokens.meta["dims"][0])
        raise FoldError(
            f"The tokens of {name_of(node.target)} do not divide over {self.axis}={self.ranks}: {dims}.",
            at=where(node),
            mesh=str(self.program.mesh),
            valid=f"a sequence length that is a multiple of {self.ranks}",
        )


def choose(program: Program, axis: str, chosen: dict[str, Choice], taken: dict[fx.Node, dict[Any, int]], plan: Plan) -> Choice:
    """The cheapest choice on one axis of all that the plan allows, given what was chosen on the axes before it."""
    problem = _AxisProblem(program, axis, chosen, taken, plan)
    problem.build()
    x = problem.model.solve()
    if x is None:
        raise FoldError(f"No layout over {axis}={problem.ranks} satisfies every operator.", mesh=str(program.mesh))
    strategies = {n: max(found, key=lambda sv: x[sv[1]])[0] for n, found in problem.strategies.items()}
    states = {slot: max(found, key=lambda s: x[found[s]]) for slot, found in problem.slots.items()}
    choice = Choice(strategies, states)
    take(program, axis, choice, taken)
    return choice
