"""Walks over a program: its parts as a person counts them, and a graph's nodes in the order in which they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from foldcc.ir.program import Program

FORWARD, BACKWARD = "forward", "backward"


Mains = Sequence[tuple[str, fx.GraphModule]]  # graphs that call blocks, by direction


@dataclass(frozen=True)
class Part:
    """A block in one direction.

    Attributes:
        calls: in one training step.
    """

    name: str
    direction: str
    calls: int
    graph: fx.GraphModule

    @property
    def block(self) -> str:
        """The block that it is a direction of; a backward graph may be one for some of the gradients, `block1_0`."""
        return self.name.partition("_")[0]


def parts(program: Program, mains: Mains | None = None) -> Iterator[Part]:
    """The blocks of the forward pass, then those of the backward pass, each in order of first use.

    A program that has not been outlined is one block, its main graph.

    Args:
        mains: graphs that call blocks, if not the main graphs of the program.
    """
    for direction, main in mains or zip((FORWARD, BACKWARD), program.mains, strict=False):
        calls = Counter(str(n.target) for n in main.graph.nodes if n.op == "call_module")
        for name, count in calls.items():
            yield Part(name, direction, count, getattr(main, name))
        if not calls:
            yield Part("main", direction, 1, main)


def module_of(node: fx.Node) -> str:
    """The path of the module that a node came from; empty for the model itself or when it is unknown."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def follow(graph: fx.GraphModule, values: list[Any], call: Callable[[fx.Node, Mapping[fx.Node, Any]], Any]) -> Any:
    """Runs a graph: each value is freed behind the last node that reads it.

    Args:
        values: of the placeholders; the list is emptied, so that nothing else has to hold them.
        call: gives the value of a node, and what the graph returns, from those that it reads.
    """
    known: dict[fx.Node, Any] = {}
    last = {x: node for node in graph.graph.nodes for x in node.all_input_nodes}
    values.reverse()
    for node in graph.graph.nodes:
        known[node] = values.pop() if node.op == "placeholder" else call(node, known)
        if node.op == "output":
            return known[node]
        for x in (node, *node.all_input_nodes):
            if last.get(x, node) is node:
                known.pop(x, None)
    raise AssertionError("a graph ends with its output")
