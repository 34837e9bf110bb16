"""A program that is too large to run, made small: the same graph over smaller factors, and two calls of a repeated block.

    b=256 s=4096 heads=128 …  61 layers        becomes        b=32 s=16 heads=16 …  2 layers of each kind

Only sizes change: every node, every layout and every collective stays, so what is proved of the small program is proved
of the graph. A factor that is divided keeps a multiple of the ranks that divide it. A factor whose positions are data,
such as the experts, keeps its size. Factors that one operator cuts into unequal pieces shrink by one ratio.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Set
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from sympy import Symbol
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from foldcc.errors import FoldError
from foldcc.ir.node import argument, name_of, operands
from foldcc.ir.pipeline import Stage, Stages, run_passes
from foldcc.ir.program import Program, where
from foldcc.layout import Layout, Shard
from foldcc.mesh import FoldedMesh
from foldcc.ops.captured import Positions, captured_record
from foldcc.ops.layout import reshard
from foldcc.ops.operator import positional
from foldcc.rules.kinds import shape_argument
from foldcc.verification.fewer_ranks import on_mesh
from foldcc.verification.same import vanishes

aten = torch.ops.aten
Sizes = dict[Symbol, int]
CALLS = 2  # of a block that repeats: one may feed the next
_LEAST = (2, 8, 32, 128)  # positions of a factor that are left, if fewer do not do
_SMALL = 4  # factors up to here, and offsets such as the label's shift by one, are part of the program's structure
_PIECES = {"aten.slice", "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.cat", "aten.slice_scatter", "aten.narrow"}
_CHOSEN = {"aten.topk", "aten.sort", "aten.argsort", "aten.one_hot", "aten.histc", "aten.scatter", "aten.gather"}


def reduced(stages: Stages, mesh: FoldedMesh | None = None) -> Stages:
    """The stages of a program, from `shard` on, over smaller factors and with fewer calls of repeated blocks.

    Args:
        mesh: another one, with the same axes.

    Raises:
        FoldError: an operator's sizes cannot be told from its operands' factors.
    """
    made = stages[-1].program.plan  # what depends on sizes is chosen as in the actual program
    sharded: Program = stages["shard"].program
    said = {part: getattr(made, part) for part in ("stored", "kept", "together", "waits", "stages")}
    sharded = replace(sharded, plan=replace(sharded.plan, **said))
    degrees = _degrees(sharded)
    alone = {f for f, n in sharded.sizes.items() if n == degrees.get(f, 1)}
    sharded = sharded if mesh is None else on_mesh(sharded, mesh)
    captured, sizes = _smallest(_shortened(stages["annotate"].program), sharded, alone)
    start = _resized(_shortened(sharded), sizes)
    later = run_passes(start, stages.lowered.passes(after="shard"))
    names = ("capture", "outline", "annotate")
    return Stages([*(Stage(n, 0.0, 0, 0, captured) for n in names), Stage("shard", 0.0, 0, 0, start), *list(later)[1:]])


def _smallest(captured: Program, sharded: Program, alone: Set[Symbol]) -> tuple[Program, Sizes]:
    """The captured program over the smallest sizes that its operators take, and those sizes.

    A dimension that is longer than 1 stays so, as after many convolutions of few places, if some sizes leave it so.
    """
    found: tuple[Program, Sizes] | None = None
    tried: list[Sizes] = []
    for least, pieces in product(_LEAST, (True, False)):
        sizes = smaller(sharded, alone, pieces=pieces, least=least)
        if sizes in tried:
            continue
        tried.append(sizes)
        try:
            made = _resized(captured.copied(), sizes), sizes
        except FoldError as error:
            why = error
            continue
        if not vanishes(captured, made[0]):
            return made
        found = found or made
    if found is None:
        raise why
    return found


# --- fewer calls ---


def _shortened(program: Program) -> Program:
    """Keeps `CALLS` calls of each block; what a later call returned is what the last one that is kept returns."""
    program = program.copied()
    graph = program.graph.graph
    kept: dict[str, list[fx.Node]] = {}
    for call in program.calls:
        calls = kept.setdefault(str(call.target), [])
        if len(calls) < CALLS:
            calls.append(call)
            continue
        results = {u.args[1]: u for u in calls[-1].users}
        for user in list(call.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(call)
    unused = {n.name for n in program.placeholders if not n.users and program.slot(n.name).kind != "input"}
    for node in program.placeholders:
        if node.name in unused:
            graph.erase_node(node)
    program.graph.recompile()
    updates = {i: name for i, name in program.updates.items() if name not in unused}
    return replace(program, slots=tuple(s for s in program.slots if s.name not in unused), updates=updates)


# --- smaller factors ---


def smaller(program: Program, alone: Set[Symbol], *, pieces: bool = True, least: int = _LEAST[0]) -> Sizes:
    """A small size for each factor that the main graph's placeholders have; the others follow from them.

    Args:
        alone: factors of which a rank has one position in the full program.
        pieces: factors that are cut into unequal pieces shrink too, all by one ratio.
        least: of an input's factor that nothing divides, so many positions are left.
    """
    degrees = _degrees(program)
    entering = {f for n in program.placeholders for dim in n.meta["dims"] for f in dim}
    pinned = _pinned(program)
    found: Sizes = {}
    taken: Counter[int] = Counter()
    for members in _coupled(program):
        there = sorted((f for f in members if f in entering), key=lambda f: f.name)
        there = [f for f in there if program.sizes[f] > 2]  # two halves are two halves
        sizes = [program.sizes[f] for f in there]
        ratio = 1
        if pieces and sizes and not any(f in pinned for f in members):
            ratio = max(r for r in _divisors(math.gcd(*sizes)) if _fits(sizes, [degrees.get(f, 1) for f in there], r))
        found |= {f: program.sizes[f] // (ratio if f in there else 1) for f in members & entering}
    shared: Sizes = {}  # inputs of one length, such as tokens and their labels, keep one length
    tokens = _tokens(program)  # which nearly all values have, so that they choose first
    for f in sorted(entering - found.keys(), key=lambda f: (f not in tokens, f.name)):
        size, degree = program.sizes[f], degrees.get(f, 1)
        alike = [g for g in tokens if f in tokens and program.sizes[g] == size]
        degree = math.lcm(degree, *(degrees.get(g, 1) for g in alike))
        # A rank has one position of a factor only where it has one in the full program: PyTorch treats that case apart.
        first = least if degree == 1 and f in tokens else _LEAST[0]
        choices = [degree] if f in alone or size == degree else [degree * m for m in range(first, first + _SMALL)]
        found[f] = size if f in pinned or size <= max(_SMALL, first) else min(choices, key=lambda n: (taken[n], n))
        for g in alike:
            found[f] = shared.setdefault(g, found[f])
        taken[found[f]] += 1
    return found


def _tokens(program: Program) -> set[Symbol]:
    """The factors of the inputs."""
    inputs = [n for n in program.placeholders if program.slot(n.name).kind == "input"]
    return {f for n in inputs for dim in n.meta["dims"] for f in dim}


def _degrees(program: Program) -> Counter[Symbol]:
    """Over how many ranks each factor is divided, anywhere."""
    found: Counter[Symbol] = Counter()
    nodes = [*program.placeholders, *(n for _, n in program.nodes())]
    for layout in [*(n.meta.get("layout") for n in nodes), *program.plan.stored.values()]:
        if isinstance(layout, Layout):
            whole, local = _by_factor(layout, False), _by_factor(layout, True)
            zigzag = {layout.dims[s.dim][s.start] for s in layout.states.values() if isinstance(s, Shard) and s.zigzag}
            for f, n in whole.items():
                degree = n // local[f] if n else 1  # nothing is there of a factor of size 0
                found[f] = max(found[f], degree * (2 if f in zigzag else 1))  # a rank has two blocks
    for _, node in program.nodes():
        for letter, axis in captured_record(node.target).placed.items():
            found |= dict.fromkeys(node.meta["letters"].get(letter, ()), program.mesh.size(axis))
    return found


def _factors(node: fx.Node, letters: Collection[str]) -> list[tuple[Symbol, ...]]:
    """The factors of each letter of a node's rule."""
    return [node.meta.get("letters", {}).get(x, ()) for x in letters]


