"""Split: one forward and one backward graph for each distinct block, and a main graph for each direction.

    y, (dx, dw) = block(x, w, dy)       becomes       y, saved = block_forward(x, w)       dx, dw = block_backward(saved, dy)

What the results need runs forward, the rest runs backward. The plan says which values are kept in between; what else is read
is computed again (`passes/recompute.py`). Where the plan does not say it, all that is read is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from foldcc.errors import FoldError
from foldcc.ir.joint import Joint
from foldcc.ir.pipeline import Pass
from foldcc.ir.plan import Names, UnfitPlan
from foldcc.ir.program import Program
from foldcc.layout import Layout

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Split(Pass):
    requires = frozenset({"joint"})
    provides = frozenset({"differentiated"})
    in_place = False

    def run(self, program: Program) -> Program:
        said = program.plan.kept
        kept = {name: said[name] if name in said else _read(block) for name, block in program.blocks.items()}
        halves = {name: _halves(name, block, kept[name]) for name, block in program.blocks.items()}
        backward = _backward(program, halves) if any(n.meta["grad"] for n in program.placeholders) else None
        plan = replace(program.plan, kept=kept)
        return replace(program, graph=_forward(program, halves), backward=backward, plan=plan)


@dataclass(frozen=True)
class Halves:
    """The two directions of one block.

    Attributes:
        forward: formals -> (results, saved values); results alone where none has a gradient.
        backward: (saved values, gradients of the results that have one) -> gradients of the formals, None without one.
        grads: the results that have a gradient, by number.
        saved: how many values are saved.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule | None
    grads: tuple[int, ...]
    saved: int


def _read(block: fx.GraphModule) -> Names:
    """What the backward pass reads of the forward pass, by name."""
    return tuple(n.name for n in Joint.of(block).read)


def _halves(name: str, block: fx.GraphModule, kept: Names) -> Halves:
    joint = Joint.of(block)
    output = block.graph.output_node()
    left, asked = output.meta["returns"]
    if not joint.tangents:
        return Halves(_extract(joint.formals, joint.early, joint.results, left), None, (), 0)
    there = {n.name: n for n in (*joint.formals, *joint.early)}
    saved = [there[x] for x in kept if x in there]
    again = between(saved, joint.read)
    if missing := [x for x in kept if x not in there] + [n.name for n in again if n.op == "placeholder"]:
        raise UnfitPlan(
            f"The backward pass of {name} cannot be computed of what the plan says is kept: {' '.join(kept)}.",
            missing=" ".join(missing),
            valid=f"for example {' '.join(n.name for n in joint.read)}",
        )
    forward = _extract(joint.formals, joint.early, (joint.results, tuple(saved)), left)
    backward = _extract([*saved, *joint.tangents], [*again, *joint.late], joint.gradients, asked)
    computed = {n.name for n in again}
    for node in backward.graph.nodes:
        if node.op == "call_function" and node.name in computed:
            node.meta["again"] = True
    return Halves(forward, backward, tuple(t.meta["result"] for t in joint.tangents), len(saved))


