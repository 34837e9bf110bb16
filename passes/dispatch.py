"""Dispatch: send every token to the ranks that hold its experts, and bring the results back.

    y = experts(x, ids, weights, w_up, w_down)
becomes
    order = argsort(ids)                                          counts = count(ids)
    sent, received, sources, chunks = splits(counts, all_to_all(counts))
    rows = all_gather_v(all_to_all_v(permute(x, order), sent, received, "ep"), sources, "etp")
    rows = experts on rows by expert                              w_up [experts@ep, (2 width@etp), hidden]
    rows = all_to_all_v(reduce_scatter_v(rows, sources, "etp"), received, sent, "ep")
    y    = unpermute(rows, order, weights)

Where some ids are those of no expert, `rows = leading(rows, sent)` leaves their rows out, which stand last, and behind the way
back `rows = extended(rows)` puts zeros there. Where experts are padded, `rows = spread(rows, counts, most)` makes sizes static:
nothing is told on the host, the exchanges are `all_to_all`, `all_gather` and `reduce_scatter`, and `collected` is the way back.

From the cross_fold on, nodes are one rank's view: their layouts are over the MoE axes, and row counts are data.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from foldcc import ops
from foldcc.errors import FoldError, divides
from foldcc.ir.node import argument, operands
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program, where
from foldcc.layout import INVARIANT, PARTIAL, REPLICATED, VARYING, Layout, Shard, State
from foldcc.mesh import FoldedMesh
from foldcc.ops.experts import activate, expert_of_row
from foldcc.ops.layout import cross_fold, reshard
from foldcc.plan.local import Inserting

aten = torch.ops.aten


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


@dataclass(frozen=True, kw_only=True)
class Dispatch(Pass):
    requires = frozenset({"sharded"})
    provides = frozenset({"dispatched"})

    def run(self, program: Program) -> Program:
        sizes = dict(program.sizes)
        program = replace(program, sizes=sizes)
        for name, block in program.blocks.items():
            for node in list(block.graph.find_nodes(op="call_function", target=ops.experts_node)):
                _Dispatcher(program, name, node).run()
            block.graph.eliminate_dead_code()
            block.recompile()
        layouts = {program.slot(n.name).names[0]: n.meta["layout"] for n in program.placeholders}
        parameters = {name: layouts.get(name, layout) for name, layout in program.plan.parameters.items()}
        return replace(program, plan=replace(program.plan, parameters=parameters))  # those of experts are on the MoE side


def _source(w: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What a weight is of, through casts and changes of layout, and the casts in their order."""
    casts: list[fx.Node] = []
    while w.target in (reshard, aten._to_copy.default):
        casts = casts if w.target is reshard else [w, *casts]
        w = w.args[0]
    return w, casts


