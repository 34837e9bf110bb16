"""Localize: from the global view to the program of one rank.

    y = reshard(x)  : [batch, seq@tp, hidden] -> [batch, seq, hidden] R(tp)    becomes    y = all_gather(x, 1, 1, "tp", "R")
    v = reshape(q, [8, 16, 4, 8])                                              becomes    v = reshape(q, [4, 16, 2, 8])
    b = reshard(a)  : [odd@dp+] -> [odd] R(dp), odd=7, dp=4                    becomes    b = all_gather(a, 0, 1, "dp", "R")[:7]

One graph serves every rank: shapes are local, and a rank's coordinates are values (`axis_index`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from foldcc import ops
from foldcc.ir.node import argument, argument_or, name_of
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program
from foldcc.layout import INVARIANT, PARTIAL, REPLICATED, VARYING, Layout, Shard, letter
from foldcc.ops.captured import Captured, Emit, captured_record
from foldcc.ops.groups import active
from foldcc.ops.layout import cross_fold, reshard
from foldcc.ops.moves import IN_TWO, MOVES, ORDER
from foldcc.ops.operator import positional
from foldcc.plan.local import Inserting
from foldcc.plan.strategies import divided
from foldcc.rules.kinds import shape_argument

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Localize(Pass):
    requires = frozenset({"stored"})
    provides = frozenset({"localized"})

    def run(self, program: Program) -> Program:
        for block in program.blocks.values():
            given = (n.meta["val"].device for n in block.graph.find_nodes(op="placeholder"))
            inserting = Inserting(program.mesh, next(given, torch.device("cpu")))
            for node in list(block.graph.nodes):
                if node.op == "call_function":
                    _localize(node, _emitter(inserting, node))
            block.graph.eliminate_dead_code()
            block.recompile()
            with active(program.mesh):
                _settle(block)
        known = {id(x.sizes): x.sizes for _, n in program.nodes() if isinstance(x := n.meta.get("layout"), Layout)}
        return replace(program, sizes={f: size for sizes in (program.sizes, *known.values()) for f, size in sizes.items()})


def _settle(block: fx.GraphModule) -> None:
    """`node.meta["val"]` becomes what one rank holds; sizes that are data become symbols."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        values: dict[fx.Node, Any] = {}
        for node in block.graph.nodes:
            if node.op == "placeholder":
                like = node.meta["val"]
                values[node] = torch.empty(node.meta["layout"].shape, dtype=like.dtype, device=like.device)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = node.target(*args, **kwargs)
            else:
                continue
            node.meta["val"] = values[node]


def _emitter(inserting: Inserting, node: fx.Node) -> Emit:
    def emit(target: Any, args: tuple[Any, ...], layout: Layout, **kwargs: Any) -> fx.Node:
        new = inserting.before(node, target, args, layout, **kwargs)
        new.meta["val"] = inserting.whole(new)
        return new

    return emit


def _localize(node: fx.Node, emit: Emit) -> None:
    if node.target is cross_fold:
        node.args = node.args[:1]
    elif node.target is reshard:
        _replace(node, _moved(emit, node))
    elif (known := captured_record(node.target)).local is not None:
        _become(node, emit, known)
    elif node.target in LOWERINGS:
        LOWERINGS[node.target](node, emit)
    elif "rule" in node.meta and (position := shape_argument(node.target)) is not None:
        node.args = (*node.args[:position], list(node.meta["layout"].shape), *node.args[position + 1 :])


def _replace(node: fx.Node, new: fx.Node) -> None:
    new.meta["layout"] = node.meta["layout"]
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _become(node: fx.Node, emit: Emit, known: Captured) -> None:
    """What stands in a captured node's place, on this rank, under its name."""
    new = known.lowered(emit, node, divided(node))
    if new is None:
        node.target = known.local
        return
    node.target, node.args, node.kwargs = new.target, new.args, new.kwargs
    del node.meta["rule"]
    node.graph.erase_node(new)


# --- changes of layout -------------------------------------------------------------------------------------------------


