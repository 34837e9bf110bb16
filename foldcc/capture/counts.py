"""Counts: sums over all of an input, such as the number of valid labels, of which micro-batches share one.

    loss = sum(losses) / max(sum(labels != -100), 1)

What each micro-batch adds to such a loss is its own sum, divided by the count of all of them. So a count that a loss is
divided by, or multiplied with, and what leads to it, stands in front of the rest of a program, where a runner can do it for
all micro-batches first; what is computed of counts alone, here the maximum, is computed of the shared one. Counts inside
anything else, such as a router's loss, are each micro-batch's own, as in one process that accumulates.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from foldcc.ir.program import Program
from foldcc.rules.kinds import is_view

aten = torch.ops.aten
_SUMS = {aten.sum.default, aten.sum.dim_IntList}
_SCALED = {aten.mul.Tensor, aten.div.Tensor}
_LINEAR = {aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten._to_copy.default, aten.clone.default, *_SUMS, *_SCALED}


def with_counts(program: Program) -> Program:
    """Puts the counts that scale the losses of a captured program, and what leads to them, first, and marks them `count`."""
    graph = program.graph.graph
    alone, counted, _ = _of_inputs(program)
    shared: dict[fx.Node, fx.Node] = {}
    last = [*graph.find_nodes(op="placeholder")][-1]
    products = set(_scaled(program))
    for node in [n for n in graph.nodes if n in products]:
        for count in [x for x in node.all_input_nodes if x in counted]:
            for x in _leading(count, alone, counted, shared):
                of_samples = x in alone or x.target in _SUMS
                with graph.inserting_after(last) if of_samples else graph.inserting_before(node):
                    shared[x] = graph.node_copy(x, lambda n: shared.get(n, n))
                if of_samples:  # a copy: the rest may read the same of its own micro-batch
                    last = shared[x]
                    last.meta["count"] = True
            node.replace_input_with(count, shared[count])
    for node in reversed(list(shared)):
        if not node.users:
            graph.erase_node(node)
    program.graph.recompile()
    return program


def _scaled(program: Program) -> Iterator[fx.Node]:
    """The products and quotients on the linear way to a loss of a captured program."""
    _, counted, of_samples = _of_inputs(program)
    left, seen = [n for n in program.outputs[: program.own] if n.meta["val"].is_floating_point()], set[fx.Node]()
    while left:
        node = left.pop()
        if node in seen or not (node.target in _LINEAR or (node.op == "call_function" and is_view(node.target))):
            continue
        seen.add(node)
        inputs = [n for n in node.all_input_nodes if n in of_samples and n not in counted]
        if node.target not in _SCALED:
            left += inputs
        elif len(inputs) == 1 and (node.target is not aten.div.Tensor or node.args[0] in inputs):
            left += inputs
            yield node


def _of_inputs(program: Program) -> tuple[dict[fx.Node, bool], set[fx.Node], set[fx.Node]]:
    """What is computed of inputs alone, and of nothing that is trained, drawn or updated; and all that is computed of samples.

    Returns:
        Of inputs alone, what has not been added up, and whether it is of samples; sums over all elements of such, and what is
        made of those; all that samples are read for.
    """
    updated, read = set(program.updates.values()), set[fx.Node]()
    alone: dict[fx.Node, bool] = {}
    counted: set[fx.Node] = set()
    for node in program.graph.graph.nodes:
        inputs = node.all_input_nodes
        if not read.isdisjoint(inputs):
            read.add(node)
        if node.op == "placeholder":
            slot = program.slot(node.name)
            read |= {node} if slot.kind == "input" and program.batch_dim(node) is not None else set()
            if slot.kind in ("input", "constant", "buffer") and not slot.grad and node.name not in updated:
                alone[node] = slot.kind == "input" and program.batch_dim(node) is not None
        elif node.op == "call_function" and all(x in alone or x in counted for x in inputs):
            of_samples = any(alone.get(x) for x in inputs)
            if counted.isdisjoint(inputs):
                alone[node] = of_samples
                if of_samples and node.target in _SUMS and node.meta["val"].dim() == 0:
                    counted.add(node)
                    del alone[node]
            elif not of_samples:
                counted.add(node)
    return alone, counted, read


def _leading(count: fx.Node, alone: dict[fx.Node, bool], counted: set[fx.Node], known: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """What a count is computed by, in order, but for what is known."""
    found, left = {count}, [count]
    while left:
        inputs = [x for x in left.pop().all_input_nodes if x.op == "call_function" and x not in found]
        found.update(inputs)
        left += inputs
    return [n for n in count.graph.nodes if n in found and n not in known]
