"""Program: what passes take and return.

The main graph is a straight line of calls of blocks; a block that repeats (the layers of a transformer) stands once and is
called many times. Parameters, buffers and inputs are placeholders of the main graph; blocks receive all that they use.

A node carries in `node.meta`, beside `nn_module_stack`, `stack_trace`, `from_node` and `custom` of PyTorch's tracers:
    val        a fake tensor: global shape and dtype (of one rank, once the program is localized)
    source     file and line of the model's own code
    dims       its dimensions as products of factors, from `annotate` on
    rule       the factor rule of its operator, or None; `unknown` where there is no rule, which `shard` warns of
    letters    the factors that each letter of its rule stands for, from `shard` on
    ways       by axis, the name of the way in which it is divided, where there are several, from `shard` on
    layout     its Layout, from `shard` on; from `differentiate` on, of what enters and leaves blocks
    grad       whether a gradient flows back through it, from `shard` to `split`; a block's argument is a `parameter` or not
    dtype      of what `dispatch` inserts, whose `val` `localize` finds
    types      its types by axis, inferred from `differentiate` on
    origin     the localized node that it was traced from
    used_up    of a collective, the axes along which a rank may be left with one position
    result     of a gradient that a joint graph is given, the number of the block's result
    again      whether the backward pass computes it again; `inline` where every kernel that reads it does
    kernel     of a call of a kernel, the Kernel
    nodes      of a call of a block, the captured nodes that the block stands for
    count      it leads to what micro-batches share
    stage      of a call of a block, the pipeline stage that runs it, if there are several; what counts has none
The output of a block carries what it `returns`, by name and layout, and whether it is `joint`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils import _pytree as pytree

from foldcc.hooks import Events
from foldcc.ir.plan import Plan
from foldcc.layout import Layout
from foldcc.mesh import FoldedMesh


@dataclass(frozen=True)
class Slot:
    """One placeholder of the main graph.

    Attributes:
        name: the placeholder's name.
        kind: "parameter", "buffer", "constant" or "input"; or "tap", which is zero and whose gradient hooks are given; or
            "key", of one draw of random numbers.
        names: the names under which the module tree holds a parameter or buffer (several, when tied), or the path of an
            input in the call, such as `["input_ids"]`, or the number of a draw in the order in which the model draws.
        grad: the program gives it a gradient, if what it computes has one.
    """

    name: str
    kind: str
    names: tuple[str, ...]
    grad: bool = False


@dataclass(frozen=True, repr=False)
class Program:
    """A model as graphs, on its way from one rank's module to every rank's program.

    Attributes:
        name: of the model's class.
        graph: the main graph; forward only, after `differentiate`.
        slots: one for each placeholder.
        out_spec: structure of what the model returns.
        literals: what the model returns that is no tensor, by its position among all that it returns.
        constants: values of the slots of that kind.
        sizes: size of each factor.
        backward: the main backward graph, for gradients of the outputs that are wanted; None if no slot is given a gradient.
        batch_dims: by the path of an input, which of its dimensions is samples, or None; empty means the first.
        updates: by the position of an output, the slot of the buffer whose new value it is.
        observed: what hooks on modules are called with.
        wanted: for each output, whether a backward pass is given its gradient; None until `outline`.
        plan: the choices that were made, and those that passes are to make.
    """

    graph: fx.GraphModule
    slots: tuple[Slot, ...]
    out_spec: pytree.TreeSpec
    constants: dict[str, Any]
    mesh: FoldedMesh
    properties: frozenset[str] = frozenset()
    sizes: dict[sympy.Symbol, int] = field(default_factory=dict)
    backward: fx.GraphModule | None = None
    literals: Mapping[int, Any] = field(default_factory=dict)
    name: str = "program"
    batch_dims: Mapping[str, int | None] = field(default_factory=dict)
    updates: Mapping[int, str] = field(default_factory=dict)
    observed: Events = ()
    wanted: tuple[bool, ...] | None = None
    plan: Plan = field(default_factory=Plan)

    def __repr__(self) -> str:
        return f"<program {self.name} on {self.mesh}: {len(self.blocks)} blocks, {self.node_count()} nodes>"

    @property
    def placeholders(self) -> list[fx.Node]:
        return list(self.graph.graph.find_nodes(op="placeholder"))

    @property
    def output(self) -> fx.Node:
        return next(iter(self.graph.graph.find_nodes(op="output")))

    @property
    def outputs(self) -> list[fx.Node]:
        """What leaves the main graph, in order; what calls save for a backward pass aside."""
        found: list[fx.Node] = []
        returned: Any = self.output.args[0]
        fx.map_arg(returned[0] if "differentiated" in self.properties else returned, found.append)
        return found

    @property
    def own(self) -> int:
        """How many outputs the model returns; updates of buffers, and what is for hooks, come behind."""
        return self.out_spec.num_leaves - len(self.literals)

    @property
    def objectives(self) -> list[fx.Node]:
        """The outputs whose gradients a backward pass is given."""
        assert self.wanted is not None
        return [n for n, wanted in zip(self.outputs, self.wanted, strict=True) if wanted]

    @property
    def mains(self) -> list[fx.GraphModule]:
        """The main graphs: forward, and backward if there is one."""
        return [self.graph] if self.backward is None else [self.graph, self.backward]

    @property
    def calls(self) -> list[fx.Node]:
        """The calls of blocks, in order."""
        return _calls(self.graph)

    @property
    def blocks(self) -> dict[str, fx.GraphModule]:
        """Each distinct block once, in order of first use."""
        return {str(n.target): getattr(self.graph, str(n.target)) for n in _calls(self.graph)}

    def count(self, block: str) -> int:
        """How often a block is called in one forward pass."""
        return sum(n.target == block for n in _calls(self.graph))

    def nodes(self) -> Iterator[tuple[str, fx.Node]]:
        """Every node of every distinct block."""
        for name, block in self.blocks.items():
            for node in block.graph.nodes:
                yield name, node

    def node_count(self) -> int:
        """Nodes of the whole program, repeated blocks counted as often as they are called."""
        total = sum(self.count(name) * len(block.graph.nodes) for name, block in self.blocks.items())
        if self.backward is not None:
            blocks = [getattr(self.backward, str(n.target)) for n in _calls(self.backward)]
            total += sum(len(block.graph.nodes) for block in blocks)
        return total

    def __getattr__(self, name: str) -> Any:
        # There was a second backward graph, which ran.
        instead = "; program.backward is the graph that runs, to be rewritten in place" if "backward" in name else ""
        raise AttributeError(f"Program has no {name}{instead}.")

    def copied(self) -> Program:
        """The same program with graphs of its own, which a pass may rewrite in place; fake tensors are shared."""
        return replace(self, graph=copied(self.graph), backward=copied(self.backward) if self.backward is not None else None)

    def with_gradients(self, names: Set[str]) -> Program:
        """The same captured program, which gives gradients to the parameters and inputs of these names and to nothing else."""
        slots = (replace(s, grad=s.kind in ("parameter", "input") and not names.isdisjoint(s.names)) for s in self.slots)
        return replace(self, slots=tuple(slots))

    def returned(self, outputs: Sequence[Any]) -> Any:
        """What the model returns, made of what the main graph returns."""
        tensors = iter(outputs)  # updates of buffers, and what is for hooks, come behind
        leaves = [self.literals[i] if i in self.literals else next(tensors) for i in range(self.out_spec.num_leaves)]
        return pytree.tree_unflatten(leaves, self.out_spec)

    def told_output(self, i: int) -> str:
        """An output as a person reads it."""
        return f"Buffer {self.slot(self.updates[i]).names[0]}" if i in self.updates else f"Output {i}"

    def batch_dim(self, node: fx.Node) -> int | None:
        """Which dimension of an input is samples."""
        return self.batch_dims.get(self.slot(node.name).names[0], 0 if node.meta["val"].dim() else None)

    def slot(self, name: str) -> Slot:
        return next(s for s in self.slots if s.name == name)

    def layouts(self) -> dict[str, Layout]:
        """Layout of every placeholder of the main graph."""
        return {n.name: n.meta["layout"] for n in self.placeholders}

    def with_property(self, *names: str, **changes: Any) -> Program:
        return replace(self, properties=self.properties | set(names), **changes)


def entering(graph: fx.Graph, slots: list[Slot], slot: Slot, value: torch.Tensor) -> fx.Node:
    """A placeholder with this fake value before the inputs of the call, and its slot among the others."""
    position = next((i for i, s in enumerate(slots) if s.kind == "input"), len(slots))
    placeholders = list(graph.find_nodes(op="placeholder"))
    point = placeholders[position] if position < len(placeholders) else placeholders[-1].next
    with graph.inserting_before(point):
        node = graph.placeholder(slot.name)
    node.target = node.name
    node.meta["val"] = value
    slots.insert(position, replace(slot, name=node.name))
    return node


def copied(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph and, once each, of the blocks that it calls."""
    new = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        mapped[node] = new.node_copy(node, lambda n: mapped[n])
    root = torch.nn.Module()
    for name, block in graph.named_children():
        setattr(root, name, copied(block))  # type: ignore[arg-type]
    return _LazyGraphModule(root, new)


def _calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.op == "call_module"]


UNSHARD = "unshard"


def unshards(block: object) -> bool:
    """Whether a block of this name brings parameters to the layouts in which they are used, or is its transpose."""
    return str(block).startswith(UNSHARD)


INPUT, WEIGHT = "_input", "_weight"  # behind the name of a block whose backward pass is in two: `passes/weights.py`


def gradients(returned: Any) -> Any:
    """The gradients among what a block returns in the backward pass; one that is the first of two leaves more beside them."""
    return returned[0] if len(returned) == 2 and isinstance(returned[0], tuple) else returned


def told_outputs(wanted: Sequence[bool]) -> str:
    """Outputs by their positions, such as "outputs 0, 2"."""
    places = [str(i) for i, there in enumerate(wanted) if there]
    return f"output{'s' * (len(places) != 1)} {', '.join(places)}"


def staged(call: fx.Node) -> dict[str, Any]:
    """What says on which pipeline stage a call runs, for one that runs there too."""
    return {k: call.meta[k] for k in ("stage",) if k in call.meta}


def where(node: fx.Node) -> str | None:
    """The module that a node came from."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else None
