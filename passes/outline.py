"""Outline: find repeated blocks, and let the main graph call them.

    embed; layer(x, w0); layer(x, w1); … ; head
becomes
    prologue(…); block(x, w0); block(x, w1); … ; epilogue(…)

so that everything after this pass is done once per distinct block. That a stretch of the graph is a repeat is checked on
the graph: the same operators on the same shapes with the same wiring, given gradients alike, of parameters that the plan lays
out alike. What differs between repeats becomes an argument. A stretch of which the plan has a part on another pipeline stage is
cut there.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils import _pytree as pytree

from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program
from foldcc.plan.interface import differentiated, losses


@dataclass(frozen=True)
class _Run:
    """`count` repeats of `period` nodes, from node `start` on."""

    start: int
    period: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Outline(Pass):
    """Attributes:
    smallest: nodes of the smallest block that is worth outlining.
    """

    requires = frozenset({"captured"})
    provides = frozenset({"outlined"})
    in_place = False
    smallest: int = 12

    def run(self, program: Program) -> Program:
        nodes = [n for n in program.graph.graph.nodes if n.op == "call_function"]
        parts = _Outliner(program, nodes).parts(self.smallest)
        wanted = losses(program) if program.wanted is None else program.wanted
        return replace(program, graph=_rebuild(program, nodes, parts), wanted=wanted)


class _Outliner:
    def __init__(self, program: Program, nodes: list[fx.Node]):
        self.nodes = nodes
        self.position = {n: i for i, n in enumerate(nodes)}
        self.kinds = {n: program.slot(n.name).kind for n in program.placeholders}
        self.differentiated = differentiated(program)
        said = {n: program.plan.parameters.get(program.slot(n.name).names[0]) for n in program.placeholders}
        self.said = {n: (layout.view, tuple(layout.states.items())) for n, layout in said.items() if layout is not None}
        self.stages = _stages(program, nodes)
        ids: dict[Any, int] = {}
        self.signature = np.array([ids.setdefault(self._signature(n), len(ids)) for n in nodes])

    def _signature(self, node: fx.Node) -> Any:
        """What a node computes, up to which values it reads."""
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        told = tuple(self._read(x) if isinstance(x, fx.Node) else (type(x), str(x)) for x in leaves)
        return (node.target, told, str(spec), _type(node))

    def _read(self, value: fx.Node) -> Any:
        return (_type(value), self.kinds.get(value), value in self.differentiated, self.said.get(value))

    def parts(self, smallest: int) -> list[_Run]:
        """What micro-batches share stands first, and alone; and no block is on two stages of which the plan says."""
        first = max((i + 1 for i, n in enumerate(self.nodes) if n.meta.get("count")), default=0)
        runs = self._on_one_stage(self._parts(first, len(self.nodes), smallest), smallest)
        return [*([_Run(0, first, 1)] if first else []), *runs]

    def _on_one_stage(self, runs: list[_Run], smallest: int) -> list[_Run]:
        found: list[_Run] = []
        for run in runs:
            at, end = self._next_stage(run), run.start + run.period * run.count
            parts = [run] if at is None else self._parts(run.start, at, smallest) + self._parts(at, end, smallest)
            found += parts if at is None else self._on_one_stage(parts, smallest)
        return found

    def _next_stage(self, run: _Run) -> int | None:
        """The first node of a run that reads a parameter of a later stage than its block does before."""
        for k in range(run.count):
            start = run.start + k * run.period
            read = [i for i in range(start, start + run.period) if self.stages[i] is not None]
            for i in read:
                if self.stages[i] != self.stages[read[0]]:
                    return i
        return None

    def _parts(self, start: int, stop: int, smallest: int) -> list[_Run]:
        """The stretch as runs: the longest repeat, and what stands before and after it."""
        best = self._best(start, stop, smallest)
        if best is None:
            return [_Run(start, stop - start, 1)] if stop > start else []
        end = best.start + best.period * best.count
        return [*self._parts(start, best.start, smallest), best, *self._parts(end, stop, smallest)]

    def _best(self, start: int, stop: int, smallest: int) -> _Run | None:
        candidates = []
        s = self.signature[start:stop]
        for period in range(smallest, (stop - start) // 2 + 1):
            same = np.concatenate([[False], s[:-period] == s[period:], [False]])
            edges = np.flatnonzero(same[1:] != same[:-1])
            for a, b in zip(edges[::2], edges[1::2], strict=True):
                count = (b - a) // period + 1
                if count >= 2:
                    candidates.append(((count - 1) * period, -period, start + int(a), int(count)))
        for _, period, first, count in sorted(candidates, reverse=True):
            found = self._confirmed(_Run(first, -period, count))
            if found is not None:
                return found
        return None

    def _confirmed(self, run: _Run) -> _Run | None:
        """The repeats of the run whose wiring is the same as the first one's."""
        count = 1
        while count < run.count and self._same_wiring(run, count):
            count += 1
        return replace(run, count=count) if count >= 2 else None

    def _same_wiring(self, run: _Run, k: int) -> bool:
        first, other = run.start, run.start + k * run.period
        for j in range(run.period):
            for x, y in zip(_inputs(self.nodes[first + j]), _inputs(self.nodes[other + j]), strict=True):
                i, o = self.position.get(x, -1) - first, self.position.get(y, -1) - other
                inside = 0 <= i < run.period
                if inside != (0 <= o < run.period) or (inside and i != o):
                    return False
        return True


