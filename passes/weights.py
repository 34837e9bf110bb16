"""Weights: the backward pass of a block in two calls: what goes on to other blocks, and the gradients of parameters.

    dx, dw = block0(x, w, dy)            becomes            [dx, None], [dh] = block0_input(x, w, dy)
                                                            None, dw         = block0_weight(x, dh)

So that a pipeline stage sends back what others wait for, and makes the gradients of its parameters when it would wait itself
(Qi et al., arXiv 2401.10241). Matrix products that lead to parameters alone are in the second call, and what is read by them
alone with them; but of what the second call reads, as few bytes as can be wait for it, a minimum cut as in `recompute`.
Gradients of parameters that no such product leads to, such as those of norms, are made at once. Nothing but views is computed
twice. A block that nothing goes on from, such as an embedding, is called in the second place alone.

What reduces gradients, in blocks that unshard parameters, stays as it was. The plan says which values wait, or has said it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from foldcc.inspect.flops import flops_of
from foldcc.ir.node import leading_to
from foldcc.ir.pipeline import Pass
from foldcc.ir.plan import Names, UnfitPlan
from foldcc.ir.program import INPUT, WEIGHT, Program, staged, unshards
from foldcc.ir.sizes import Sizes
from foldcc.passes.recompute import least
from foldcc.passes.split import between


@dataclass(frozen=True, kw_only=True)
class Weights(Pass):
    requires = frozenset({"bucketed"})
    provides = frozenset({"apart"})

    def run(self, program: Program) -> Program:
        main = program.backward
        if main is None:
            return program
        waits = {}
        for name, on in _going_on(main).items():
            block = getattr(main, name)
            halves = _halves(name, block, on, Sizes(program.mesh), program.plan.waits.get(name))
            if halves is None:
                continue
            setattr(main, name + WEIGHT, halves.weight)
            if halves.input is not None:
                setattr(main, name + INPUT, halves.input)
                waits[name] = halves.waits
            for call in [n for n in main.graph.nodes if n.target == name]:
                _replace(call, _arguments(block), halves)
            delattr(main, name)
        return replace(program, plan=replace(program.plan, waits=waits))


@dataclass(frozen=True)
class _Halves:
    """A block in two. Both take arguments of the block by name; the second one then what the first one leaves for it.

    Attributes:
        input: `arguments -> gradients that go on, what it leaves`; None where no gradient goes on.
        weight: `arguments, what is left -> gradients of parameters`.
        waits: what the second one reads, by name.
    """

    input: fx.GraphModule | None
    weight: fx.GraphModule
    waits: Names = ()


def _going_on(main: fx.GraphModule) -> dict[str, set[int]]:
    """By block, the gradients that lead to a call of another one, in any of its calls."""
    leads: dict[fx.Node, bool] = {}
    found: dict[str, set[int]] = {}
    for node in reversed(main.graph.nodes):
        calls = [u.op == "call_module" and not unshards(u.target) for u in node.users]
        leads[node] = any(calls) or any(leads[u] for u in node.users if u.op != "call_module" or unshards(u.target))
        if node.op == "call_module" and not unshards(node.target):
            there: set[Any] = {item.args[1] for item in node.users if leads[item]}
            found.setdefault(str(node.target), set()).update(there)
    return dict(reversed(found.items()))


def _halves(name: str, block: fx.GraphModule, on: Collection[int], sizes: Sizes, said: Names | None) -> _Halves | None:
    """A block in two; None where none of its products leads to parameters alone."""
    output = block.graph.output_node()
    gradients: Any = output.args[0]
    if not on:
        return _Halves(None, block)
    nodes = [n for n in block.graph.nodes if n.op == "call_function"]
    for node in nodes:
        sizes.learn(node)
    first = leading_to(gradients[i] for i in on if gradients[i] is not None)
    alone = leading_to(g for i, g in enumerate(gradients) if g is not None and i not in on) - first
    late: set[fx.Node] = set()
    for node in nodes:
        if node in alone and (flops_of(node, sizes) > 0 or not late.isdisjoint(node.all_input_nodes)):
            late.add(node)
    if not late:
        return None
    first |= leading_to(g for g in gradients if g is not None and g not in late)  # what is made at once
    read = list(dict.fromkeys(x for n in nodes if n in late for x in n.all_input_nodes if x not in late))
    if said is None:
        fewest = least(read, (), lambda n: n in alone and n not in first)
        kept = [n for n in fewest if n.op == "placeholder" or n in first or n.all_input_nodes]  # not what is made of nothing
    else:
        kept = [n for n in block.graph.nodes if n.name in said]
    second = between(kept, (n for n in nodes if n in late))
    missing = [n.name for n in second if n.op == "placeholder"]
    missing += [x for x in said or () if x not in {n.name for n in kept}]
    if missing:
        raise UnfitPlan(
            f"The gradients of parameters of {name} cannot be computed of what the plan has wait: {' '.join(said or ())}.",
            missing=" ".join(missing),
            valid=f"for example {' '.join(n.name for n in read)}",
        )
    passed = [n for n in kept if n.op != "placeholder"]
    ahead = first | leading_to(passed)
    returned = ([None if g in late else g for g in gradients], passed)
    both = (
        _graph(block, [n for n in block.graph.nodes if n in ahead], returned),
        _graph(block, [*kept, *second], [g if g in late else None for g in gradients], kept),
    )
    return _Halves(*both, tuple(n.name for n in kept))


def _graph(block: fx.GraphModule, nodes: Iterable[fx.Node], returned: Any, given: Collection[fx.Node] = ()) -> fx.GraphModule:
    """A graph of some nodes of a block, which is given those of `given`, arguments of the block first."""
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    nodes = sorted(nodes, key=lambda n: (n.op != "placeholder", n not in given))
    for node in nodes:
        if node in given or node.op == "placeholder":
            new[node] = graph.placeholder(node.name)
            new[node].meta = {k: x for k, x in node.meta.items() if k != "again"}
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(fx.map_arg(_tuples(returned), new.__getitem__)).meta = dict(block.graph.output_node().meta)
    return _LazyGraphModule(torch.nn.Module(), graph)


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, (list, tuple)) else x


def _replace(call: fx.Node, formals: Sequence[fx.Node], halves: _Halves) -> None:
    """Puts two calls in place of one of a block with these arguments."""
    graph, name = call.graph, str(call.target)
    actual = dict(zip((n.name for n in formals), call.args, strict=True))
    with graph.inserting_before(call):
        made: list[Any] = []
        if halves.input is not None:
            first = graph.call_module(name + INPUT, tuple(actual[n.name] for n in _arguments(halves.input)))
            made = [graph.call_function(operator.getitem, (first, i)) for i in range(2)]
            first.meta = staged(call)
            returned: Any = halves.input.graph.output_node().args[0]
            for i, node in enumerate(returned[1]):
                actual[node.name] = graph.call_function(operator.getitem, (made[1], i))
                actual[node.name].meta = {"val": node.meta["val"]}
        second = graph.call_module(name + WEIGHT, tuple(actual[n.name] for n in _arguments(halves.weight)))
        second.meta = staged(call)
        later: Any = halves.weight.graph.output_node().args[0]
        for item in list(call.users):
            item.args = (second if later[item.args[1]] is not None else made[0], item.args[1])
    graph.erase_node(call)


def _arguments(block: fx.GraphModule) -> list[fx.Node]:
    return list(block.graph.find_nodes(op="placeholder"))