def between(saved: Collection[fx.Node], wanted: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes that lead from what is saved to what is wanted, in order."""
    found: set[fx.Node] = set()
    left = [n for n in wanted if n not in saved]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += [x for x in node.all_input_nodes if x not in saved]
    return [n for n in next(iter(found)).graph.nodes if n in found] if found else []


def _extract(
    inputs: list[fx.Node], nodes: list[fx.Node], results: Any, returns: tuple[tuple[str, Layout], ...]
) -> fx.GraphModule:
    """A graph of these nodes; its output keeps what its results, saved values aside, are called, and their layouts."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        new[node] = graph.placeholder(node.name)
        new[node].meta = dict(node.meta)
    for node in nodes:
        new[node] = graph.node_copy(node, lambda n: new[n])
    graph.output(fx.map_arg(results, lambda n: new[n])).meta["returns"] = returns
    return _LazyGraphModule(torch.nn.Module(), graph)


def _forward(program: Program, halves: Mapping[str, Halves]) -> fx.GraphModule:
    """The main graph, forward: `(slots) -> (outputs, saved values of every call)`."""
    root, graph = torch.nn.Module(), fx.Graph()
    for name, half in halves.items():
        setattr(root, name, half.forward)
    new: dict[fx.Node, fx.Node] = {}
    saved = []
    for node in program.graph.graph.nodes:
        if node.op == "placeholder":
            new[node] = graph.node_copy(node)
        elif node.op == "call_module":
            call = graph.call_module(str(node.target), tuple(new[a] for a in node.args))
            if halves[str(node.target)].backward is not None:
                first = graph.call_function(operator.getitem, (call, 0))
                saved.append(graph.call_function(operator.getitem, (call, 1)))
                call = first
            new[node] = call
        elif node.op == "call_function":
            new[node] = graph.node_copy(node, lambda n: new[n])
        else:
            graph.output((fx.map_arg(node.args[0], lambda n: new[n]), tuple(saved)))
    return _LazyGraphModule(root, graph)


def _backward(program: Program, halves: Mapping[str, Halves]) -> fx.GraphModule:
    """The main graph, backward: `(saved values of every call, gradients of the wanted outputs) -> gradients of slots`.

    What the gradient of another output would have been multiplied with is not computed.
    """
    root, graph = torch.nn.Module(), fx.Graph()
    calls = [c for c in program.calls if halves[str(c.target)].backward is not None]
    saved = {c: graph.placeholder(f"saved{i}") for i, c in enumerate(calls)}
    grads: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(program.objectives):
        tangent = graph.placeholder(f"tangent{i}")
        tangent.meta = {"val": node.meta["val"], "layout": node.meta["layout"].transposed}
        _accumulate(graph, grads, node, tangent)
    for call in reversed(calls):
        both = halves[str(call.target)]
        received = {u.args[1]: grads.get(u) for u in call.users}
        tangents = [received.get(i) for i in both.grads]
        if not any(t is not None for t in tangents):
            continue
        there = tuple(t is not None for t in tangents)
        name = str(call.target) + "".join(f"_{i}" for i, t in enumerate(there) if not t)
        if not hasattr(root, name):
            setattr(root, name, _variant(both, there))
        block = getattr(root, name).graph
        formals = islice(block.find_nodes(op="placeholder"), both.saved)
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


def _variant(both: Halves, there: tuple[bool, ...]) -> fx.GraphModule:
    """The backward graph for the results whose gradient is there: a missing one is zero, and zero is not computed with."""
    assert both.backward is not None
    if all(there):
        return both.backward
    old = both.backward.graph
    placeholders = list(old.find_nodes(op="placeholder"))
    tangents = placeholders[len(placeholders) - len(there) :]
    linear = set(tangents)  # what depends on a gradient, and does so linearly
    zero = {t for t, given in zip(tangents, there, strict=True) if not given}
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}

    def value(n: fx.Node) -> Any:
        return new[n] if n not in zero else _zeros(graph, n, new)

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


def _zeros(graph: fx.Graph, gradient: fx.Node, there: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Zeros in place of a gradient, for an operator that joins it with one that is there."""
    like = gradient.meta["val"]
    kwargs = {"dtype": like.dtype, "device": like.device}
    if all(isinstance(n, int) for n in like.shape):
        zeros = graph.call_function(aten.zeros.default, (list(like.shape),), kwargs)
    else:  # of a size that data decide, which a value that is there has
        size = str(like.shape)
        alike = next((new for n, new in there.items() if str(getattr(n.meta["val"], "shape", "")) == size), None)
        if alike is None:
            raise FoldError(
                f"The gradient {gradient.name} is not given, and nothing else has its size {size}, which data decide.",
                at=gradient.meta.get("source"),
                valid="gradients of all outputs: one that does not count times zero",
            )
        zeros = graph.call_function(aten.zeros_like.default, (alike,), kwargs)
    zeros.meta = {k: x for k, x in gradient.meta.items() if k not in ("layout", "types", "result")}
    return zeros
