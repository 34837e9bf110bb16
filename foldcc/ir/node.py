"""What a node of a graph says: the name of its operator, its operands, its arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node


def name_of(target: Any) -> str:
    """`aten.add` for `aten.add.Tensor`."""
    return str(target).rsplit(".", 1)[0] if isinstance(target, torch._ops.OpOverload) else str(target)


def operands(node: Node) -> tuple[Node | None, ...]:
    """The node's tensor arguments in the order of its schema, lists flattened, None for one that is absent."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return tuple(a for a in node.args if isinstance(a, Node))
    found: list[Node | None] = []
    for position, argument in enumerate(node.target._schema.arguments):
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if "Tensor" not in str(argument.type):
            continue
        if isinstance(given, (list, tuple)):
            found += [x if isinstance(x, Node) else None for x in given]
        else:
            found.append(given if isinstance(given, Node) else None)
    return tuple(found)


def argument(node: Node, name: str) -> Any:
    """An argument of a node by its name in the schema, with the schema's default."""
    for position, a in enumerate(node.target._schema.arguments):
        if a.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, a.default_value)
    raise KeyError(name)


def argument_or(node: Node, name: str) -> Any:
    """Like `argument`, None where the overload has no such argument."""
    try:
        return argument(node, name)
    except KeyError:
        return None


def leading_to(nodes: Iterable[Node | None]) -> set[Node]:
    """Some nodes, and all that they are made of."""
    found: set[Node] = set()
    left = [n for n in nodes if n is not None]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found
