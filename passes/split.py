"""Split: one forward and one backward graph for each distinct block, and a main graph for each direction.

    y, (dx, dw) = block(x, w, dy)       becomes       y, saved = block_forward(x, w)       dx, dw = block_backward(saved, dy)

What the results need runs forward, the rest runs backward. The plan says which values are kept in between; what else is read
is computed again (`passes/recompute.py`). Where the plan does not say it, all that is read is kept. With ZeRO-3 parameters that
were unsharded for a block are not kept for its backward pass, nor what is computed of them alone; they are unsharded again.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from foldcc.errors import FoldError
from foldcc.ir.joint import Joint
from foldcc.ir.pipeline import Pass
from foldcc.ir.plan import Names, UnfitPlan
from foldcc.ir.program import Program, staged, unshards
from foldcc.layout import Layout

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Split(Pass):
    requires = frozenset({"joint"})
    provides = frozenset({"differentiated"})
    in_place = False

    def run(self, program: Program) -> Program:
        trained = any(n.meta["grad"] for n in program.placeholders)
        anew = {name: _unsharded(program, name) if trained and program.plan.zero == 3 else set() for name in program.blocks}
        halves = {name: _halves(name, block, program.plan.kept.get(name), anew[name]) for name, block in program.blocks.items()}
        backward = _backward(program, halves) if trained else None
        plan = replace(program.plan, kept={name: half.kept for name, half in halves.items()})
        return replace(program, graph=_forward(program, halves), backward=backward, plan=plan)


def _unsharded(program: Program, name: str) -> set[int]:
    """The arguments of a block that other blocks unshard; all of such a block itself, which is called again."""
    calls = [call for call in program.calls if call.target == name]
    itself = unshards(name)
    return {i for call in calls for i, a in enumerate(call.args) if itself or _unshard_call(a) is not None}


def _unshard_call(value: Any) -> fx.Node | None:
    """The call of a block that unshards parameters, of which this is a result."""
    made = value.op == "call_function" and value.args[0].op == "call_module"
    return value.args[0] if made and unshards(value.args[0].target) else None


@dataclass(frozen=True)
class Halves:
    """The two directions of one block.

    Attributes:
        forward: formals -> (results, saved values); results alone where none has a gradient.
        backward: (saved values, formals that are given anew, gradients of the results that have one) -> gradients of the
            formals, None without one.
        again: formals -> results, of a block that is called again in the backward pass, and saves its formals for that.
        grads: the results that have a gradient, by number.
        kept: the saved values, by name.
        anew: the formals that are unsharded again instead of saved, by number.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule | None = None
    again: fx.GraphModule | None = None
    grads: tuple[int, ...] = ()
    kept: Names = ()
    anew: tuple[int, ...] = ()

    @property
    def saves(self) -> bool:
        return self.backward is not None or self.again is not None


def _halves(name: str, block: fx.GraphModule, said: Names | None, anew: set[int]) -> Halves:
    joint = Joint.of(block)
    output = block.graph.output_node()
    left, asked = output.meta["returns"]
    again_itself = unshards(name) and bool(anew)
    once_more = _extract(joint.formals, joint.early, joint.results, left) if again_itself else None
    if not joint.tangents and not again_itself:
        return Halves(_extract(joint.formals, joint.early, joint.results, left))
    there = {n.name: n for n in (*joint.formals, *joint.early)}
    given = [joint.formals[i] for i in sorted(anew)]
    of_parameters = _of(given, joint.early)
    wanted = [n.name for n in joint.kept] if said is None else list(said)
    if again_itself:
        saved, given = given, []
    else:
        saved = [there[x] for x in wanted if x in there and there[x] not in of_parameters]
    again = between([*saved, *given], joint.read)
    if missing := [x for x in wanted if x not in there] + [n.name for n in again if n.op == "placeholder"]:
        raise UnfitPlan(
            f"The backward pass of {name} cannot be computed of what the plan says is kept: {' '.join(wanted)}.",
            missing=" ".join(missing),
            valid=f"for example {' '.join(n.name for n in joint.read)}",
        )
    read = {x for n in (*again, *joint.late) for x in n.all_input_nodes}
    given = [n for n in given if n in read or n in joint.gradients]
    forward = _extract(joint.formals, joint.early, (joint.results, tuple(saved)), left)
    if not joint.tangents:  # parameters without a gradient
        return Halves(forward, again=once_more, kept=tuple(n.name for n in saved))
    backward = _extract([*saved, *given, *joint.tangents], _when_read(again, joint.late), joint.gradients, asked)
    computed = {n.name for n in again}
    for node in backward.graph.nodes:
        if node.op == "call_function" and node.name in computed:
            node.meta["again"] = True
    return Halves(
        forward,
        backward,
        once_more,
        tuple(t.meta["result"] for t in joint.tangents),
        tuple(n.name for n in saved),
        tuple(joint.formals.index(n) for n in given),
    )


