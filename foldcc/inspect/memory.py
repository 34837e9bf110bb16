"""Bytes that a rank holds in a training step, read off the program: what lives when, in the order in which nodes run.

A value lives from the node that makes it to the last one that reads it, and a view keeps alive what it is a view of. What an
operator allocates inside itself is not seen, but for the buffers of collectives, which are said. Sizes that data decide are
those of balanced routing (`foldcc/ir/sizes.py`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from foldcc import ops
from foldcc.ir.program import Program, unshards
from foldcc.ir.sizes import Sizes, communicates, human
from foldcc.ir.walk import FORWARD, module_of
from foldcc.rules.kinds import is_view
from foldcc.tables import table

MOMENTS = 2  # what AdamW holds of each element of a parameter


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        parameters, buffers, inputs: that are there before a step.
        gradients: when the backward pass has ended.
        moments: AdamW's two of each parameter, in its dtype.
        kept: activations that the forward pass keeps for the backward pass.
        outputs: what the forward pass returns, beside that.
        forward, backward: the most that lives at once in each pass, `kept` and gradients included, beside what was there
            before the step.
        at: the module in which it is that much, and the pass.
        communication: the largest payload of a collective, sent and received.
    """

    parameters: float
    buffers: float
    inputs: float
    gradients: float
    moments: float
    kept: float
    outputs: float
    forward: float
    backward: float
    at: tuple[str, str]
    communication: float

    @property
    def step(self) -> float:
        """The most that lives at once between the beginning of a forward pass and the end of its backward pass."""
        return max(self.forward, self.backward)

    @property
    def peak(self) -> float:
        """The most that a rank holds, with an optimizer that has been stepped and gradients that are freed before each step."""
        return self.parameters + self.buffers + self.inputs + self.moments + self.step

    def __str__(self) -> str:
        module, direction = self.at
        rows = [
            ("parameters", self.parameters),
            ("AdamW's two moments", self.moments),
            ("buffers and inputs", self.buffers + self.inputs),
            ("gradients", self.gradients),
            ("kept between the passes", self.kept),
            ("outputs beside that", self.outputs),
            ("highest in the forward pass", self.forward),
            ("highest in the backward pass", self.backward),
            ("largest payload of a collective", self.communication),
        ]
        lines = [f"  {what:<32} {human(count):>11}" for what, count in rows]
        lines.append(f"  {'at its highest':<32} {human(self.peak):>11}  in {module or 'the model'}, {direction}")
        return "\n".join(lines)


class Policies(Mapping[tuple[int, str], Memory]):
    """What a rank holds by policy, `(zero, recompute)`; printing it gives a table."""

    def __init__(self, found: Mapping[tuple[int, str], Memory]):
        self._found = dict(found)

    def __getitem__(self, policy: tuple[int, str]) -> Memory:
        return self._found[policy]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __str__(self) -> str:
        head = ["zero", "recompute", "parameters", "moments", "gradients", "kept", "a step", "at its highest"]
        rows = [
            [str(zero), policy, *(human(x) for x in (m.parameters, m.moments, m.gradients, m.kept, m.step, m.peak))]
            for (zero, policy), m in self.items()
        ]
        return table(head, rows, right=range(2, len(head)))


def memory(program: Program) -> Memory:
    """What a rank holds in a training step of a program that is lowered."""
    walk, held, slots = Walk(program), defaultdict[str, float](float), outside(program)
    for slot, there in zip(program.slots, slots, strict=True):
        held[slot.kind] += there.bytes
    found: Any = walk.run(program.graph, slots, FORWARD)
    outputs, saved = found if program.backward is not None else (found, ())
    forward, at = walk.highest, walk.at
    kept = walk.bytes(saved)
    returned = walk.bytes([outputs, saved]) - kept
    gradients = backward = 0.0
    if program.backward is not None:
        walk.highest = 0.0
        tangents = [Storage(walk.size(n.meta["val"])) for n in program.objectives]
        walk.take(tangents)
        left = walk.run(program.backward, [*saved, *tangents], "backward", used_up=True)
        backward = walk.highest
        at = walk.at if backward > forward else at
        gradients = sum(s.bytes for s in {*_leaves(left)})
    return Memory(
        parameters=held["parameter"],
        buffers=held["buffer"] + held["constant"],
        inputs=held["input"] + held["key"],
        gradients=gradients,
        moments=MOMENTS * held["parameter"],
        kept=kept,
        outputs=returned,
        forward=forward,
        backward=backward,
        at=at,
        communication=walk.communication,
    )


def outside(program: Program) -> list[Storage]:
    """What is there before a step, by slot."""
    found = []
    for node in program.placeholders:
        size = math.prod(int(n) for n in node.meta["layout"].shape)
        found.append(Storage(size * node.meta["val"].element_size(), outside=True))
    return found