def _stages(program: Program, nodes: list[fx.Node]) -> list[int | None]:
    """The pipeline stage of each node that reads a parameter, as far as the plan says it; stages ascend with the nodes."""
    said = {n: program.plan.stages.get(program.slot(n.name).names[0], ()) for n in program.placeholders}
    found: list[int | None] = []
    now = 0
    for node in nodes:
        places = [p for x in _inputs(node) for p in said.get(x, ()) if p >= now]
        now = min(places, default=now)
        found.append(now if places else None)
    return found


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [x for x in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, fx.Node)]


def _type(node: fx.Node) -> Any:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return tuple((tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else str(v) for v in values)


def _rebuild(program: Program, nodes: list[fx.Node], parts: list[_Run]) -> fx.GraphModule:
    old = program.graph.graph
    graph, root = fx.Graph(), torch.nn.Module()
    new: dict[fx.Node, fx.Node] = {}
    for node in program.placeholders:
        new[node] = graph.node_copy(node, lambda n: new[n])
    for number, run in enumerate(parts):
        name = f"block{number}"
        instances = [nodes[run.start + k * run.period : run.start + (k + 1) * run.period] for k in range(run.count)]
        formals, outputs = _interface(instances)
        setattr(root, name, _block(instances, formals, outputs))
        for k, instance in enumerate(instances):
            call = graph.create_node("call_module", name, tuple(new[f[k]] for f in formals))
            call.meta["val"] = tuple(instance[j].meta["val"] for j in outputs)
            call.meta["nodes"] = tuple(n.name for n in instance)  # of the captured graph, in the block's order
            for i, j in enumerate(outputs):
                item = graph.call_function(operator.getitem, (call, i))
                item.meta["val"] = instance[j].meta["val"]
                new[instance[j]] = item
    (result,) = (n for n in old.nodes if n.op == "output")
    graph.output(fx.map_arg(result.args[0], lambda n: new[n]))
    return _LazyGraphModule(root, graph)


def _interface(instances: list[list[fx.Node]]) -> tuple[list[tuple[fx.Node, ...]], list[int]]:
    """The arguments of a block, as one value per repeat each, and the positions of the nodes that it returns."""
    formals: dict[tuple[fx.Node, ...], None] = {}
    inside = [set(instance) for instance in instances]
    outputs: set[int] = set()
    for j, repeats in enumerate(zip(*instances, strict=True)):
        for values in zip(*map(_inputs, repeats), strict=True):
            if values[0] not in inside[0]:
                formals[values] = None
        if any(user not in inside[k] for k, node in enumerate(repeats) for user in node.users):
            outputs.add(j)
    return list(formals), sorted(outputs)


def _next(read: Iterator[fx.Node], _: fx.Node) -> fx.Node:
    return next(read)


def _block(instances: list[list[fx.Node]], formals: list[tuple[fx.Node, ...]], outputs: list[int]) -> fx.GraphModule:
    graph = fx.Graph()
    arguments: dict[tuple[fx.Node, ...], fx.Node] = {}
    for values in formals:
        node = graph.placeholder(values[0].name)
        node.meta = {"val": values[0].meta["val"]}
        arguments[values] = node
    new: dict[fx.Node, fx.Node] = {}
    for repeats in zip(*instances, strict=True):
        # Which value a node reads is told by all repeats: two that are one in the first may differ in another.
        read = [new.get(values[0]) or arguments[values] for values in zip(*map(_inputs, repeats), strict=True)]
        new[repeats[0]] = graph.node_copy(repeats[0], partial(_next, iter(read)))
    graph.output(tuple(new[instances[0][j]] for j in outputs))
    return _LazyGraphModule(torch.nn.Module(), graph)
