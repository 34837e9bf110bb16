"""Shard: give each mesh axis a factor in each part of the graph, the cheapest way, and insert `reshard` between them.

    x : [batch, seq, hidden]        q = linear(x, w)
becomes
    x : [batch@dp, seq@tp, hidden]  y = reshard(x)  : [batch@dp, seq, hidden] R(tp)   q = linear(y, w[n@tp, hidden])

The program's plan says which; what it does not say is chosen here, and said in the plan of the program that is returned. One
small integer program per axis: one binary choice per distinct node, a cost for each move between states. Blocks that repeat
share their choices, and so do the values that the main graph passes between blocks.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx

from foldcc.ir.node import operands
from foldcc.ir.pipeline import Pass
from foldcc.ir.plan import Plan
from foldcc.ir.program import Program
from foldcc.ir.rewrite import provenance
from foldcc.layout import INVARIANT, REPLICATED, VARYING, Layout
from foldcc.ops.layout import reshard
from foldcc.passes.annotate import UnknownOperator
from foldcc.plan.fill import filled
from foldcc.plan.interface import find_gradients
from foldcc.plan.strategies import find_letters, results_of


@dataclass(frozen=True, kw_only=True)
class ShardPass(Pass):
    requires = frozenset({"annotated"})
    provides = frozenset({"sharded"})
    name = "shard"

    def run(self, program: Program) -> Program:
        find_gradients(program)
        for _, node in program.nodes():
            if node.op == "call_function" and node.target is not operator.getitem:
                find_letters(node, program.sizes)
        plan = filled(program, program.plan)
        _apply(program, plan)
        return replace(program, plan=plan)

    def warned(self, program: Program) -> Iterator[Warning]:
        """Names each operator without a rule once, with the axes on whose ranks it runs whole."""
        whole: dict[str, dict[str, None]] = defaultdict(dict)
        for block, node in program.nodes():
            if node.meta.get("unknown"):
                left = [x for x in program.plan.blocks[block][node.name].results if x is not None]
                axes = [a for a in program.mesh.axes("attention") if program.mesh.size(a) > 1]
                whole[str(node.target)].update(dict.fromkeys(a for a in axes if not any(a in x.axes(VARYING) for x in left)))
        for name, found in whole.items():
            if found:
                yield UnknownOperator(f"{name} has no factor rule; its operands are replicated on {', '.join(found)}.")


def _apply(program: Program, plan: Plan) -> None:
    """Gives every value the layout that the plan says, and what an operator is given another one, where they differ."""
    names = {s.name: s.names[0] for s in program.slots if s.kind == "parameter"}
    for node in program.graph.graph.nodes:
        if node.op == "placeholder" or node.target is operator.getitem:
            node.meta["layout"] = plan.parameters[names[node.name]] if node.name in names else plan.values[node.name]
    for call in reversed(program.calls):  # calls of one block are given values of one layout
        formals = program.blocks[str(call.target)].graph.find_nodes(op="placeholder")
        for formal, actual in zip(formals, call.args, strict=True):
            formal.meta["layout"] = _of(formal, actual.meta["layout"])
    for name, block in program.blocks.items():
        for node in list(block.graph.nodes):
            if node.op == "call_function" and node.target is not operator.getitem:
                said = plan.blocks[name][node.name]
                node.meta["ways"] = said.ways
                for x, layout in zip(operands(node), said.operands, strict=True):
                    if x is not None and layout is not None:
                        # An operand that gives only its type, such as new_zeros', is left as it is.
                        before = x.meta["layout"]
                        _bring(node, x, _of(x, replace(before, states=before.states | dict(layout.states))))
                for r, layout in zip(results_of(node), said.results, strict=True):
                    if r is not None:
                        r.meta["layout"] = layout
    done: dict[tuple[fx.Node, int], None] = {}
    for call in program.calls:
        (output,) = getattr(program.graph, str(call.target)).graph.find_nodes(op="output")
        for user in call.users:
            if (output, user.args[1]) not in done:
                done[output, user.args[1]] = None
                returned = list(output.args[0])
                inner = returned[user.args[1]]
                returned[user.args[1]] = _converted(output, inner, _of(inner, user.meta["layout"]))
                output.args = (tuple(returned),)
    for block in program.blocks.values():
        block.recompile()


def _of(node: fx.Node, layout: Layout) -> Layout:
    """The layout of a node that has the states of another value; where no gradient flows, replicated is invariant."""
    states = {a: INVARIANT if s == REPLICATED and not node.meta["grad"] else s for a, s in layout.states.items()}
    return replace(layout, dims=node.meta["dims"], states=states)


def _bring(node: fx.Node, x: fx.Node, wanted: Layout) -> None:
    new = _converted(node, x, wanted)
    if new is not x:
        node.replace_input_with(x, new)


def _converted(before: fx.Node, x: fx.Node, wanted: Layout) -> fx.Node:
    """The value in the wanted layout; a conversion is made once, right behind the value, and shared."""
    if x.meta["layout"] == wanted:
        return x
    for user in x.users:
        if user.target is reshard and user.args[1] == wanted:
            return user
    behind = x
    if x.op == "placeholder":
        behind = list(x.graph.find_nodes(op="placeholder"))[-1]
    with x.graph.inserting_after(behind):
        node = x.graph.call_function(reshard, (x, wanted))
    node.meta = {k: x.meta[k] for k in ("val", "dims", "grad") if k in x.meta}
    node.meta |= provenance(before if x.op == "placeholder" else x)
    node.meta["layout"] = wanted
    return node
