"""Shard: give each mesh axis a factor in each part of the graph, the cheapest way, and insert `reshard` between them.

    x : [batch, seq, hidden]        q = linear(x, w)
becomes
    x : [batch@dp, seq@tp, hidden]  y = reshard(x)  : [batch@dp, seq, hidden] R(tp)   q = linear(y, w[n@tp, hidden])

One small integer program per axis: one binary choice per distinct node, a cost for each move between states. Blocks
that repeat share their choices, and so do the values that the main graph passes between blocks.
"""

from __future__ import annotations

import operator
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from foldcc.ir.node import operands
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program
from foldcc.layout import INVARIANT, REPLICATED, Layout, Shard, State
from foldcc.ops.layout import reshard
from foldcc.passes.annotate import UnknownOperator
from foldcc.plan.interface import find_gradients, interface
from foldcc.plan.search import Choice, choose
from foldcc.plan.strategies import find_letters, results_of


@dataclass(frozen=True, kw_only=True)
class ShardPass(Pass):
    """Attributes:
    kept: layouts that parameters already have, by name; they are not chosen again.
    """

    requires = frozenset({"annotated"})
    provides = frozenset({"sharded"})
    name = "shard"
    kept: Mapping[str, Layout] = field(default_factory=dict)

    def run(self, program: Program) -> Program:
        find_gradients(program)
        for _, node in program.nodes():
            if node.op == "call_function" and node.target is not operator.getitem:
                find_letters(node, program.sizes)
        chosen: dict[str, Choice] = {}
        taken: dict[fx.Node, dict[Any, int]] = defaultdict(dict)
        for axis in program.mesh.axes("attention"):
            if program.mesh.size(axis) > 1:
                chosen[axis] = choose(program, axis, chosen, taken, self.kept)
        _warn_of_unknown(program, chosen)
        return _apply(program, chosen)


def _warn_of_unknown(program: Program, chosen: Mapping[str, Choice]) -> None:
    """Names each operator without a rule once, with the axes on whose ranks it runs whole."""
    whole: dict[str, dict[str, None]] = defaultdict(dict)
    for _, node in program.nodes():
        if node.meta.get("unknown"):
            axes = [a for a, c in chosen.items() if not any(isinstance(s, Shard) for s in c.strategies[node].results)]
            whole[str(node.target)].update(dict.fromkeys(axes))
    for name, found in whole.items():
        if found:
            text = f"{name} has no factor rule; its operands are replicated on {', '.join(found)}."
            warnings.warn(text, UnknownOperator, stacklevel=2)


def _apply(program: Program, chosen: dict[str, Choice]) -> Program:
    mesh = program.mesh
    ranks = {a: mesh.size(a) for a in chosen}
    slot_of = interface(program)

    def layout(node: fx.Node, states: dict[str, State]) -> Layout:
        return Layout(node.meta["dims"], program.sizes, states, ranks)

    for node in [*program.placeholders, *(n for n in program.graph.graph.nodes if n.target is operator.getitem)]:
        slot = slot_of.get(node, node)
        node.meta["layout"] = layout(node, {a: c.slots.get(slot, INVARIANT) for a, c in chosen.items()})
    for block in program.blocks.values():
        for node in list(block.graph.nodes):
            if node.op == "placeholder":
                states = {a: c.slots[slot_of[node]] for a, c in chosen.items()}
                node.meta["layout"] = layout(node, _plain_states(node, states))
            elif node.op == "call_function" and node.target is not operator.getitem:
                for i, x in enumerate(operands(node)):
                    if x is not None:
                        # An operand that gives only its type, such as new_zeros', is left as it is.
                        states = x.meta["layout"].states
                        wanted = {a: c.strategies[node].operands[i] or states[a] for a, c in chosen.items()}
                        _bring(node, x, layout(x, _plain_states(x, wanted)))
                for k, r in enumerate(results_of(node)):
                    if r is not None:
                        left = {a: c.strategies[node].results[k] for a, c in chosen.items()}
                        r.meta["layout"] = layout(r, _plain_states(r, left))
    done: dict[tuple[fx.Node, int], None] = {}
    for call in program.calls:
        (output,) = getattr(program.graph, str(call.target)).graph.find_nodes(op="output")
        for user in call.users:
            if (output, user.args[1]) not in done:
                done[output, user.args[1]] = None
                returned = list(output.args[0])
                inner = returned[user.args[1]]
                states = _plain_states(inner, dict(user.meta["layout"].states))
                returned[user.args[1]] = _converted(output, inner, layout(inner, states))
                output.args = (tuple(returned),)
    for block in program.blocks.values():
        block.recompile()
    return replace(program)


def _plain_states(node: fx.Node, states: dict[str, Any]) -> dict[str, State]:
    return {a: INVARIANT if s == REPLICATED and not node.meta["grad"] else s for a, s in states.items()}


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
    provenance = ("nn_module_stack", "stack_trace", "source")
    node.meta = {k: v for k, v in x.meta.items() if k in ("val", "dims", "grad", *provenance)}
    if x.op == "placeholder":
        node.meta |= {k: v for k, v in before.meta.items() if k in provenance}
    node.meta["layout"] = wanted
    return node