def _of(sources: Collection[fx.Node], nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Some values, and what is computed of them alone."""
    found = set(sources)
    for node in nodes:
        if node.all_input_nodes and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


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


def _when_read(again: Iterable[fx.Node], late: Iterable[fx.Node]) -> list[fx.Node]:
    """What runs late, and what is computed again right before the first that reads it: not all of it is there at once."""
    order = {x: i for i, x in enumerate(again)}
    found: dict[fx.Node, None] = {}
    for node in late:
        needed, left = set(), [node]
        while left:
            there = [x for x in left.pop().all_input_nodes if x in order and x not in found and x not in needed]
            needed.update(there)
            left += there
        found |= dict.fromkeys([*sorted(needed, key=order.__getitem__), node])
    return [*found, *(x for x in order if x not in found)]


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
            call.meta = staged(node)
            if halves[str(node.target)].saves:
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
    calls = [c for c in program.calls if halves[str(c.target)].saves]
    saved = {c: graph.placeholder(f"saved{i}") for i, c in enumerate(calls)}
    grads: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(program.objectives):
        tangent = graph.placeholder(f"tangent{i}")
        tangent.meta = {"val": node.meta["val"], "layout": node.meta["layout"].transposed}
        _accumulate(graph, grads, node, tangent)
    for call in reversed([c for c in calls if halves[str(c.target)].backward is not None]):
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
        formals = list(block.find_nodes(op="placeholder"))
        values = [_item(graph, saved[call], i, formal) for i, formal in enumerate(formals[: len(both.kept)])]
        sources = {i: _unshard_call(call.args[i]) for i in both.anew}
        fresh = {c: _again(root, graph, halves[str(c.target)], saved[c], c) for c in dict.fromkeys(sources.values())}
        values += [_item(graph, fresh[c], call.args[i].args[1], call.args[i]) for i, c in sources.items()]
        result = graph.call_module(name, (*values, *(t for t in tangents if t is not None)))
        result.meta = staged(call)
        (output,) = block.find_nodes(op="output")
        for i, (actual, gradient) in enumerate(zip(call.args, output.args[0], strict=True)):
            if gradient is not None:
                _accumulate(graph, grads, actual, _item(graph, result, i, gradient))
    graph.output(tuple(grads.get(n) for n in program.placeholders))
    return _LazyGraphModule(root, graph)


def _again(root: torch.nn.Module, graph: fx.Graph, both: Halves, saved: fx.Node, call: fx.Node) -> fx.Node:
    """A call of a block that unshards parameters once more, of what it has saved."""
    assert both.again is not None
    name = f"{call.target}_again"
    setattr(root, name, both.again)
    formals = both.again.graph.find_nodes(op="placeholder")
    made = graph.call_module(name, tuple(_item(graph, saved, i, formal) for i, formal in enumerate(formals)))
    made.meta = staged(call)
    return made


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
