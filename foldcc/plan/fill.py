"""Fill: what a plan does not say of layouts is chosen, one mesh axis after the other, each at the least cost."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import replace
from typing import Any

from torch import fx

from foldcc.ir.plan import OpLayouts, Plan
from foldcc.ir.program import Program
from foldcc.layout import INVARIANT, Layout
from foldcc.plan.choice import Choice, op_layouts
from foldcc.plan.interface import interface
from foldcc.plan.search import choose


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

    def entering(node: fx.Node) -> Layout:
        slot = slot_of.get(node, node)
        return Layout(node.meta["dims"], program.sizes, {a: c.slots.get(slot, INVARIANT) for a, c in chosen.items()}, ranks)

    def runs(node: fx.Node) -> OpLayouts:
        return op_layouts(program, node, {a: c.strategies[node] for a, c in chosen.items()})

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
