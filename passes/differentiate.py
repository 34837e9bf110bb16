"""Differentiate: one forward and one backward graph for each distinct block, and a main graph for each direction.

    y = block(x, w)                     forward:   y, saved = block_forward(x, w)
becomes                                 backward:  dx, dw   = block_backward(saved, dy)

AOTAutograd traces each block once. Every collective has its transpose registered, so gradient synchronisation appears in
the backward graph by itself: where a parameter enters as I and is used as R, the transpose of that step is its reduction.

Where kernels are emitted, what one kernel computes in pieces is traced in pieces, and what kernels can compute again is not
saved (`passes/recompute.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses import FakeTensorMode
from torch.fx import traceback as fx_traceback
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from foldcc import ops
from foldcc.errors import FoldError
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program
from foldcc.layout import Layout
from foldcc.ops.groups import active
from foldcc.passes.experts import rewrite_experts
from foldcc.passes.recompute import between, kept

aten = torch.ops.aten
Nodes = Collection[fx.Node]


@dataclass(frozen=True, kw_only=True)
class Differentiate(Pass):
    """Attributes:
    for_kernels: Triton kernels are emitted for the program.
    """

    requires = frozenset({"localized"})
    provides = frozenset({"differentiated"})
    in_place = False
    for_kernels: bool = False

    def run(self, program: Program) -> Program:
        with active(program.mesh):
            joints = {name: self._joint(name, block) for name, block in program.blocks.items()}
        backward = _backward(program, joints) if any(n.meta["grad"] for n in program.placeholders) else None
        return replace(program, graph=_forward(program, joints), backward=backward)

    def _joint(self, name: str, block: fx.GraphModule) -> Joint:
        joint = _trace(block, {ops.local_token_loss: ops.token_loss_in_pieces} if self.for_kernels else {})
        if self.for_kernels:
            rewrite_experts(joint)
        return _split(block, joint, partial(self.saved, name))

    def saved(self, block: str, forward: Nodes, wanted: Nodes, backward: Nodes, free: Nodes) -> list[fx.Node]:
        """The values of a block's forward pass that are kept for its backward pass, see `recompute.kept`."""
        return kept(wanted, backward, free) if self.for_kernels else list(wanted)


