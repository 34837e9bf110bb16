"""Ahead: what a block needs of parameters is gathered while the block before it computes.

    v = unshard1(w)                                        v = unshard1(w)
    y = block1(x, v)                                       u = unshard1(r)
    u = unshard1(r)                  becomes               y = block1(x, v)
    z = block1(y, u)                                       z = block1(y, u)

Only the main graphs change, forward and backward: the order in which they call blocks. A call of one that unshards parameters
starts where it stands and ends where its results are read (`foldcc/runtime/under_way.py`). So the parameters of one more block
are whole at a time; of how many the plan says, which is none unless it is asked for.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from foldcc import ops
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program, staged, unshards


@dataclass(frozen=True, kw_only=True)
class Ahead(Pass):
    requires = frozenset({"bucketed"})
    provides = frozenset({"ahead"})

    def run(self, program: Program) -> Program:
        for main in program.mains if program.plan.ahead else ():
            computing = [call for call in main.graph.find_nodes(op="call_module") if not unshards(call.target)]
            for call in main.graph.find_nodes(op="call_module"):
                given, left = _given(call), _left(call)
                if _gathers(main, call) and given is not None:
                    readers = [c for c in computing if not left.isdisjoint(c.all_input_nodes)]
                    beside = [c for c in computing if readers and staged(c) == staged(readers[0])]
                    if readers:
                        at = max(beside.index(readers[0]) - program.plan.ahead, 0)
                        _move(given | {call} | left, beside[at])
        return program


def _gathers(main: fx.GraphModule, call: fx.Node) -> bool:
    graph = main.get_submodule(str(call.target)).graph
    return unshards(call.target) and bool(graph.find_nodes(op="call_function", target=ops.all_gather.overload))


def _given(call: fx.Node) -> set[fx.Node] | None:
    """What a call is given is made of, placeholders aside; None where that is more than a part of one."""
    found: set[fx.Node] = set()
    left = list(call.all_input_nodes)
    while left:
        node = left.pop()
        if node.op != "placeholder":
            if node.target is not operator.getitem:
                return None
            found.add(node)
            left += node.all_input_nodes
    return found


def _left(call: fx.Node) -> set[fx.Node]:
    """The results of a call, and what is in them."""
    found: set[fx.Node] = set()
    left = [call]
    while left:
        items = [user for user in left.pop().users if user.target is operator.getitem]
        found.update(items)
        left += items
    return found


def _move(nodes: set[fx.Node], before: fx.Node) -> None:
    for node in [n for n in before.graph.nodes if n in nodes and before < n]:
        before.prepend(node)