class _Dispatcher:
    """Rewrites one `experts` node."""

    def __init__(self, program: Program, block: str, node: fx.Node):
        self.program, self.block, self.node = program, block, node
        self.mesh: FoldedMesh = program.mesh
        self.graph = node.graph
        self.sizes = program.sizes
        self.ranks = {a: self.mesh.size(a) for a in self.mesh.axes("moe") if self.mesh.size(a) > 1}
        self.hidden = node.meta["dims"][1]
        self.device = node.meta["val"].device
        self.tokens = self._tokens()
        self.emit = partial(Inserting(self.mesh, self.device).before, node)

    def _tokens(self) -> sympy.Symbol:
        """The factor of all tokens, which the ranks share out among them, in the attention side's order."""
        count = math.prod(self.sizes[f] for f in self.node.meta["dims"][0])
        number, name = 1, "tokens"
        while self.sizes.setdefault(_symbol(name), count) != count:
            number += 1
            name = f"tokens{number}"
        return _symbol(name)

    def layout(self, dims: tuple[Any, ...], **states: State) -> Layout:
        """A layout on the MoE axes: where nothing else is said, tokens are divided and the rest varies."""
        other: State = Shard(0, 0, 1) if dims and self.tokens in dims[0] else VARYING
        return Layout(dims, self.sizes, {a: states.get(a, other) for a in self.ranks}, self.ranks, "moe")

    def run(self) -> None:
        y = self._dispatched()
        self.node.replace_all_uses_with(y)
        self.graph.erase_node(self.node)

    def _fold(self, x: fx.Node) -> fx.Node:
        """A value with one row per token, on the MoE side of the mesh."""
        layout = self.layout(((self.tokens,), *x.meta["dims"][1:]))
        return self.emit(cross_fold, (x, layout), layout)

    def _weight(self, name: str) -> fx.Node | None:
        """An expert weight, each letter that the experts' record places divided over its axis."""
        w = argument(self.node, name)
        if w is None:
            return None
        pattern = self.node.meta["rule"].operands[operands(self.node).index(w)]
        states: dict[str, State] = dict.fromkeys(self.ranks, INVARIANT)
        for letter, axis in ops.experts_record.placed.items():
            if axis in self.ranks and any(letter in dim for dim in pattern):
                wanted = self.node.meta["letters"][letter]
                states[axis] = self._place(w, wanted, axis, letter)
        layout = self.layout(w.meta["dims"], **states)
        source, casts = _source(w)
        if source.op == "placeholder" and self._only_here(source):
            source.meta["layout"] = layout
            for call in self.program.calls:
                if call.target == self.block:
                    position = list(self.graph.find_nodes(op="placeholder")).index(source)
                    call.args[position].meta["layout"] = layout
            w = source
        else:
            casts = []
            invariant = self.layout(w.meta["dims"], **dict.fromkeys(self.ranks, INVARIANT))
            w = self.emit(cross_fold, (w, invariant), invariant)
            w = self.emit(reshard, (w, layout), layout)
        # Tokens vary over edp and, where the weight is not divided, over the others; the transpose sums its gradient, if any.
        used = self.layout(w.meta["dims"], **{a: REPLICATED if s == INVARIANT else s for a, s in layout.states.items()})
        if used != layout and w.meta["grad"]:
            w = self.emit(reshard, (w, used), used)
        for cast in casts:
            w = self.emit(cast.target, (w,), w.meta["layout"], **cast.kwargs)
        return w

    def _only_here(self, source: fx.Node) -> bool:
        """Whether the placeholder is a parameter that nothing but these experts reads."""
        if not source.meta.get("parameter"):
            return False
        position = list(self.graph.find_nodes(op="placeholder")).index(source)
        for call in self.program.calls:
            if call.target == self.block and len(call.args[position].users) > 1:
                return False
        readers: list[fx.Node] = []
        left = list(source.users)
        while left:
            reader = left.pop()
            passes_on = reader.target in (reshard, cross_fold, aten._to_copy.default)
            (left if passes_on else readers).extend(reader.users if passes_on else [reader])
        return all(r is self.node for r in readers)

    def _place(self, w: fx.Node, wanted: tuple[Any, ...], axis: str, letter: str) -> Shard:
        ranks = self.mesh.size(axis)
        size = 1
        for f in wanted:
            size *= self.sizes[f]
        what = "experts" if letter == "experts" else "columns of each expert"
        divides(what, size, axis, ranks, at=where(self.node), mesh=str(self.mesh))
        for d, dim in enumerate(w.meta["dims"]):
            for start in range(len(dim)):
                if dim[start : start + len(wanted)] == wanted:
                    stop = start + 1
                    if self.sizes[dim[start]] % ranks:
                        stop = start + len(wanted)
                    return Shard(d, start, stop)
        raise FoldError(f"Weight {w.name} has no dimension {letter}.", at=where(self.node))

    def _dispatched(self) -> fx.Node:
        node = self.node
        ep, etp = self.mesh.size("ep"), self.mesh.size("etp")
        x, ids, weights = (argument(node, name) for name in ("x", "ids", "weights"))
        held: Any = [self._weight(name) for name in ("w_up", "w_down", "b_up", "b_down")]
        experts = node.meta["letters"]["experts"]
        expert_count = 1
        for f in experts:
            expert_count *= self.sizes[f]

        x, ids, weights = self._fold(x), self._fold(ids), self._fold(weights)
        choices = (x.meta["dims"][0] + ids.meta["dims"][1],)
        flat = self.emit(aten.reshape.default, (ids, [-1]), self.layout(choices))
        order = self.emit(aten.argsort.stable, (flat,), self.layout(choices), stable=True)
        rows = self.emit(ops.permute, (x, order, self._choices()), self.layout((*choices, self.hidden)))

        counts = self._counts(ids, experts, expert_count)
        present, absent = choices[0], argument(node, "absent")
        whole = self.layout((*choices, self.hidden))
        if argument(node, "most"):
            rows = self._padded(rows, counts, expert_count, held, whole)
        elif ep * etp == 1:
            chosen = counts
            if absent:
                rows, present = self._present(rows, chosen)
            rows = self._experts(rows, counts, held, present)
        else:
            sent, received, sources, chunks = self._splits(counts, experts, ep, etp)
            chosen = sent
            if absent:
                rows, present = self._present(rows, chosen)
            here, gathered = self._rows("u"), self._rows("g")
            if ep > 1:
                rows = self._exchange(rows, sent, received, here)
            else:
                here = present
            if etp > 1:
                args = (rows, sources, "etp")
                rows = self.emit(ops.all_gather_v, args, self.layout((gathered, self.hidden), etp=REPLICATED))
            else:
                gathered = here
            local = expert_count // ep
            tail = {"etp": REPLICATED} if etp > 1 else {}
            pair = self.emit(ops.by_expert, (rows, chunks, local), None)
            by_expert = self.emit(operator.getitem, (pair, 0), self.layout((gathered,), **tail))
            mine: dict[str, State] = {"ep": self._divided(experts)} if ep > 1 else {}
            each = self.emit(operator.getitem, (pair, 1), self.layout((experts,), **mine, **tail))
            layout = self.layout((gathered, self.hidden), **tail)
            rows = self.emit(ops.permute, (rows, by_expert, 1), layout)
            rows = self._experts(rows, each, held, gathered)
            layout = rows.meta["layout"]
            rows = self.emit(ops.gather_rows, (rows, by_expert, 1), layout)
            if etp > 1:
                args = (rows, sources, "etp")
                rows = self.emit(ops.reduce_scatter_v, args, self.layout((here, self.hidden)))
            if ep > 1:
                rows = self._exchange(rows, received, sent, present)
        if absent and not argument(node, "most"):
            rows = self.emit(ops.extended, (rows, chosen, whole.shape[0]), whole)
        dtype = node.meta["val"].dtype
        if weights.meta["dtype"] != dtype:
            weights = self.emit(aten._to_copy.default, (weights,), weights.meta["layout"], dtype=dtype)
        y = self.emit(ops.unpermute, (rows, order, weights), self.layout(((self.tokens,), self.hidden)))
        return self.emit(cross_fold, (y, node.meta["layout"]), node.meta["layout"])

    def _counts(self, ids: fx.Node, experts: tuple[Any, ...], number: int) -> fx.Node:
        """How many choices fell on each expert; those that fell on none are counted last, and left out."""
        layout = self.layout((experts,))
        if not argument(self.node, "absent"):
            return self.emit(ops.count, (ids, number), layout)
        counts = self.emit(ops.count, (ids, number + 1), self.layout((self._rows("n"),)))
        return self.emit(aten.slice.Tensor, (counts, 0, 0, number), layout)

    def _present(self, rows: fx.Node, counts: fx.Node) -> tuple[fx.Node, tuple[sympy.Symbol]]:
        """The rows that go to an expert: they stand first. The others are sent nowhere."""
        present = self._rows("c")
        return self.emit(ops.leading, (rows, counts), self.layout((present, self.hidden))), present

    def _padded(self, rows: fx.Node, counts: fx.Node, number: int, held: list[Any], whole: Layout) -> fx.Node:
        """As many rows of each expert from each rank, zeros among them: every size is known, and all exchanges are even."""
        ep, etp, each = self.mesh.size("ep"), self.mesh.size("etp"), self._most()
        local, hidden = number // ep, argument(self.node, "x").meta["val"].shape[1]
        experts, tail = self.node.meta["letters"]["experts"], {"etp": REPLICATED} if etp > 1 else {}
        mine: dict[str, State] = {"ep": self._divided(experts)} if ep > 1 else {}
        flat, many = self.layout((self._rows("p"), self.hidden)), self._rows("g")

        def swapped(rows: fx.Node, first: int, second: int) -> fx.Node:
            """Rows by source and expert, by expert and source; or back."""
            rows = self.emit(aten.reshape.default, (rows, [first, second, each, hidden]), flat)
            rows = self.emit(aten.transpose.int, (rows, 0, 1), flat)
            return self.emit(aten.reshape.default, (rows, [second, first * each, hidden]), flat)

        rows = self.emit(ops.spread, (rows, counts, each), flat)
        if ep > 1:
            rows = self.emit(ops.all_to_all, (rows, "ep"), flat)
        rows = swapped(rows, ep, local)
        if etp > 1:
            args = (rows, 1, 1, "etp", REPLICATED)
            rows = self.emit(ops.all_gather, args, self.layout(flat.dims, **tail))
        rows = self.emit(aten.reshape.default, (rows, [-1, hidden]), self.layout((many, self.hidden), **tail))
        like = self.layout((experts,), **mine, **tail)
        taken = self.emit(aten.full.default, ([local], etp * ep * each), like, dtype=torch.int64, device=self.device)
        rows = self._experts(rows, taken, held, many)
        rows = self.emit(aten.reshape.default, (rows, [local, -1, hidden]), rows.meta["layout"])
        if etp > 1:
            rows = self.emit(ops.reduce_scatter, (rows, 1, 1, "etp"), flat)
        rows = swapped(rows, local, ep)
        rows = self.emit(aten.reshape.default, (rows, [-1, hidden]), flat)
        if ep > 1:
            rows = self.emit(ops.all_to_all, (rows, "ep"), flat)
        return self.emit(ops.collected, (rows, counts, whole.shape[0]), whole)

    def _most(self) -> int:
        """The most rows that an expert is sent by a rank: what it takes of each group of which the rank has a part."""
        layout: Layout = argument(self.node, "x").meta["layout"]
        rows, (tokens, *_) = math.prod(layout._local(0)) * self._choices(), layout.dims
        for i in range(len(tokens) + 1):
            if math.prod(self.sizes[f] for f in tokens[i:]) == argument(self.node, "group"):
                return min(rows, math.prod(layout._local(0)[:i]) * argument(self.node, "most"))
        return rows  # a smaller program that stands for a large one has no groups of that size

    def _choices(self) -> int:
        found = 1
        for f in argument(self.node, "ids").meta["dims"][1]:
            found *= self.sizes[f]
        return found

    def _rows(self, prefix: str) -> tuple[sympy.Symbol]:
        return (sympy.Symbol(f"{prefix}{len(self.graph.nodes)}", integer=True, nonnegative=True),)

    def _divided(self, experts: tuple[Any, ...]) -> Shard:
        return Shard(0, 0, 1 if self.sizes[experts[0]] % self.mesh.size("ep") == 0 else len(experts))

    def _splits(self, counts: fx.Node, experts: tuple[Any, ...], ep: int, etp: int) -> list[fx.Node]:
        """The counts exchange: the one small collective that the sizes of the others need."""
        axes = ",".join(a for a in ("ep", "etp") if self.mesh.size(a) > 1)
        layout = self.layout((experts,))
        repeated = counts
        if etp > 1:
            # Every rank of an etp group holds the same experts, so each is told.
            repeated = self.emit(aten.reshape.default, (counts, [ep, 1, -1]), None)
            repeated = self.emit(aten.expand.default, (repeated, [ep, etp, -1]), None)
            repeated = self.emit(aten.reshape.default, (repeated, [-1]), None)
        arriving = self.emit(ops.all_to_all, (repeated, axes), None if etp > 1 else layout)
        if etp > 1:
            place = self.emit(ops.axis_index, ("etp", self.device), None)
        else:
            place = self.emit(aten.zeros.default, ([],), None, dtype=torch.int64, device=self.device)
        four = self.emit(ops.splits, (counts, arriving, ep, etp, place), None)
        return [self.emit(operator.getitem, (four, i), None) for i in range(4)]

    def _exchange(self, rows: fx.Node, send: fx.Node, receive: fx.Node, into: Any) -> fx.Node:
        args = (rows, send, receive, "ep")
        return self.emit(ops.all_to_all_v, args, self.layout((into, self.hidden)))

    def _experts(
        self,
        rows: fx.Node,
        counts: fx.Node,
        held: list[Any],
        count: Any,
    ) -> fx.Node:
        """The experts of this rank on its rows: their width is divided over etp, so the result is a term of a sum."""
        w_up, w_down, b_up, b_down = held
        act, transposed = argument(self.node, "act"), argument(self.node, "transposed")
        etp = self.mesh.size("etp")
        width = self.node.meta["letters"]["expert_width"]
        interleaved = argument(self.node, "interleaved")
        gates = self.node.meta["letters"].get("gates", ())
        wide = width + gates if interleaved else gates + width
        at = len(gates) if not interleaved else 0
        split = {"etp": Shard(1, at, at + 1)} if etp > 1 else {}
        narrow = {"etp": Shard(1, 0, 1)} if etp > 1 else {}
        partial: dict[str, State] = {"etp": PARTIAL} if etp > 1 else {}
        which = None
        if b_up is not None or b_down is not None:
            which = self.emit(expert_of_row, (rows, counts), None)
        args = (rows, w_up, counts, transposed)
        hidden = self.emit(ops.grouped_linear, args, self.layout((count, wide), **split))
        if b_up is not None:
            bias = self.emit(aten.index_select.default, (b_up, 0, which), hidden.meta["layout"])
            hidden = self.emit(aten.add.Tensor, (hidden, bias), hidden.meta["layout"])
        hidden = self.emit(activate, (hidden, act), self.layout((count, width), **narrow))
        args = (hidden, w_down, counts, transposed)
        y = self.emit(ops.grouped_linear, args, self.layout((count, self.hidden), **partial))
        if b_down is None:
            return y
        replicated: dict[str, State] = {"etp": REPLICATED} if etp > 1 else {}
        bias = self.emit(aten.index_select.default, (b_down, 0, which), self.layout((count, self.hidden), **replicated))
        if etp > 1:
            bias = self.emit(reshard, (bias, y.meta["layout"]), y.meta["layout"])
        return self.emit(aten.add.Tensor, (y, bias), y.meta["layout"])