def _by_factor(layout: Layout, local: bool) -> dict[Symbol, int]:
    sizes: dict[Symbol, int] = {}
    for d, dim in enumerate(layout.dims):
        for f, n in zip(dim, layout._local(d) if local else [layout.sizes[f] for f in dim], strict=True):
            assert isinstance(n, int)
            sizes[f] = min(n, sizes.get(f, n))
    return sizes


def _pinned(program: Program) -> set[Symbol]:
    """Factors that keep their sizes. Of most, positions are data: experts, what is chosen from, what constants are made for."""
    found = {f for n in program.placeholders if program.slot(n.name).kind == "constant" for dim in n.meta["dims"] for f in dim}
    for _, node in program.nodes():
        known = captured_record(node.target)
        widths = _factors(node, known.alike)
        found = found.union(*_factors(node, known.pinned))
        if any(all(program.sizes[f] <= 2 for f in width) for width in widths):  # too narrow to shrink with the others
            found = found.union(*widths)
        if node.op == "call_function" and name_of(node.target) in _CHOSEN:
            source = operands(node)[0]
            if source is not None and source.meta["dims"]:
                dim = node.args[1] if name_of(node.target) not in ("aten.topk", "aten.one_hot", "aten.histc") else -1
                found |= set(source.meta["dims"][dim if isinstance(dim, int) else -1])
    return found - _tokens(program)


