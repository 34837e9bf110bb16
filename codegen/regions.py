"""Regions: groups of nodes of a block that one kernel computes, found on the graph alone.

    pow -> mean -> add -> rsqrt -> mul -> mul                  one region: a norm
    mm -> view -> transpose -> mul, slice -> neg -> cat        one region: what is between two matrix products

A group grows along its edges, as long as no path leaves it and comes back, and as long as its text can be written. What only
moves elements belongs to whoever reads it, and costs nothing there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch
from torch import Tensor, fx

from foldcc.codegen.chains import chain_text, column_sum, column_sum_text
from foldcc.codegen.index import MOVES
from foldcc.codegen.names import NoText
from foldcc.codegen.pointwise import ANY, FLOATS, expression
from foldcc.codegen.values import SPECIAL
from foldcc.ir.node import name_of
from foldcc.rules.kinds import FILLS, named

aten = torch.ops.aten
_FREE = (MOVES - {"aten.clone"}) | named("split split_with_sizes arange") | set(FILLS)
MOST = 48  # tensors that a kernel reads and writes
Text = Callable[[str, Sequence[fx.Node], Sequence[fx.Node], Sequence[fx.Node]], str]


@dataclass(frozen=True)
class Region:
    """Nodes that one kernel computes.

    Attributes:
        kind: what the kernel is.
        nodes: in the order of the graph; some may be read outside as well, and stay there for that.
        inputs: what the kernel reads; outputs: what of it is read outside.
        text: `(name, nodes, inputs, outputs) -> the kernel and its launcher`.
    """

    kind: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    text: Text

    def source(self, name: str) -> str:
        return self.text(name, self.nodes, self.inputs, self.outputs)


def region(kind: str, nodes: Iterable[fx.Node], text: Text) -> Region:
    """A region of the given nodes, with what it reads and what is read of it."""
    inside = set(nodes)
    order = {n: i for i, n in enumerate(next(iter(inside)).graph.nodes)}
    ordered = sorted(inside, key=order.__getitem__)
    inputs = dict.fromkeys(x for n in ordered for x in n.all_input_nodes if x not in inside)
    outputs = [n for n in ordered if not is_free(n) and read_outside(n, inside)]
    return Region(kind, tuple(ordered), tuple(inputs), tuple(outputs), text)


def read_outside(node: fx.Node, inside: set[fx.Node]) -> bool:
    return any(u not in inside or (is_free(u) and read_outside(u, inside)) for u in node.users)


def is_free(node: fx.Node) -> bool:
    """Whether a node only moves elements, makes elements that need no reading, or is computed wherever it is read."""
    if node.op != "call_function":
        return False
    if node.meta.get("inline"):
        return True
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and name_of(source.target) in ("aten.split", "aten.split_with_sizes")
    return name_of(node.target) in _FREE


def mark_inline(graph: fx.Graph) -> None:
    """What a backward pass computes again, and chains read, is computed in each of them, and not stored in between."""
    for node in reversed(graph.nodes):
        if node.meta.get("again") and is_computed(node) and all(is_free(u) or is_computed(u) for u in node.users):
            node.meta["inline"] = True


def is_computed(node: fx.Node) -> bool:
    """Whether a kernel can compute a node, as far as its operator tells."""
    if node.op != "call_function" or is_free(node) or not isinstance(node.meta.get("val"), Tensor):
        return False
    name = name_of(node.target)
    if name in SPECIAL or node.target in FLOATS or node.target in ANY:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    try:
        return expression(node, [f"x{i}" for i in range(len(node.all_input_nodes) + 3)]) is not None
    except KeyError:
        return False


def in_sequence(graph: fx.Graph, regions: Sequence[Region]) -> bool:
    """Whether an order exists in which each region runs as a whole.

    What only moves elements runs where it stands and again inside the regions that read through it.
    """
    owner: dict[fx.Node, Any] = {n: r.outputs for r in regions for n in own(r)}
    before: dict[Any, set[Any]] = {n: {owner.get(x, x) for x in n.all_input_nodes} for n in graph.nodes if n not in owner}
    before |= {r.outputs: {owner.get(x, x) for x in r.inputs} for r in regions}
    try:
        TopologicalSorter(before).prepare()
    except CycleError:
        return False
    return True


def own(found: Region) -> set[fx.Node]:
    """The nodes of a region that are nowhere else."""
    return {n for n in found.nodes if not is_free(n) and (n in found.outputs or name_of(n.target) != "foldcc.permute")}


def chains(graph: fx.Graph, others: Sequence[Region] = ()) -> list[Region]:
    """The chains of a graph, among the nodes that no other region has."""
    claimed = {n for r in others for n in r.nodes if not is_free(n)}
    found: list[Region] = []  # in the order of the nodes that end them
    for node in graph.nodes:
        if node in claimed or not is_computed(node):
            continue
        try:
            new = _checked({node, *path(node, claimed)}, column_sum(node))
        except NoText:
            continue
        refused: set[int] = set()
        while near := next((r for r in reversed(found) if id(r) not in refused and set(r.outputs) & set(new.inputs)), None):
            rest = [*others, *(r for r in found if r is not near)]
            try:
                new = _joined(new, near, rest, column_sum(node))
                found.remove(near)
            except NoText:
                refused.add(id(near))
        if in_sequence(graph, [*others, *found, new]):
            found.append(new)
    return found


def _checked(nodes: set[fx.Node], summed: bool) -> Region:
    """A region whose text can be written."""
    found = region("column_sum" if summed else "chain", nodes, column_sum_text if summed else chain_text)
    if len(found.inputs) + len(found.outputs) > MOST:
        raise NoText(f"{len(found.inputs)} inputs")
    if not found.inputs or (summed and len(found.outputs) != 1):
        raise NoText("it reads nothing, or has several results")
    found.source("kernel")
    return found


def path(node: fx.Node, claimed: set[fx.Node]) -> set[fx.Node]:
    """What moves the operands of a node to where it reads them."""
    found: set[fx.Node] = set()
    left = list(node.all_input_nodes)
    while left:
        x = left.pop()
        if x not in claimed and is_free(x) and x not in found:
            found.add(x)
            left += x.all_input_nodes
    return found


def _joined(one: Region, other: Region, rest: Sequence[Region], summed: bool) -> Region:
    """Two regions as one, if they can be."""
    if other.text is column_sum_text:
        raise NoText(f"{other.outputs[0].name} is a sum over rows, which ends its kernel")
    both = _checked({*one.nodes, *other.nodes}, summed)
    if not in_sequence(both.nodes[0].graph, [*rest, both]):
        raise NoText(f"{other.outputs[0].name} is read on the way to what reads it")
    return both
