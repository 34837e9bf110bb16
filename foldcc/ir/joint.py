"""The joint graph of a block, which computes its results and, from their gradients, those of its arguments.

    results, gradients = joint(formals, tangents)

What the results need runs forward, the rest backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from foldcc.ir.node import leading_to
from foldcc.ir.program import Program
from foldcc.layout import Layout
from foldcc.ops import record

aten = torch.ops.aten
_JOINS = {aten.add.Tensor, aten.cat.default}  # gradients of what is used several times, and those that travel together
_SUMS = {aten.sum.default, aten.sum.dim_IntList}
Returns = tuple[tuple[str, Layout | None], ...]


@dataclass(frozen=True)
class Joint:
    """A joint graph, and which of its nodes run when.

    Attributes:
        formals, tangents: its placeholders; a tangent has the number of its result as `meta["result"]`.
        results, gradients: what it returns; None for a formal without a gradient.
        early, late: the operators of the two directions.
        read: what those of the backward pass, and its results, take of other values.
    """

    formals: list[fx.Node]
    tangents: list[fx.Node]
    results: tuple[fx.Node, ...]
    gradients: tuple[fx.Node | None, ...]
    early: list[fx.Node]
    late: list[fx.Node]
    read: list[fx.Node]

    @classmethod
    def of(cls, block: fx.GraphModule) -> Joint:
        placeholders = list(block.graph.find_nodes(op="placeholder"))
        formals, tangents = ([n for n in placeholders if ("result" in n.meta) is there] for there in (False, True))
        output: Any = block.graph.output_node()
        results, gradients = output.args[0]
        needed, wanted = leading_to(results), leading_to(gradients)
        operators = [n for n in block.graph.nodes if n.op not in ("placeholder", "output")]
        early = [n for n in operators if n in needed]
        late = [n for n in operators if n in wanted and n not in needed]
        inside = {*late, *tangents}
        taken = [i for n in late for i in n.all_input_nodes] + [g for g in gradients if g is not None]
        read = list(dict.fromkeys(n for n in taken if n not in inside))
        return cls(formals, tangents, results, gradients, early, late, read)

    @property
    def kept(self) -> list[fx.Node]:
        """What is kept of `read`, if no more is computed again than what an operator has a backward pass ask for once more."""
        return list(dict.fromkeys(x for n in self.read for x in _asked_of(n)))


def _asked_of(node: fx.Node) -> list[fx.Node]:
    """What a value is made of by operators that are asked once more."""
    known = record(node.target)
    return [x for n in node.all_input_nodes for x in _asked_of(n)] if known is not None and known.again else [node]


def read_sizes(block: fx.GraphModule) -> None:
    """Has sizes that data decide read off values that the backward pass reads anyway, so that none is kept for its size."""
    joint = Joint.of(block)
    late, inside = joint.late, {*joint.late, *joint.tangents}
    sizes = [n for n in late if n.target is aten.sym_size.int and n.args[0] not in inside]
    read = dict.fromkeys(x for n in late if n not in sizes for x in n.all_input_nodes if x not in inside)
    known = {str(s): (x, i) for x in read for i, s in enumerate(getattr(x.meta["val"], "shape", ()))}
    for node in sizes:
        node.args = known.get(str(node.meta["val"]), node.args)


def sums(gradient: fx.Node | None) -> list[fx.Node]:
    """The sums over ranks that end in a gradient of a parameter, behind the product, or the sum on a rank, that computes it."""
    found: list[fx.Node] = []
    left = [] if gradient is None else [gradient]
    while left:
        node = left.pop()
        known = record(node.target)
        found += [node] if known is not None and known.adds else []
        tensors = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), (torch.Tensor, tuple, list))]
        on = node.target not in _SUMS and (len(tensors) == 1 or node.target in _JOINS)
        left += tensors if on else []
    return found


def returns(program: Program, name: str, direction: str, block: fx.GraphModule) -> tuple[Returns, ...]:
    """What a block returns is called, and its layouts, as far as that follows from its values and from its arguments.

    Results have the layouts of the values that are returned, gradients those of the arguments, transposed. A joint graph
    returns both. A block that is not differentiated says nothing.
    """
    if not program.properties & {"joint", "differentiated"}:
        return ()
    leaves: Any = block.graph.output_node().args[0]
    joint = "differentiated" not in program.properties
    if name.endswith("_again"):  # the forward direction of a block, run once more
        return (tuple((n.name, n.meta.get("layout")) for n in leaves),)
    if direction == "backward":
        return (_gradients(program, name),)
    results = leaves[0] if joint or (leaves and isinstance(leaves[0], tuple)) else leaves
    found = tuple((n.name, n.meta.get("layout")) for n in results)
    return (found, _gradients(program, name)) if joint else (found,)


def _gradients(program: Program, name: str) -> Returns:
    block = max((b for b in program.blocks if f"{name}_".startswith(f"{b}_")), key=len, default=None)
    if block is None:  # a pass has given it a name of its own
        return ()
    formals = [n for n in program.blocks[block].graph.find_nodes(op="placeholder") if "result" not in n.meta]
    return tuple((f"grad_{n.name}", n.meta["layout"].transposed) for n in formals)
