"""Fill: what a plan does not say of layouts is chosen, one mesh axis after the other, each at the least cost."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import replace
from typing import Any

from torch import fx

from foldcc.ir.node import operands
from foldcc.ir.plan import OpLayouts, Plan
from foldcc.ir.program import Program
from foldcc.layout import INVARIANT, REPLICATED, Layout, State
from foldcc.plan.interface import interface
from foldcc.plan.search import Choice, choose
from foldcc.plan.strategies import results_of


def filled(program: Program, plan: Plan) -> Plan:
    """The plan with a layout for every value between blocks, and for every operand and result in them.

    Raises:
        UnfitPlan: the plan says what cannot be.
        FoldError: there is no layout, or none that divides what an axis is there to divide.
    """
    chosen: dict[str, Choice] = {}
    taken: dict[fx.Node, dict[Any, int]] = defaultdict(dict)
    for axis in program.mesh.axes("attention"):
        if program.mesh.size(axis) > 1:
            chosen[axis] = choose(program, axis, chosen, taken, plan)
    ranks, slot_of = {a: program.mesh.size(a) for a in chosen}, interface(program)

    def layout(node: fx.Node | None, states: dict[str, State | None]) -> Layout | None:
        """With the states that there are; None for a value without any."""
        there = {a: s for a, s in states.items() if s is not None}
        if node is None or (states and not there):
            return None
        if not node.meta["grad"]:  # where no gradient flows, replicated and invariant are the same
            there = {a: INVARIANT if s == REPLICATED else s for a, s in there.items()}
        return Layout(node.meta["dims"], program.sizes, there, ranks)

    def entering(node: fx.Node) -> Layout:
        slot = slot_of.get(node, node)
        return Layout(node.meta["dims"], program.sizes, {a: c.slots.get(slot, INVARIANT) for a, c in chosen.items()}, ranks)

    def runs(node: fx.Node) -> OpLayouts:
        given = [
            layout(x, {a: c.strategies[node].operands[i] for a, c in chosen.items()}) for i, x in enumerate(operands(node))
        ]
        left = [
            layout(r, {a: c.strategies[node].results[k] for a, c in chosen.items()}) for k, r in enumerate(results_of(node))
        ]
        return OpLayouts(tuple(given), tuple(left))

    parameters = {s.names[0]: s.name for s in program.slots if s.kind == "parameter"}
    values = {n.name: entering(n) for n in program.graph.graph.nodes if n.op == "placeholder" or n.target is operator.getitem}
    for node in program.placeholders:
        said = plan.parameters.get(program.slot(node.name).names[0])
        if not node.users and said is not None and said.global_shape == tuple(node.meta["val"].shape):
            values[node.name] = said  # another program uses it
    return replace(
        plan,
        model=program.name,
        mesh=str(program.mesh),
        parameters={first: values.pop(name) for first, name in parameters.items()},
        values=values,
        blocks={
            name: {n.name: runs(n) for n in block.graph.nodes if n.op == "call_function" and n.target is not operator.getitem}
            for name, block in program.blocks.items()
        },
    )