@dataclass(frozen=True)
class Joint:
    """The two directions of one block.

    Attributes:
        forward: formals -> (results, saved values).
        backward: (saved values, gradients of the results that have one) -> gradients of the formals, None without one.
        grads: which results have a gradient.
        results: how many results the block has.
        saved: names of the saved values, for the main graphs.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule | None
    grads: tuple[bool, ...]
    results: int
    saved: int


def _trace(block: fx.GraphModule, instead: Mapping[Any, Callable[..., Any]]) -> fx.GraphModule:
    """The joint graph of a block; the forward graph alone when no result has a gradient.

    Args:
        instead: what is traced in place of some operators.
    """
    (output,) = block.graph.find_nodes(op="output")
    both = any(n.meta["grad"] for n in output.args[0])
    for node in block.graph.nodes:
        # What tracing keeps of a node's meta, for the operators that it becomes and for their transposes.
        node.meta["custom"] = {k: node.meta[k] for k in ("nn_module_stack", "source") if k in node.meta} | {"origin": node.name}
        node.meta["custom"]["used_up"] = _used_up(node)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode, fx_traceback.preserve_node_meta():
        inputs = tuple(
            torch.empty(
                n.meta["layout"].shape,
                dtype=n.meta["val"].dtype,
                device=n.meta["val"].device,
                requires_grad=both and n.meta["grad"],
            )
            for n in block.graph.find_nodes(op="placeholder")
        )
        joint: Any = aot_export_joint_simple(_without_views(block, instead), inputs, trace_joint=both)
    for node in joint.graph.find_nodes(op="call_function", target=torch.ops.higher_order.with_effects):
        name = next(str(a) for a in node.args if isinstance(a, torch._ops.OpOverload))
        raise FoldError(
            f"{name} has an effect besides its result, such as an error for some values, which no program keeps.",
            at=node.meta.get("custom", {}).get("source"),
            valid="an operator without one, such as torch.linalg.inv_ex for torch.linalg.inv",
        )
    _drop_clones(joint, len(output.args[0]))
    for node in joint.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default  # what another block computed may have other strides than what was traced
    for node in block.graph.nodes:
        del node.meta["custom"]
    for node in joint.graph.nodes:
        node.meta |= node.meta.pop("custom", {})
    return joint


def _used_up(node: fx.Node) -> frozenset[str]:
    """The axes that a collective divides, or joins again, along a factor that may have size 1 on a rank."""
    layouts = [n.meta["layout"] for n in (node, *node.all_input_nodes[:1]) if isinstance(n.meta.get("layout"), Layout)]
    return frozenset(axis for layout in layouts for axis, s in layout.states.items() if layout.used_up(s))


def _without_views(block: fx.GraphModule, instead: Mapping[Any, Callable[..., Any]]) -> Callable[..., Any]:
    """The block with copies as results: AOTAutograd refuses views, such as what `linear` makes of three dimensions."""

    class Run(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            return super().call_function(instead.get(target, target), args, kwargs)

    run = Run(block).run
    return lambda *values: tuple(x.clone() for x in run(*values))


def _drop_clones(joint: fx.GraphModule, results: int) -> None:
    (output,) = joint.graph.find_nodes(op="output")
    leaves = list(output.args[0])
    for i, leaf in enumerate(leaves[:results]):
        if leaf.target is aten.clone.default and leaf.args[0].op != "placeholder":
            leaves[i] = leaf.args[0]
    output.args = (tuple(leaves),)


def _split(
    block: fx.GraphModule, joint: fx.GraphModule, choose: Callable[[Nodes, Nodes, Nodes, Nodes], list[fx.Node]]
) -> Joint:
    """Cuts a joint graph: what the results need runs forward, the rest runs backward, with what is computed again.

    Args:
        choose: what the forward pass keeps, see `Differentiate.saved`.
    """
    (output,) = block.graph.find_nodes(op="output")
    grads = tuple(bool(n.meta["grad"]) for n in output.args[0])
    graph = joint.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    count = len(placeholders) - sum(grads)
    primals, tangents = placeholders[:count], placeholders[count:]
    formals = list(block.graph.find_nodes(op="placeholder"))
    returned = [n for n, grad in zip(output.args[0], grads, strict=True) if grad]
    names = {p: f.name for p, f in zip(primals, formals, strict=True)}
    names |= {t: f"grad_{r.name}" for t, r in zip(tangents, returned, strict=True)}
    for primal, formal in zip(primals, formals, strict=True):
        primal.meta["layout"] = formal.meta["layout"]
    for tangent, result in zip(tangents, returned, strict=True):
        tangent.meta["layout"] = result.meta["layout"].transposed
    (joined,) = graph.find_nodes(op="output")
    leaves = list(joined.args[0])
    results, gradients = leaves[: len(grads)], leaves[len(grads) :]
    for result, local in zip(results, output.args[0], strict=True):
        result.meta["layout"] = local.meta["layout"]
    needed = _ancestors(results)
    early = [n for n in graph.nodes if n in needed and n.op != "placeholder"]
    left = [(n.name, n.meta["layout"]) for n in output.args[0]]
    if not any(grads):
        return Joint(_extract(primals, early, tuple(results), names, left), None, grads, len(grads), 0)
    for gradient, formal in zip(gradients, formals, strict=True):
        if gradient is not None:
            gradient.meta["layout"] = formal.meta["layout"].transposed
    late = [n for n in graph.nodes if n in _ancestors(gradients) and n not in needed and n.op != "placeholder"]
    inside = {*late, *tangents}
    _read_sizes(late, inside)
    read = [i for n in late for i in n.all_input_nodes] + [g for g in gradients if isinstance(g, fx.Node)]
    wanted = list(dict.fromkeys(n for n in read if n not in inside))
    free = {*results, *(p for p, f in zip(primals, formals, strict=True) if f.meta["parameter"])}
    saved = choose([*primals, *early], wanted, late, free)
    again = between(saved, wanted)
    asked = [(f"grad_{n.name}", n.meta["layout"].transposed) for n in formals]
    forward = _extract(primals, early, (tuple(results), tuple(saved)), names, left)
    for node in again:
        node.meta["again"] = True
    backward = _extract([*saved, *tangents], [*again, *late], tuple(gradients), names, asked)
    return Joint(forward, backward, grads, len(grads), len(saved))


def _read_sizes(late: list[fx.Node], inside: set[fx.Node]) -> None:
    """Has sizes that data decide read off values that the backward pass reads anyway, so that none is kept for its size."""
    sizes = [n for n in late if n.target is aten.sym_size.int and n.args[0] not in inside]
    read = dict.fromkeys(x for n in late if n not in sizes for x in n.all_input_nodes if x not in inside)
    known = {str(s): (x, i) for x in read for i, s in enumerate(getattr(x.meta["val"], "shape", ()))}
    for node in sizes:
        node.args = known.get(str(node.meta["val"]), node.args)


def _ancestors(nodes: list[Any]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [n for n in nodes if isinstance(n, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _extract(
    inputs: list[fx.Node], nodes: list[fx.Node], results: Any, names: Mapping[fx.Node, str], returns: list[tuple[str, Layout]]
) -> fx.GraphModule:
    """A graph of these nodes; its output keeps what its results, saved values aside, are called, and their layouts."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        name = names.get(node, node.name)
        while any(name == n.target for n in new.values()):  # a formal may be called like a node of this block
            name += "_"
        new[node] = graph.placeholder(name)
        new[node].meta = dict(node.meta)
    for node in nodes:
        new[node] = graph.node_copy(node, lambda n: new[n])
    graph.output(fx.map_arg(results, lambda n: new[n])).meta["returns"] = tuple(returns)
    return _LazyGraphModule(torch.nn.Module(), graph)


