"""Choose: on one mesh axis, a strategy for each operator and a state for each value between blocks, at the least cost.

A small integer program: one binary choice per distinct operator, a cost for each move between states. Blocks that repeat
share their choices, and so do the values that the main graph passes between blocks.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from torch import fx

from foldcc.errors import FoldError, divides, divisors, listed
from foldcc.ir.node import name_of, operands
from foldcc.ir.plan import OpLayouts, Plan, UnfitPlan
from foldcc.ir.program import Program, where
from foldcc.layout import INVARIANT, REPLICATED, Layout, Shard, State, Symbol
from foldcc.ops.captured import PLAIN, captured_record
from foldcc.plan import costs, roles
from foldcc.plan.interface import interface, returns
from foldcc.plan.solve import IntegerProgram
from foldcc.plan.strategies import Strategist, Strategy, product_of, results_of, runs


@dataclass(frozen=True)
class Choice:
    """What was chosen on one axis: a strategy for each node, a state for each value that enters or leaves a block."""

    strategies: dict[fx.Node, Strategy]
    slots: dict[Any, State]


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
        self.hidden = roles.hidden(program)
        self.batch = roles.batch(program)
        self.takes = self._takes()
        self.strategist = Strategist(axis, program.sizes, self.ranks, taken, self.takes)
        self.scale = self._reference()
        self.strategies: dict[fx.Node, list[tuple[Strategy, int]]] = {}
        self.slots: dict[fx.Node, dict[State, int]] = {}
        # For each value inside a block: the states it is left in and, for each reader, those it is needed in.
        self.made: dict[fx.Node, dict[State, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.needed: dict[fx.Node, list[dict[State, list[int]]]] = defaultdict(list)

    def _takes(self) -> set[Symbol | None]:
        """The factors that the axis may divide: samples are dp's, sequences cp's, and what tp takes is a question of cost."""
        if self.axis == "dp":
            return {self.batch}
        if self.axis != "cp":
            return roles.factors(self.program) - {self.batch}
        found = roles.sequences(self.program) - {self.batch}
        if not found:
            raise FoldError(
                f"No input has a sequence that cp={self.ranks} could divide.",
                mesh=str(self.program.mesh),
                valid="cp=1; or inputs with a dimension beside that of their samples which no product with a weight sums over",
            )
        sizes = sorted({self.program.sizes[f] for f in found})
        if all(n % self.ranks for n in sizes):
            divides("positions", sizes[-1], "cp", self.ranks, mesh=str(self.program.mesh), valid=f"multiples of {self.ranks}")
        return found

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

    def _reference(self) -> float:
        """The factor by which the batch is scaled so that each data-parallel rank holds the reference load."""
        tokens = 1
        for node in self.program.placeholders:
            if self.program.slot(node.name).kind == "input":
                tokens = max(tokens, int(np.prod([int(n) for n in node.meta["val"].shape[:2]])))
        return costs.TOKENS * self.hidden * self.program.mesh.size("dp") / tokens

    def elements(self, node: fx.Node) -> float:
        """Elements of a value at the reference load, with what earlier axes have divided."""
        count = float(np.prod([int(n) for n in node.meta["val"].shape]) or 1.0)
        if any(self.batch in dim for dim in node.meta["dims"]):
            count *= self.scale
        for axis, choice in self.chosen.items():
            state = choice.slots.get(self.slot_of.get(node)) if node in self.slot_of else _state_of(choice, node)
            if isinstance(state, Shard):
                count /= self.program.mesh.size(axis)
        return count

    def work(self, node: fx.Node) -> float:
        rule, known = node.meta["rule"], captured_record(node.target)
        passes = 3.0 if node.meta["grad"] else 1.0
        results = [r for r in results_of(node) if r is not None]
        traffic = costs.TRAFFIC * sum(self.elements(r) for r in results)
        flops = 0.0
        if rule is not None and (
            known is PLAIN or (known.products and not known.placed)
        ):  # what is placed elsewhere runs there
            contracted = [x for x in rule.letters() if rule.summed(x) and len(rule.operands) > 1]
            if contracted:
                product = float(np.prod([rule.sizes[x] for x in contracted]))
                flops = 2 * product * sum(self.elements(r) for r in results)
        return passes * (traffic + costs.FLOPS * flops / self.hidden)

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
        if self.axis == "dp":
            # Only an operator that cannot run on a part of the samples is given them whole.
            options = [s for s in options if self._keeps_samples(node, s)] or options
        if not node.meta["grad"]:
            options = [s for s in options if REPLICATED not in s.results or s.operands == ()]
        if not options:
            self._infeasible(node)
        said = self.plan.blocks.get(block, {}).get(node.name)
        if said is not None:
            there = [s for s in options if self._agrees(node, s, said)]
            if not there:
                self._unfit(f"{block} {node.name}", said, (self._op_layouts(node, s) for s in options))
            options = there
        if self.axis == "tp" and "kv_heads" in node.meta.get("letters", ()):
            self._check_heads(node, options)
        work = self.work(node) * times
        found = []
        for s in options:
            found.append((s, self.model.variable(work * s.share, integer=True)))
        self.model.row([v for _, v in found], [1.0] * len(found), 1, 1)
        self.strategies[node] = found
        for i, x in enumerate(operands(node)):
            if x is None:
                continue
            wanted: dict[State, list[int]] = defaultdict(list)
            for s, v in found:
                state = s.operands[i]
                if state is not None:
                    wanted[self._plain(x, state)].append(v)
            self.needed[x].append(wanted)
        for k, r in enumerate(results_of(node)):
            if r is not None:
                for s, v in found:
                    self.made[r][self._plain(r, s.results[k])].append(v)

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
        return all(
            self._plain(x, state) == layout.states[self.axis]
            for x, state, layout in pairs
            if x is not None and state is not None and layout is not None and self.axis in layout.states
        )

    def _layout(self, node: fx.Node | None, state: State | None) -> Layout | None:
        """A value's layout on this axis alone."""
        if node is None or state is None:
            return None
        return Layout(node.meta["dims"], self.program.sizes, {self.axis: self._plain(node, state)}, {self.axis: self.ranks})

    def _op_layouts(self, node: fx.Node, strategy: Strategy) -> OpLayouts:
        given, left = zip(operands(node), strategy.operands, strict=False), zip(results_of(node), strategy.results, strict=True)
        return OpLayouts(*(tuple(self._layout(x, s) for x, s in side) for side in (given, left)))

    def _unfit(self, what: str, said: object, options: Iterable[object]) -> NoReturn:
        raise UnfitPlan(
            f"The plan's {what} is not possible on {self.axis}={self.ranks}.",
            plan=said,
            valid="\n".join(dict.fromkeys(map(str, options))),
            mesh=str(self.program.mesh),
        )

    def _plain(self, node: fx.Node, state: State) -> State:
        """Where no gradient flows, replicated and invariant are the same."""
        return INVARIANT if state == REPLICATED and not node.meta["grad"] else state

    def _slot(self, slot: fx.Node) -> dict[State, int]:
        if slot in self.slots:
            return self.slots[slot]
        states = self._slot_states(slot)
        if slot in self.said:
            name, state = self.said[slot]
            if state not in states:
                self._unfit(name, self._layout(slot, state), (self._layout(slot, s) for s in states))
            states = [state]
        holding = sum(self._holding(node) for node in self.program.placeholders if self.slot_of.get(node) is slot)
        found = {}
        for state in states:
            cost = holding / self.ranks if isinstance(state, Shard) else holding
            found[state] = self.model.variable(cost, integer=True)
        self.model.row(list(found.values()), [1.0] * len(found), 1, 1)
        self.slots[slot] = found
        return found

    def _slot_states(self, slot: fx.Node) -> list[State]:
        kind = None
        if slot.op == "placeholder" and slot.graph is self.program.graph.graph:
            kind = self.program.slot(slot.name).kind
            kind = None if kind == "tap" else kind  # laid out as what it is added to
        if self.axis == "dp":
            if kind == "input":
                return [self._batch_state(slot)]
            if kind is not None:
                return [INVARIANT]
            if any(self.batch in dim for dim in slot.meta["dims"]):
                return [self._batch_state(slot)]
        elif kind is not None and kind != "parameter":
            return [INVARIANT]
        found: list[State] = [INVARIANT]
        for d, dim in enumerate(slot.meta["dims"]):
            sizes = [self.program.sizes[f] for f in dim]
            for axis, choice in self.chosen.items():
                state = choice.slots.get(slot)
                if isinstance(state, Shard) and state.dim == d:
                    left = self.program.mesh.size(axis)
                    for i in range(state.start, state.stop):
                        share = min(left, sizes[i])
                        sizes[i], left = sizes[i] // share, left // share
            found += [Shard(d, a, b) for a, b in runs(sizes, self.ranks) if self.takes.issuperset(dim[a:b])]
        return found

    def _batch_state(self, node: fx.Node) -> State:
        for d, dim in enumerate(node.meta["dims"]):
            if self.batch in dim:
                at = dim.index(self.batch)
                divides("samples", self.program.sizes[self.batch], self.axis, self.ranks, mesh=str(self.program.mesh))
                return Shard(d, at, at + 1)
        return INVARIANT

    def _holding(self, slot: fx.Node) -> float:
        """What holding a whole weight matrix costs; vectors are too small to count."""
        if self.axis == "dp" or self.program.slot(slot.name).kind != "parameter":
            return 0.0
        if sum(bool(dim) for dim in slot.meta["dims"]) < 2:
            return 0.0
        tokens = costs.TOKENS * self.hidden
        return costs.HOLDING * tokens * float(np.prod([int(n) for n in slot.meta["val"].shape])) / self.hidden

    def _returned(self) -> None:
        done = set()
        for inner, outer in returns(self.program):
            slot = self.slot_of[outer]
            if (inner, slot) in done:
                continue
            done.add((inner, slot))
            self.needed[inner].append({self._plain(inner, s): [v] for s, v in self._slot(slot).items()})

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
                    made = {self._plain(x, s): v for s, v in made.items()}
                else:
                    made = self.made[x]
                size = self.elements(x)
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
        """Cost of a move. A parameter is used where it is kept: gathering it for use is another pass's business."""
        if x.meta.get("parameter") and isinstance(source, Shard) and source != target:
            return None
        start = 0.0 if x.meta.get("parameter") else costs.START * costs.TOKENS * self.hidden**2
        return costs.move(source, target, size, self.ranks, x.meta["grad"], start)

    def _check_heads(self, node: fx.Node, options: list[Strategy]) -> None:
        """Attention that cannot be divided would run whole on every rank, which nobody means who asks for tp."""

        def divided(strategies: list[Strategy]) -> bool:
            return any(isinstance(state, Shard) for s in strategies for state in s.results)

        first, second = (node.meta["letters"][x] for x in ("kv_heads", "group"))
        if divided(options) or not self.takes.issuperset(first + second):
            return
        shared, each = (int(np.prod([self.program.sizes[f] for f in x])) for x in (first, second))
        heads = shared * each
        taken = self.strategist.taken
        possible = [
            d
            for d in divisors(heads)
            if d > 1 and divided(Strategist(self.axis, self.program.sizes, d, taken, self.takes).of(node))
        ]
        raise FoldError(
            f"{heads} attention heads, {each} to each of {shared} key/value heads, do not divide over tp={self.ranks}.",
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


def _state_of(choice: Choice, node: fx.Node) -> State | None:
    producer = node.args[0] if node.target is operator.getitem else node
    strategy = choice.strategies.get(producer)
    if strategy is None:
        return None
    return strategy.results[node.args[1] if node.target is operator.getitem else 0]


def choose(program: Program, axis: str, chosen: dict[str, Choice], taken: dict[fx.Node, dict[Any, int]], plan: Plan) -> Choice:
    """The cheapest choice on one axis of all that the plan allows, given what was chosen on the axes before it."""
    problem = _AxisProblem(program, axis, chosen, taken, plan)
    problem.build()
    x = problem.model.solve()
    if x is None:
        raise FoldError(f"No layout over {axis}={problem.ranks} satisfies every operator.", mesh=str(program.mesh))
    strategies = {n: max(found, key=lambda sv: x[sv[1]])[0] for n, found in problem.strategies.items()}
    states = {slot: max(found, key=lambda s: x[found[s]]) for slot, found in problem.slots.items()}
    for node, strategy in strategies.items():
        _take(node, strategy, problem.ranks, program.sizes, taken)
    return Choice(strategies, states)


def _take(
    node: fx.Node, strategy: Strategy, ranks: int, sizes: dict[Symbol, int], taken: dict[fx.Node, dict[Any, int]]
) -> None:
    """Notes which part of which letter an axis has divided, for the axes after it."""
    rule = node.meta["rule"]
    if rule is None:
        return
    patterns = [*zip(rule.operands, strategy.operands, strict=False), *zip(rule.results, strategy.results, strict=True)]
    for pattern, state in patterns:
        if pattern is None or not isinstance(state, Shard):
            continue
        left = ranks
        for key in product_of(pattern, state, node.meta["letters"]):
            size = sizes[node.meta["letters"][key[0]][key[1]]] // taken[node].get(key, 1)
            share = min(left, size)
            taken[node][key] = taken[node].get(key, 1) * share
            left //= share
        return
