"""Store: parameters are unsharded into what a block uses in a block of their own, whose transpose reduces their gradients.

    y = block1(x, w)        w [h, i@tp] I(dp)        becomes        v = unshard1(w)        v [h, i@tp] R(dp)
                                                                    y = block1(x, v)

Backward, `unshard1` is the reduction: it is given terms of a sum over dp, as its results are R, and leaves the sum. So what a
rank keeps of a parameter is said in one place; when it is unsharded, and when its gradient is reduced, is when a block runs:
right before the block that uses it, and right behind its backward pass. A parameter that several calls use is unsharded for
the first of them on each pipeline stage, and its gradient is reduced once there. If all that the block does with it then is to
cast it, so does `unshard1`.

With ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), or where the plan says how a parameter is stored, it is kept divided over
the axis that replicates it otherwise: `w [h@dp, i@tp]`. `unshard1` is then an all-gather, and its transpose a reduce-scatter.
Where the ranks do not divide a size, the last of them have less: `b [h@dp+]` (`foldcc/layout.py`).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from foldcc.ir.pipeline import Pass
from foldcc.ir.plan import UnfitPlan
from foldcc.ir.program import UNSHARD, Program, staged
from foldcc.ir.rewrite import provenance
from foldcc.layout import INVARIANT, PARTIAL, Layout, Shard, Symbol
from foldcc.mesh import STORE
from foldcc.ops.layout import reshard
from foldcc.plan.strategies import runs
from foldcc.runtime.placement import BLOCKS_ARE_JOINED

aten = torch.ops.aten

Made = tuple[fx.Node, Layout, int | None]  # a parameter, as it is used, on a pipeline stage


@dataclass(frozen=True)
class Step:
    """How a parameter comes to a block.

    Attributes:
        parameter: a placeholder of the main graph.
        stored, used: its layouts there and in the block.
        like: what in the block it is instead of: the reshard that all of the block reads it by, or the cast that all of it
            reads that by, or the argument itself.
    """

    parameter: fx.Node
    stored: Layout
    used: Layout
    like: fx.Node

    @property
    def kind(self) -> tuple[Layout, Layout, fx.Node]:
        """What is the same for all calls of a block that are given other parameters."""
        return self.stored, self.used, self.like


@dataclass(frozen=True, kw_only=True)
class Store(Pass):
    requires = frozenset({"dispatched"})
    provides = frozenset({"stored"})

    def run(self, program: Program) -> Program:
        stored = _stored(program)
        steps = {call: _steps(program, call, stored) for call in program.calls}
        unshard = _Unshard(program.graph, Counter(_made(call, s) for call, found in steps.items() for s in found.values()))
        for call, found in steps.items():
            unshard.before(call, list(found.values()))
            args = {i: unshard.made[_made(call, s)] for i, s in found.items()}
            call.args = tuple(args.get(i, a) for i, a in enumerate(call.args))
        for like in dict.fromkeys(s.like for found in steps.values() for s in found.values()):
            _use(like)
        names, said = {n: program.slot(n.name).names[0] for n in stored}, program.plan.stored
        other = {names[n]: x for n, x in stored.items() if x != n.meta["layout"] or names[n] in said}
        for node, layout in stored.items():
            node.meta["layout"] = layout
        sizes = {f: n for x in other.values() for f, n in x.sizes.items()}
        return replace(program, plan=replace(program.plan, stored=other), sizes={**program.sizes, **sizes})


def _made(call: fx.Node, step: Step) -> Made:
    """What is the same for calls that can share the result of a step."""
    return step.parameter, step.used, call.meta.get("stage")


def _stored(program: Program) -> dict[fx.Node, Layout]:
    """The layout in which a rank holds each parameter: as the plan says, else divided with ZeRO, else as it is used."""
    found = {}
    for node in program.placeholders:
        slot, used = program.slot(node.name), node.meta["layout"]
        if slot.kind == "parameter":
            said, whole = program.plan.stored.get(slot.names[0]), _terms(program, node)
            if said is not None:
                found[node] = _said(slot.names[0], said, used, whole)
            else:
                found[node] = _divided(used, whole) if program.plan.zero else used
    return found


def _terms(program: Program, parameter: fx.Node) -> set[str]:
    """The axes on which a block uses a parameter as one term of a sum, for which a rank has to have all of it."""
    found: set[str] = set()
    for call in parameter.users:
        formals = list(program.blocks[str(call.target)].graph.find_nodes(op="placeholder"))
        for i, actual in enumerate(call.args):
            if actual is parameter:
                found |= {*_used(_like(program, str(call.target), i, formals[i])).axes(PARTIAL)}
    return found


def _divided(used: Layout, whole: Collection[str]) -> Layout:
    """The layout in which each data axis but those in `whole` leaves a rank as little of a parameter as it can."""
    stored = used
    for axis in STORE[used.view]:
        there = [] if axis in whole else _possible(stored, axis, used)
        stored = min(there, key=_elements, default=stored)
    return stored


def _possible(stored: Layout, axis: str, used: Layout) -> list[Layout]:
    """The layouts in which one more axis divides a parameter, which holds it whole where it is used.

    Two data axes divide one dimension evenly, from its beginning on. Of a dimension that an axis divides where it is used, one
    more divides what that leaves, where PyTorch can join such parts. What is cut in blocks otherwise, or twice, is put together
    wrongly by DTensor (seen with torch 2.13).
    """
    if used.states.get(axis) != INVARIANT:
        return []
    even, filled, behind = [], [], []
    for dim in range(len(stored.dims)):
        there = {a: s for a, s in stored.states.items() if isinstance(s, Shard) and s.dim == dim}
        if not there:
            filled.append(stored.with_state(axis, Shard(dim, 0, len(stored.dims[dim]), filled=True)))
        if any(s.filled for s in there.values()):
            continue
        if not any(used.states[a] == s for a, s in there.items()):
            sizes: list[Any] = stored._local(dim)
            cut = [Shard(dim, *run) for run in runs(sizes, stored.ranks[axis])]
            even += [stored.with_state(axis, s) for s in cut if all(s.start == o.start == 0 for o in there.values())]
        elif BLOCKS_ARE_JOINED and len(there) == 1 and next(iter(there.values())).start == 0:
            behind.append(_behind(stored, axis, dim, *there))
    return [x for x in (*even, *filled, *behind) if _elements(x) < _elements(stored)]


def _behind(stored: Layout, axis: str, dim: int, by: str) -> Layout:
    """A layout in which an axis divides what another one leaves of a dimension that it divides from its beginning on.

    A factor that is divided in part becomes a product: of the ranks' parts, and of what each has of them.
    """
    state = stored.states[by]
    assert isinstance(state, Shard)
    factor, left = stored.dims[dim][state.stop - 1], int(stored._local(dim)[state.stop - 1])
    if left > 1:
        sizes = {by: stored.sizes[factor] // left, f"per_{by}": left}
        parts = {Symbol(f"{factor.name}_{name}", integer=True, positive=True): n for name, n in sizes.items()}
        product = (*stored.dims[dim][: state.stop - 1], *parts, *stored.dims[dim][state.stop :])
        dims = tuple(product if d == dim else each for d, each in enumerate(stored.dims))
        stored = replace(stored, dims=dims, sizes={**stored.sizes, **parts})
    return stored.with_state(axis, Shard(dim, state.stop, len(stored.dims[dim]), filled=True))


def _elements(layout: Layout) -> int:
    return prod(int(n) for n in layout.shape)


def _said(name: str, said: Layout, used: Layout, whole: Collection[str]) -> Layout:
    """The layout of a parameter that is stored as the plan says: as it is used, or divided over axes that replicate it."""
    stored = used
    for axis in [a for a in used.states if a in said.states] + [a for a in said.states if a not in used.states]:
        possible = [] if axis in whole else _possible(stored, axis, used)
        if said.states[axis] != used.states.get(axis):
            there = [x for x in possible if x.states[axis] == said.states[axis]]
            if not there:
                raise UnfitPlan(
                    f"The plan's {name} cannot be stored so on {axis}={used.ranks.get(axis, 1)}.",
                    plan=said,
                    used=used,
                    valid="\n".join(map(str, possible)) or used,
                )
            stored = there[0]
    return stored


def _steps(program: Program, call: fx.Node, stored: dict[fx.Node, Layout]) -> dict[int, Step]:
    """By the position of an argument of a call, how a parameter comes to it, where it is not used as it is stored."""
    found = {}
    block = program.blocks[str(call.target)]
    for i, (actual, formal) in enumerate(zip(call.args, block.graph.find_nodes(op="placeholder"), strict=True)):
        if actual in stored:
            like = _like(program, str(call.target), i, formal)
            if (
                stored[actual] != _used(like) or stored[actual] != formal.meta["layout"]
            ):  # which may be what the block makes of it
                found[i] = Step(actual, stored[actual], _used(like), like)
    return found


def _like(program: Program, block: str, position: int, formal: fx.Node) -> fx.Node:
    """The one reshard by which a block reads an argument that is a parameter in each call, and then the one cast, if any.

    A parameter that is read elsewhere too is cast where it is used, so that its gradient is reduced once.
    """
    given: list[Any] = [call.args[position] for call in program.calls if call.target == block]
    if any(x.op != "placeholder" or program.slot(x.name).kind != "parameter" for x in given):
        return formal
    readers = {(str(call.target), i) for x in given for call in x.users for i, a in enumerate(call.args) if a is x}
    steps = [*([reshard] if formal.meta["grad"] else []), *([aten._to_copy.default] if len(readers) == 1 else [])]
    found = formal
    for target in steps:
        reader = next(iter(found.users)) if len(found.users) == 1 else found
        found = reader if reader.target is target else found
    return found


def _used(like: fx.Node) -> Layout:
    """The layout in which a block uses a parameter."""
    layout: Layout = like.meta["layout"]
    return layout


def _chain(like: fx.Node) -> list[fx.Node]:
    """What a block does with an argument up to what a step is instead of, the argument first."""
    found = [like]
    while found[0].op != "placeholder":
        found = [*found[0].all_input_nodes, *found]
    return found


def _value(like: fx.Node) -> torch.Tensor:
    """What a block makes of an argument, as a fake tensor of global shape."""
    given: torch.Tensor = _chain(like)[0].meta["val"]
    return given.to(like.kwargs.get("dtype", given.dtype))


def _use(like: fx.Node) -> None:
    """The argument of a block comes as what it would be made there: in another layout, in another dtype."""
    formal, *made = _chain(like)
    formal.meta |= {"val": _value(like), "layout": _used(like)}
    like.replace_all_uses_with(formal)
    for node in reversed(made):
        node.graph.erase_node(node)


class _Unshard:
    """Inserts calls of blocks that bring parameters to the layouts in which they are used.

    Attributes:
        readers: by parameter, layout and stage, how many calls use it so.
        made: by the same, the value in the main graph.
        names: by the kinds of some steps, the block that makes them.
    """

    def __init__(self, main: fx.GraphModule, readers: Counter[Made]):
        self.main, self.readers = main, readers
        self.made: dict[Made, fx.Node] = {}
        self.names: dict[tuple[Any, ...], str] = {}

    def before(self, call: fx.Node, steps: list[Step]) -> None:
        """Makes steps in front of a call, those that later calls use too by a block of their own."""
        for several in (False, True):
            new = {_made(call, s): s for s in steps if _made(call, s) not in self.made}
            some = [s for made, s in new.items() if (self.readers[made] > 1) == several]
            if some:
                self._call(call, some)

    def _call(self, before: fx.Node, steps: list[Step]) -> None:
        name = self.names.setdefault(tuple(s.kind for s in steps), f"{UNSHARD}{len(self.names)}")
        if not hasattr(self.main, name):
            setattr(self.main, name, _LazyGraphModule(torch.nn.Module(), _graph(steps)))
        with self.main.graph.inserting_before(before):
            call = self.main.graph.call_module(name, tuple(s.parameter for s in steps))
            call.meta = {"val": tuple(_value(s.like) for s in steps), **staged(before)}
            for k, s in enumerate(steps):
                item = self.main.graph.call_function(operator.getitem, (call, k))
                item.meta = {"val": _value(s.like), "layout": s.used, **{key: s.like.meta[key] for key in ("dims", "grad")}}
                self.made[_made(before, s)] = item


def _graph(steps: list[Step]) -> fx.Graph:
    """The steps alone, each of an argument."""
    graph = fx.Graph()
    formals = []
    for s in steps:
        source = _chain(s.like)[0]
        formals.append(graph.placeholder(source.name))
        formals[-1].meta = {**source.meta, "layout": s.stored}
    left = []
    for s, formal in zip(steps, formals, strict=True):
        source, reader = _chain(s.like)[0], s.like if s.like.op != "placeholder" else next(iter(s.like.users), s.like)
        left.append(graph.call_function(reshard, (formal, s.used)))
        left[-1].meta = {**{k: source.meta[k] for k in ("val", "dims", "grad")}, **provenance(reader), "layout": s.used}
        if s.like.target is aten._to_copy.default:
            left[-1] = graph.call_function(s.like.target, (left[-1],), s.like.kwargs)
            left[-1].meta = dict(s.like.meta)
    graph.output(tuple(left))
    return graph
