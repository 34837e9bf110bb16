"""Counts: sums over all of an input, such as the number of valid labels, of which micro-batches share one.

    loss = sum(losses) / sum(labels != -100)

The mean over micro-batches is the mean over all tokens if each divides by the mean of their counts instead of its own. So what
is computed of inputs alone, up to such a sum, stands in front of the rest of a program, where a runner can do it for all
micro-batches first; and a count of whole numbers is cast where it is used, for their mean is none.
"""

from __future__ import annotations

import torch
from torch import fx

from foldcc.errors import FoldError
from foldcc.ir.program import Program
from foldcc.ir.rewrite import emit, replace_node
from foldcc.ir.walk import module_of

aten = torch.ops.aten
_SUMS = {aten.sum.default, aten.sum.dim_IntList}


def with_counts(program: Program) -> Program:
    """Puts the counts of a captured program, and what leads to them, first, and marks them `count`.

    Raises:
        FoldError: a count is computed with as a whole number.
    """
    graph = program.graph.graph
    counts = [x for count in _counts(program) for x in _as_numbers(count)]
    leading, left = set(counts), list(counts)
    while left:
        inputs = [x for x in left.pop().all_input_nodes if x.op == "call_function" and x not in leading]
        leading.update(inputs)
        left += inputs
    new: dict[fx.Node, fx.Node] = {}
    last = [*graph.find_nodes(op="placeholder")][-1]
    for node in [n for n in graph.nodes if n in leading]:
        with graph.inserting_after(last):  # a copy: the rest may read the same of its own micro-batch
            last = new[node] = graph.node_copy(node, lambda n: new.get(n, n))
        last.meta["count"] = True
    for count in counts:
        count.replace_all_uses_with(new[count])
    for node in reversed([n for n in graph.nodes if n in leading]):
        if not node.users:
            graph.erase_node(node)
    program.graph.recompile()
    return program


def refuse_in_micro_batches(program: Program) -> None:
    """Raises for what a call does once, and would be done for each micro-batch."""
    for i in program.updates:
        raise FoldError(
            f"{program.told_output(i)} is updated in each forward pass, and micro-batches would not see each other's.",
            valid="micro_batches=1 and pp=1",
        )
    if program.observed:
        raise FoldError("Hooks see whole calls, and a call in micro-batches is none.", valid="micro_batches=1 and pp=1")
    for slot in program.slots:
        if slot.kind == "input" and slot.grad:
            raise FoldError(
                f"Input {slot.names[0]} requires a gradient, which calls in micro-batches do not give.",
                valid="micro_batches=1 and pp=1",
            )


def _counts(program: Program) -> list[fx.Node]:
    """The sums over all elements of what is computed of samples alone, and of nothing that is trained, drawn or updated."""
    updated, samples = set(program.updates.values()), set()
    alone: dict[fx.Node, bool] = {}  # whether it is of samples, by a value that is computed of inputs and constants
    for node in program.graph.graph.nodes:
        if node.op == "placeholder":
            slot = program.slot(node.name)
            if slot.kind in ("input", "constant", "buffer") and not slot.grad and node.name not in updated:
                alone[node] = slot.kind == "input" and program.batch_dim(node) is not None
        elif node.op == "call_function" and all(x in alone for x in node.all_input_nodes):
            alone[node] = any(alone[x] for x in node.all_input_nodes)
            if alone[node] and node.target in _SUMS and node.meta["val"].dim() == 0:
                samples.add(node)
                alone.pop(node)  # what is computed of a count comes behind it
    return [n for n in program.graph.graph.nodes if n in samples]


def _as_numbers(count: fx.Node) -> list[fx.Node]:
    """A count as floating-point numbers, of which there is a mean: in each dtype in which it is used."""
    if count.meta["val"].is_floating_point():
        return [count]
    found: dict[torch.dtype, fx.Node] = {}
    for user in list(count.users):
        value = user.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise FoldError(
                "A count of samples is computed with as a whole number, and micro-batches share the mean of their counts.",
                at=user.meta.get("source"),
                module=module_of(user) or None,
                valid="a count that divides; micro_batches=1 and pp=1",
            )
        if value.dtype not in found:
            found[value.dtype] = emit(user, aten._to_copy.default, count, dtype=value.dtype)
        if user.target is aten._to_copy.default:
            replace_node(user, found[value.dtype])
        else:
            user.replace_input_with(count, found[value.dtype])
    return list(found.values())