def _moved(emit: Emit, node: fx.Node) -> fx.Node:
    """The collectives that bring a value from its layout to the wanted one: make whole, change types, divide."""
    x: fx.Node = node.args[0]
    now, wanted = x.meta["layout"], node.args[1]
    changed = _changed(now, wanted)
    pairs = {a: (letter(now.states[a]), letter(wanted.states[a])) for a in changed}
    if set(pairs.values()) == {(VARYING, VARYING)}:
        return _exchanged(emit, x, wanted, changed)
    same = set() if node.meta["grad"] else {(REPLICATED, INVARIANT), (INVARIANT, REPLICATED)}
    moves = {**MOVES, (VARYING, VARYING): IN_TWO}
    left = {a: [] if pair in same else list(moves[pair]) for a, pair in pairs.items()}
    for family in ORDER:
        groups: dict[Any, list[str]] = {}
        for axis in reversed(changed) if family == (ops.all_gather,) else changed:
            if left[axis] and left[axis][0][0] in family:
                operator, after = left[axis].pop(0)
                alone = isinstance(now.states[axis], Shard) or after == VARYING  # it is cut or joined along a dimension
                groups.setdefault((operator, letter(now.states[axis]), after, alone and axis), []).append(axis)
        for (operator, src, dst, alone), axes in groups.items():
            before, states = now, {a: wanted.states[a] if dst == VARYING else dst for a in axes}
            now = replace(now, states={**now.states, **states})
            told: dict[str, Any] = {"axes": ",".join(axes), "src": src, "dst": dst}
            if alone:
                divided = now if dst == VARYING else before
                told |= {"dim": divided.states[alone].dim, "outer": divided.outer(alone)}
            full = operator is ops.all_gather and alone and before.rest(told["dim"]) is not None
            whole = replace(before.filled(told["dim"]), states=now.states) if full else now
            x = emit(operator, positional(operator.overload, {"x": x, **told}), whole)
            if full:
                x = emit(aten.slice.Tensor, (x, told["dim"], 0, now.shape[told["dim"]]), now)
    return x


def _exchanged(emit: Emit, x: fx.Node, wanted: Layout, axes: list[str]) -> fx.Node:
    """A value that is divided in other dimensions, or in another order of axes: one step for all of them."""

    def cuts(layout: Layout) -> tuple[list[int], list[int]]:
        """Which dimension each axis divides, and the blocks before it, one axis after the other."""
        dims, outers = [], []
        partly = replace(layout, states={**layout.states, **dict.fromkeys(axes, INVARIANT)})
        for axis in axes:
            state = layout.states[axis]
            assert isinstance(state, Shard)
            partly = partly.with_state(axis, state)
            dims.append(state.dim)
            outers.append(partly.outer(axis))
        return dims, outers

    return emit(ops.exchange, (x, ",".join(axes), *cuts(x.meta["layout"]), *cuts(wanted)), wanted)


def _changed(now: Layout, wanted: Layout) -> list[str]:
    """The axes on which a value moves, slowest first: those that differ, and those whose parts lie within parts of these."""
    found = {a for a in wanted.states if now.states[a] != wanted.states[a]}
    axes = list(wanted.states)
    for outer in [a for a in axes if a in found]:
        parts = [s for s in (now.states[outer], wanted.states[outer]) if isinstance(s, Shard)]
        for inner in axes[axes.index(outer) + 1 :]:
            mine = now.states[inner]
            if isinstance(mine, Shard) and any(
                s.dim == mine.dim and s.start < mine.stop and mine.start < s.stop for s in parts
            ):
                found.add(inner)
    return [a for a in axes if a in found]


# --- operators whose local form differs ---------------------------------------------------------------------------------


def _axes_of(layout: Layout, dim: int) -> list[str]:
    return [a for a, s in layout.states.items() if isinstance(s, Shard) and s.dim == dim]


def _mean(node: fx.Node, emit: Emit) -> None:
    """The mean of a divided dimension is the sum of what each rank has, over the global count."""
    x: fx.Node = node.args[0]
    layout: Layout = node.meta["layout"]
    if set(layout.axes(PARTIAL)) <= set(x.meta["layout"].axes(PARTIAL)):
        return
    count = prod(x.meta["layout"].global_shape) // max(1, prod(layout.global_shape))
    dim, keep = argument_or(node, "dim"), argument_or(node, "keepdim") or False

    if dim:
        total = emit(aten.sum.dim_IntList, (x, dim, keep), layout)
    else:
        total = emit(aten.sum.default, (x,), layout)
    _replace(node, emit(aten.div.Tensor, (total, count), layout))


def _slice(node: fx.Node, emit: Emit) -> None:
    """A piece of a product of pieces, when the piece is divided."""
    x: fx.Node = node.args[0]
    dim = argument(node, "dim") % len(x.meta["layout"].dims)
    if not _axes_of(x.meta["layout"], dim):
        return
    whole, local = x.meta["layout"].global_shape[dim], x.meta["layout"].shape[dim]
    start, stop = argument(node, "start") or 0, argument(node, "end")
    start = max(start + whole, 0) if start < 0 else start
    stop = whole if stop is None or stop > whole else stop + whole if stop < 0 else stop
    node.args = (x, dim, start * local // whole, stop * local // whole, argument(node, "step"))
    node.kwargs = {}


def _split(node: fx.Node, emit: Emit) -> None:
    x: fx.Node = node.args[0]
    dim = argument(node, "dim") % len(x.meta["layout"].dims)
    whole, local = x.meta["layout"].global_shape[dim], x.meta["layout"].shape[dim]
    if whole == local:
        return
    sizes: Any = node.args[1]
    if name_of(node.target) != "aten.chunk":
        sizes = sizes * local // whole if isinstance(sizes, int) else [n * local // whole for n in sizes]
    node.args = (x, sizes, dim)
    node.kwargs = {}


LOWERINGS: dict[Any, Callable[[fx.Node, Emit], None]] = {
    aten.mean.dim: _mean,
    aten.mean.default: _mean,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
}
