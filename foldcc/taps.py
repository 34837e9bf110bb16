"""What hooks are called with, as results of a program; gradients inside it, as those of inputs that are zero: taps.

    y = mlp(x)                     with a forward hook on mlp, the program returns x and y besides; with a backward hook
becomes                            on it, the gradients of two taps are those of x and y, along this path:
    y = mlp(x + tap0) + tap1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from foldcc.capture.observe import Recorder
from foldcc.hooks import Events, Result, Seen
from foldcc.ir.program import Program, Slot, entering
from foldcc.ir.rewrite import emit
from foldcc.plan.interface import differentiated

aten = torch.ops.aten


def with_results(program: Program, recorder: Recorder) -> Program:
    """A captured program whose last results are the recorder's marks: without marks, returning each value once.

    Where a gradient was asked for and flows, a tap is added to the value.
    """
    if not recorder.events:
        return program
    graph = program.graph.graph
    (output,) = graph.find_nodes(op="output")
    returned: list[fx.Node] = list(output.args[0])
    count = len(returned) - len(recorder.marks)
    flowing = differentiated(program)
    slots, taps = list(program.slots), 0
    values: list[fx.Node] = []
    for i, mark in enumerate(returned[count:]):
        value: Any = mark.args[0]
        if i in recorder.asked and value in flowing:
            seen, ends, position = recorder.asked[i]
            where = f"{'result' if ends else 'argument'} {position} of {seen.path}"
            tap = _tap(graph, slots, f"tap{taps}", where, value)
            taps += 1
            flowing.add(tap)
            (seen.leaving if ends else seen.entering)[position] = tap.name
            tapped = emit(mark, aten.add.Tensor, value, tap)
            flowing.add(tapped)
            mark.replace_all_uses_with(tapped)
            values.append(value if ends else tapped)  # as in PyTorch, what a hook makes of a result is no gradient of it
        else:
            mark.replace_all_uses_with(value)
            values.append(value)
        graph.erase_node(mark)
    returned = list(output.args[0][:count])
    places = {node: i for i, node in reversed(list(enumerate(returned)))}
    for value in values:
        if value not in places:
            places[value] = len(returned)
            returned.append(value)
    output.args = (tuple(returned),)
    program.graph.recompile()
    return replace(program, slots=tuple(slots), observed=_placed(recorder.events, [places[v] for v in values]))


def without_results(program: Program) -> Program:
    """A captured program that returns nothing for hooks. Its taps have no gradient."""
    if not program.observed:
        return program
    program = program.copied()
    returned: Any = program.output.args[0]
    program.output.args = (tuple(returned[: program.own + len(program.updates)]),)
    slots = tuple(replace(s, grad=s.grad and s.kind != "tap") for s in program.slots)
    return replace(program, slots=slots, observed=())


def _tap(graph: fx.Graph, slots: list[Slot], name: str, where: str, value: fx.Node) -> fx.Node:
    """A placeholder like the value."""
    like = value.meta["val"]
    with like.fake_mode:
        zero = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return entering(graph, slots, Slot(name, "tap", (where,), grad=True), zero)


def _placed(events: Events, places: Sequence[int]) -> Events:
    """The events with the positions of the program's results in place of those of marks."""

    def placed(x: Any) -> Any:
        return pytree.tree_map(lambda leaf: Result(places[leaf.position]) if isinstance(leaf, Result) else leaf, x)

    done: dict[int, Seen] = {}
    for seen, _ in events:
        if id(seen) not in done:
            done[id(seen)] = replace(seen, args=placed(seen.args), kwargs=placed(seen.kwargs), output=placed(seen.output))
    return tuple((done[id(seen)], ends) for seen, ends in events)