def _coupled(program: Program) -> list[set[Symbol]]:
    """Factors that operators cut from, or join to, one dimension in unequal pieces."""
    groups: list[set[Symbol]] = []
    for _, node in program.nodes():
        members: set[Symbol] = set().union(*_factors(node, captured_record(node.target).alike))
        if node.op == "call_function" and name_of(node.target) in _PIECES:
            members = _pieces(node)
        if members:
            near = [g for g in groups if g & members]
            groups = [g for g in groups if not g & members] + [members.union(*near)]
    return groups


def _pieces(node: fx.Node) -> set[Symbol]:
    """The factors of a dimension that is cut into pieces, and of the pieces, where they are not the same."""
    dim = _dim(node)
    values = [x for x in [*operands(node), *_results(node)] if x is not None and x.meta.get("dims") is not None]
    dims = [x.meta["dims"][dim] for x in values if len(x.meta["dims"]) > dim]
    shifts = name_of(node.target) == "aten.slice" and _shifts(node, node.all_input_nodes[0].meta["val"].shape[dim])
    return set() if shifts or len(set(dims)) == 1 else {f for d in dims for f in d}


def _shifts(node: fx.Node, size: int) -> bool:
    """Whether a slice of a dimension only leaves out a few positions at an end, as the shift of labels does."""
    start, stop = argument(node, "start") or 0, argument(node, "end")
    left_out = 0 if stop is None else max(0, size - stop) if stop >= 0 else -stop
    return argument(node, "step") in (None, 1) and 0 <= start <= _SMALL and left_out <= _SMALL and size > 2 * _SMALL


def _dim(node: fx.Node) -> int:
    found = argument(node, "dim") or 0
    first = node.all_input_nodes[0].meta["val"]
    return int(found) % first.dim()


def _results(node: fx.Node) -> list[fx.Node]:
    return [u for u in node.users if "getitem" in str(u.target)] if node.meta.get("dims") is None else [node]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] if n < 10**6 else [1]