def _forward(program: Program, joints: dict[str, Joint]) -> fx.GraphModule:
    """The main graph, forward: `(slots) -> (outputs, saved values of every call)`."""
    root, graph = torch.nn.Module(), fx.Graph()
    for name, joint in joints.items():
        setattr(root, name, joint.forward)
    new: dict[fx.Node, fx.Node] = {}
    saved = []
    for node in program.graph.graph.nodes:
        if node.op == "placeholder":
            new[node] = graph.node_copy(node)
        elif node.op == "call_module":
            joint = joints[str(node.target)]
            call = graph.call_module(str(node.target), tuple(new[a] for a in node.args))
            if joint.backward is not None:
                first = graph.call_function(operator.getitem, (call, 0))
                saved.append(graph.call_function(operator.getitem, (call, 1)))
                call = first
            new[node] = call
        elif node.op == "call_function":
            new[node] = graph.node_copy(node, lambda n: new[n])
        else:
            graph.output((fx.map_arg(node.args[0], lambda n: new[n]), tuple(saved)))
    return _LazyGraphModule(root, graph)


def _backward(program: Program, joints: dict[str, Joint]) -> fx.GraphModule:
    """The main graph, backward: `(saved values of every call, gradients of the wanted outputs) -> gradients of slots`.

    What the gradient of another output would have been multiplied with is not computed.
    """
    root, graph = torch.nn.Module(), fx.Graph()
    calls = [c for c in program.calls if joints[str(c.target)].backward is not None]
    saved = {c: graph.placeholder(f"saved{i}") for i, c in enumerate(calls)}
    grads: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(program.objectives):
        tangent = graph.placeholder(f"tangent{i}")
        tangent.meta = {"val": node.meta["val"], "layout": node.meta["layout"].transposed}
        _accumulate(graph, grads, node, tangent)
    for call in reversed(calls):
        joint = joints[str(call.target)]
        received = {u.args[1]: grads.get(u) for u in call.users}
        tangents = [received.get(i) for i, has in enumerate(joint.grads) if has]
        if not any(t is not None for t in tangents):
            continue
        there = tuple(t is not None for t in tangents)
        name = str(call.target) + "".join(f"_{i}" for i, t in enumerate(there) if not t)
        if not hasattr(root, name):
            setattr(root, name, _variant(joint, there))
        block = getattr(root, name).graph
        formals = islice(block.find_nodes(op="placeholder"), joint.saved)
        values = [_item(graph, saved[call], i, formal) for i, formal in enumerate(formals)]
        result = graph.call_module(name, (*values, *(t for t in tangents if t is not None)))
        (output,) = block.find_nodes(op="output")
        for i, (actual, gradient) in enumerate(zip(call.args, output.args[0], strict=True)):
            if gradient is not None:
                _accumulate(graph, grads, actual, _item(graph, result, i, gradient))
    graph.output(tuple(grads.get(n) for n in program.placeholders))
    return _LazyGraphModule(root, graph)


def _item(graph: fx.Graph, several: fx.Node, i: int, like: fx.Node) -> fx.Node:
    item = graph.call_function(operator.getitem, (several, i))
    item.meta = {"val": like.meta["val"]}
    return item


def _accumulate(graph: fx.Graph, grads: dict[fx.Node, fx.Node], node: Any, gradient: fx.Node) -> None:
    if node in grads:
        gradient, term = graph.call_function(aten.add.Tensor, (grads[node], gradient)), gradient
        gradient.meta = dict(term.meta)
    grads[node] = gradient


def _variant(joint: Joint, there: tuple[bool, ...]) -> fx.GraphModule:
    """The backward graph for the results whose gradient is there: a missing one is zero, and zero is not computed with."""
    assert joint.backward is not None
    if all(there):
        return joint.backward
    old = joint.backward.graph
    placeholders = list(old.find_nodes(op="placeholder"))
    tangents = placeholders[len(placeholders) - len(there) :]
    linear = set(tangents)  # what depends on a gradient, and does so linearly
    zero = {t for t, given in zip(tangents, there, strict=True) if not given}
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}

    def value(n: fx.Node) -> Any:
        if n not in zero:
            return new[n]
        like = n.meta["val"]
        kwargs = {"dtype": like.dtype, "device": like.device}
        return graph.call_function(aten.zeros.default, (list(like.shape),), kwargs)

    for node in old.nodes:
        if node.op == "placeholder":
            if node not in zero:
                new[node] = graph.node_copy(node)
        elif node.op == "output":
            kept = [None if g is None or g in zero else new[g] for g in node.args[0]]
            graph.output(tuple(kept)).meta = dict(node.meta)
        else:
            depends = [n for n in node.all_input_nodes if n in linear]
            if depends:
                linear.add(node)
            if depends and all(n in zero for n in depends):
                zero.add(node)
            elif node.target is aten.add.Tensor and any(n in zero for n in depends):
                (rest,) = (n for n in node.args if n not in zero)
                new[node] = new[rest]
            else:
                new[node] = graph.node_copy(node, value)
    graph.eliminate_dead_code()
    return _LazyGraphModule(torch.nn.Module(), graph)
