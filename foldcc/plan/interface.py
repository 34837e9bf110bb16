"""What passes between blocks: which values are one, which are returned, and through which a gradient flows back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, fx

from foldcc.ir.node import name_of
from foldcc.ir.program import Program
from foldcc.rules.kinds import CREATORS

# Operators that read floating-point numbers and whose results have no gradient: what they make is new, counted or cut off.
_STOPS = CREATORS | {"aten.detach", "aten.histc"}


def find_gradients(program: Program) -> None:
    """`node.meta["grad"]`: whether a gradient flows back through the value."""

    for node in program.placeholders:
        node.meta["grad"] = program.slot(node.name).grad and _differentiable(node)
    for call in program.calls:
        block: fx.GraphModule = getattr(program.graph, str(call.target))
        for formal, actual in zip(block.graph.find_nodes(op="placeholder"), call.args, strict=True):
            formal.meta["grad"] = formal.meta.get("grad", False) or actual.meta["grad"]
            formal.meta["parameter"] = actual.op == "placeholder" and program.slot(actual.name).kind == "parameter"
        for node in block.graph.nodes:
            if node.op == "call_function":
                node.meta["grad"] = flows(node, {n for n in node.all_input_nodes if n.meta["grad"]})
        (output,) = block.graph.find_nodes(op="output")
        for user in call.users:
            user.meta["grad"] = output.args[0][user.args[1]].meta["grad"]


def flows(node: fx.Node, through: Collection[fx.Node], value: Any = None) -> bool:
    """Whether a gradient flows back through an operator, if one flows through some of its operands.

    Args:
        value: what it makes, where the node does not say so.
    """
    if name_of(node.target) in _STOPS:
        return False
    return any(n in through for n in node.all_input_nodes) and _differentiable(node, value)


def differentiated(program: Program) -> set[fx.Node]:
    """The values of a captured program through which a gradient flows back."""
    found = {n for n in program.placeholders if program.slot(n.name).grad and _differentiable(n)}
    for node in program.graph.graph.nodes:
        if node.op == "call_function" and flows(node, found):
            found.add(node)
    return found


def losses(program: Program) -> tuple[bool, ...]:
    """For each output of a captured program, whether a training step gives it a gradient, as far as one can tell.

    That are the losses, if there are any, else all that the model returns. A loss has no dimensions, and no other one is
    computed from it: a sum of losses is one, and its terms are not.
    """
    outputs, flowing = program.outputs, differentiated(program)
    own = outputs[: program.own]
    scalars = {n for n in own if n in flowing and n.meta["val"].dim() == 0}
    parts: set[fx.Node] = set()
    for node in reversed(program.graph.graph.nodes):
        if node in flowing and (node in parts or node in scalars):
            parts.update(node.all_input_nodes)
    found = scalars - parts or flowing.intersection(own)
    return tuple(n in found and i < len(own) and n not in outputs[:i] for i, n in enumerate(outputs))


def _differentiable(node: fx.Node, value: Any = None) -> bool:
    made, dtype = node.meta.get("val") if value is None else value, node.meta.get("dtype")
    if made is None:  # `dispatch` inserted it, and says its dtype alone
        return dtype is not None and dtype.is_floating_point
    each = made if isinstance(made, (tuple, list)) else (made,)
    return any(isinstance(x, Tensor) and x.is_floating_point() for x in each)


def interface(program: Program) -> dict[fx.Node, fx.Node]:
    """The representative of each value of the main graph and each formal or returned value of a block.

    A block's formals are one with all that they are called with, because the block's program is shared. The new value of a
    buffer is one with the buffer, because it is held as that is. Returned values are keyed by the main graph's node; `returns`
    says which nodes those are.
    """
    parent: dict[fx.Node, fx.Node] = {}

    def find(n: fx.Node) -> fx.Node:
        while parent.setdefault(n, n) is not n:
            n = parent[n]
        return n

    results: dict[tuple[str, int], fx.Node] = {}
    for call in program.calls:
        block: fx.GraphModule = getattr(program.graph, str(call.target))
        for formal, actual in zip(block.graph.find_nodes(op="placeholder"), call.args, strict=True):
            parent[find(formal)] = find(actual)
        for user in call.users:
            first = results.setdefault((str(call.target), user.args[1]), user)
            parent[find(user)] = find(first)
    outputs, held = program.outputs, {n.name: n for n in program.placeholders}
    for i, name in program.updates.items():
        parent[find(outputs[i])] = find(held[name])
    return {n: find(n) for n in list(parent)}


def returns(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(node in a block that is returned, a node of the main graph that receives it)."""
    for call in program.calls:
        (output,) = getattr(program.graph, str(call.target)).graph.find_nodes(op="output")
        for user in call.users:
            yield output.args[0][user.args[1]], user