def _fits(sizes: list[int], degrees: list[int], ratio: int) -> bool:
    return ratio == 1 or all(n // ratio >= 2 * d and n // ratio % d == 0 for n, d in zip(sizes, degrees, strict=True))


# --- the same graph over them ---


def _resized(program: Program, sizes: Sizes) -> Program:
    """The program with other sizes of factors: in shapes, in layouts, and in the arguments of operators."""
    program = replace(program, sizes=dict(sizes))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        _Resizer(program).run()
    return program


class _Resizer:
    """Rewrites a program in place, in the order in which it runs, so that every node sees its operands' new sizes."""

    def __init__(self, program: Program):
        self.program, self.sizes = program, program.sizes
        self.done: set[fx.Node] = set()
        self.before = {n: n.meta["val"].shape for _, n in program.nodes() if isinstance(n.meta.get("val"), Tensor)}

    def run(self) -> None:
        values: dict[fx.Node, Any] = {}
        for node in self.program.graph.graph.nodes:
            if node.op == "placeholder":
                node.meta["val"] = values[node] = self._empty(node)
            elif node.op == "call_module":
                values[node] = self._block(getattr(self.program.graph, str(node.target)), [values[a] for a in node.args])
            elif node.op == "call_function":
                values[node] = node.meta["val"] = values[node.args[0]][node.args[1]]
            self._layouts(node)
        for _, node in self.program.nodes():
            self._layouts(node)
        for block in self.program.blocks.values():
            block.recompile()

    def _empty(self, node: fx.Node) -> Tensor:
        like = node.meta["val"]
        shape = [math.prod(self.sizes[f] for f in dim) for dim in node.meta["dims"]]
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def _layouts(self, node: fx.Node) -> None:
        layout = node.meta.get("layout")
        if isinstance(layout, Layout):
            node.meta["layout"] = replace(layout, sizes=self.sizes)
        if node.target is reshard:
            wanted: Any = node.args[1]
            node.args = (node.args[0], replace(wanted, sizes=self.sizes))

    def _block(self, block: fx.GraphModule, given: list[Any]) -> Any:
        """Gives the nodes of a block their new arguments and values, and returns what it returns."""
        values: dict[fx.Node, Any] = {}
        entering = iter(given)
        for node in block.graph.nodes:
            if node.op == "placeholder":
                values[node] = node.meta["val"] = next(entering)
            elif node.op == "output":
                return fx.map_arg(node.args[0], values.__getitem__)
            else:
                if node not in self.done:
                    self.done.add(node)
                    self._rewrite(node)
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                try:
                    values[node] = node.meta["val"] = node.target(*args, **kwargs)
                except RuntimeError as error:
                    raise _unknown(node, str(error)) from None
                self._learn(node)
        raise AssertionError("a graph ends with its output")

    def _learn(self, node: fx.Node) -> None:
        """The sizes of factors that appear first in a result; those that are known must agree with it."""
        value = node.meta["val"]
        if not isinstance(value, Tensor) or node.meta.get("dims") is None:
            return
        for dim, size in zip(node.meta["dims"], value.shape, strict=True):
            missing = [f for f in dim if f not in self.sizes]
            known = math.prod(self.sizes[f] for f in dim if f in self.sizes)
            if len(missing) == 1 and size % known == 0:
                self.sizes[missing[0]] = int(size) // known
            elif missing or known != size:
                told = " ".join(f"{f.name}={self.sizes.get(f, '?')}" for f in dim)
                raise _unknown(node, f"a dimension of {told} has the size {size}")

    # --- arguments ---

    def _rewrite(self, node: fx.Node) -> None:
        """The arguments of an operator that are sizes and offsets."""
        name = name_of(node.target) if hasattr(node.target, "_schema") else ""
        args: list[Any] = list(node.args)
        if (position := shape_argument(node.target)) is not None:
            args[position] = self._shape(node, args[position])
        elif name == "aten.arange" and sum(isinstance(a, int) for a in args) == 1:
            args = [self._shape(node, [a])[0] if isinstance(a, int) else a for a in args]
        elif name == "aten.slice" and _shifts(node, self._length(node)):
            start, stop = argument(node, "start") or 0, argument(node, "end")
            left_out = 0 if stop is None else max(0, self._length(node) - stop) if stop >= 0 else -stop
            args[2:4] = [start, node.all_input_nodes[0].meta["val"].shape[_dim(node)] - left_out]
        elif name in ("aten.slice", "aten.slice_scatter"):
            first = 3 if name == "aten.slice_scatter" else 2
            args[first : first + 2] = [self._scaled(node, a) for a in args[first : first + 2]]
        elif name in ("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm"):
            args[1] = list(node.all_input_nodes[0].meta["val"].shape[-len(args[1]) :])
        elif positions := (known := captured_record(node.target)).positions:
            args = list(positional(node.target, self._windowed(node, known.arguments(node), positions)))
        elif name in ("aten.split", "aten.split_with_sizes"):
            args[1] = self._scaled(node, args[1]) if isinstance(args[1], int) else [self._scaled(node, n) for n in args[1]]
        node.args = tuple(args)

    def _shape(self, node: fx.Node, old: Any) -> list[Any]:
        """A size argument, as far as the factors are known; one that is not known is new, and stays."""
        known = [all(f in self.sizes for f in dim) for dim in node.meta["dims"]]
        new = [math.prod(self.sizes.get(f, 1) for f in dim) for dim in node.meta["dims"]]
        return [n if k and given != -1 else given for given, k, n in zip(old, known, new, strict=True)]

    def _windowed(self, node: fx.Node, arguments: dict[str, Any], positions: Positions) -> dict[str, Any]:
        """A window that is shorter than the sequence stays shorter than it, and one that is not does not matter."""
        window, keys = arguments[positions.window], arguments[positions.keys]
        old, new = (int(shape[positions.dim]) for shape in (self.before[keys], keys.meta["val"].shape))
        less = max(1, min(window * new // old, new - 1)) if window < old else new
        return {**arguments, positions.window: less if window else 0}

    def _length(self, node: fx.Node) -> int:
        """The length of the dimension that is cut, before it was made smaller."""
        return int(self.before[node.all_input_nodes[0]][_dim(node)])

    def _scaled(self, node: fx.Node, offset: Any) -> Any:
        old, new = self._length(node), int(node.all_input_nodes[0].meta["val"].shape[_dim(node)])
        if not isinstance(offset, int) or old == new or abs(offset) >= old or offset <= 1:
            return offset
        if offset * new % old:
            raise _unknown(node, f"the offset {offset} of {old} is no whole number of {new}")
        return offset * new // old


def _unknown(node: fx.Node, why: str) -> FoldError:
    return FoldError(
        f"The program is too large to verify, and cannot be made smaller at {node.name} = {node.target}: {why}.",
        at=node.meta.get("source") or where(node),
        valid="verify(model, reduced=False), or a model of the same architecture with smaller sizes",
    )