class Storage:
    """What values and their views share. What was there before the step is not counted."""

    def __init__(self, size: float, *, outside: bool = False):
        self.bytes, self.readers, self.outside = size, 0, outside


class Walk:
    """Runs graphs on storages in place of tensors, and follows how much of them lives.

    Attributes:
        live, highest: bytes now, and at most since it was set to zero; at: the module and the pass of that.
        communication: the largest payload of a collective so far.
        under_way: what the last reductions of gradients are given, which they may read until the next ones start.
    """

    def __init__(self, program: Program):
        self.mesh, self.ahead = program.mesh, program.plan.ahead > 0
        self.sizes: dict[str, Sizes] = {}
        self.live = self.highest = self.communication = 0.0
        self.at = ("", FORWARD)
        self.under_way: list[Any] = []

    def run(self, graph: fx.GraphModule, given: Sequence[Any], direction: str, name: str = "", used_up: bool = False) -> Any:
        """What a graph returns, which lives on; what it is given does too, unless it is used up."""
        sizes = self.sizes.setdefault(name.partition("_")[0], Sizes(self.mesh))
        values: dict[fx.Node, Any] = {}
        last = {x: node for node in graph.graph.nodes for x in node.all_input_nodes}
        arguments = iter(given)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
                if not used_up:
                    self.take(values[node])
                elif node not in last:
                    self.drop(values.pop(node))
                continue
            if node.op == "output":
                result = fx.map_arg(node.args[0], lambda n: values[n])
                self.take(result)
                for value in values.values():
                    self.drop(value)
                return result
            if node.op == "call_module":
                of: Any = getattr(graph, str(node.target))
                before, self.under_way = self.under_way, []
                values[node] = self.run(of, [values[a] for a in node.args], direction, str(node.target))
                if self.under_way:
                    self.drop(before)
                else:
                    self.under_way = before
            else:
                sizes.learn(node)
                values[node] = self._made(node, values, sizes)
                self.take(values[node])
                if self.ahead and unshards(name) and node.target is ops.reduce_scatter.overload:
                    self.under_way.append(values[node.all_input_nodes[0]])
                    self.take(self.under_way[-1])
            if self.live > self.highest:
                self.highest, self.at = self.live, (module_of(node), direction)
            for x in dict.fromkeys([*node.all_input_nodes, node]):
                if last.get(x, node) is node:
                    self.drop(values.pop(x))
        raise AssertionError("a graph ends with its output")

    def _made(self, node: fx.Node, values: dict[fx.Node, Any], sizes: Sizes) -> Any:
        """The result of an operator: its operand's storage for a view, a part of what has several, else storages of its own."""
        if "getitem" in str(node.target):
            return values[node.args[0]][node.args[1]]
        value = node.meta["val"]
        if is_view(node.target) and not _copied(node):
            base = values[node.all_input_nodes[0]]
            return [base] * len(value) if isinstance(value, (tuple, list)) else base
        if communicates(node):
            payload = sum(sizes.elements(x) * x.element_size() for x in (node.args[0].meta["val"], value))
            self.communication = max(self.communication, payload)
        if isinstance(value, (tuple, list)):
            return [Storage(self.size(x, sizes)) for x in value]
        return Storage(self.size(value, sizes))

    def size(self, value: Any, sizes: Sizes | None = None) -> float:
        """Bytes of a value; a size that is data has none."""
        if not isinstance(value, Tensor):
            return 0.0
        return (sizes or Sizes(self.mesh)).elements(value) * value.element_size()

    def take(self, value: Any) -> None:
        for storage in _leaves(value):
            self.live += storage.bytes if not storage.readers and not storage.outside else 0
            storage.readers += 1

    def drop(self, value: Any) -> None:
        for storage in _leaves(value):
            storage.readers -= 1
            self.live -= storage.bytes if not storage.readers and not storage.outside else 0

    def bytes(self, value: Any) -> float:
        """Bytes of the distinct storages of a value that were not there before."""
        return sum(s.bytes for s in {*_leaves(value)} if not s.outside)


def _leaves(value: Any) -> Iterable[Storage]:
    if isinstance(value, Storage):
        yield value
    elif isinstance(value, (tuple, list)):
        for x in value:
            yield from _leaves(x)


def _copied(node: fx.Node) -> bool:
    """Whether an operator that may be a view has to copy: a shape that the operand's strides do not allow."""
    x, value = node.all_input_nodes[0].meta["val"], node.meta["val"]
    if node.target is torch.ops.aten.contiguous.default:
        return not x.is_contiguous()
    if node.target is not torch.ops.aten.reshape.default:
        return False
    try:
        x.view(value.shape)
    except (RuntimeError, ValueError):
        return True
    return False
