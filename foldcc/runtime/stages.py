"""A main graph in pieces, one for each pipeline stage. What a later stage reads goes there from neighbour to neighbour.

    y = block0(x); z = block1(y); loss = block2(z, y)      becomes, with a stage for each call
    stage 0: y = block0(x), sends y         stage 1: z = block1(y), sends z and y         stage 2: loss = block2(z, y)

The backward graph is cut alike, in the other direction: what comes back is the sum of the gradients of all later uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils import _pytree as pytree

from foldcc.errors import FoldError
from foldcc.ir.program import WEIGHT, Program, Slot
from foldcc.ir.walk import module_of

_COUNTS = -1  # where what micro-batches share is made: before all stages, by each of those that read it


@dataclass(frozen=True)
class Piece:
    """What one stage runs of a main graph: `(given, shared, received) -> (results, sent, left)`.

    Attributes:
        given: the placeholders of the main graph that it takes, by position.
        shared: the counts that it takes, by position.
        received: what it is sent.
        results: what it makes of what the main graph returns, by position.
        sent: what it sends.
        left: what it leaves for its second half, whose `received` it is.
    """

    graph: fx.GraphModule
    given: tuple[int, ...]
    shared: tuple[int, ...]
    received: tuple[fx.Node, ...]
    results: tuple[int, ...]
    sent: tuple[fx.Node, ...]
    left: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Pieces:
    """A main graph in pieces.

    Attributes:
        counts: what micro-batches share: `(given) -> counts`, as their mean is read by the stages.
        stages: in the order of the stages.
    """

    counts: Piece
    stages: tuple[Piece, ...]

    def maker(self, result: int) -> int:
        """The stage that makes a result."""
        return next(s for s, piece in enumerate(self.stages) if result in piece.results)


def cut(main: fx.GraphModule, stages: int, *, backward: bool = False, read: Mapping[int, int] | None = None) -> Pieces:
    """A main graph in pieces, as its calls say.

    Args:
        backward: the last stage runs first.
        read: by the position of a result, the stage that reads it; one that any stage can make is made there.
    """
    return _Cut(main, stages, backward, read or {}).pieces()


class _Cut:
    """Attributes:
    at: where each node runs, counted in the order in which stages run; None for what each of them can make of placeholders.
    until: the last of the places that read a value.
    """

    def __init__(self, main: fx.GraphModule, stages: int, backward: bool, read: Mapping[int, int]):
        self.main, self.stages, self.backward, self.readers = main, stages, backward, read
        self.nodes = list(main.graph.nodes)
        self.placeholders = [n for n in self.nodes if n.op == "placeholder"]
        leaves = pytree.tree_leaves(main.graph.output_node().args[0], is_leaf=lambda x: isinstance(x, fx.Node))
        self.at: dict[fx.Node, int | None] = {}
        for node in self.nodes:
            self.at[node] = self._place(node)
        self.returned = {i: n for i, n in enumerate(leaves) if isinstance(n, fx.Node)}
        self.until: dict[fx.Node, int] = {}
        for node in self.nodes:
            place = self.at[node]
            if place is not None:
                self.until |= {x: max(place, self.until.get(x, 0)) for x in node.all_input_nodes}
        used = {x for n in self.nodes if self.at[n] != _COUNTS and n.op != "output" for x in n.all_input_nodes}
        self.counts = [n for n in self.nodes if self.at[n] == _COUNTS and (n in used or n in self.returned.values())]

    def _place(self, node: fx.Node) -> int | None:
        if node.op == "call_module":
            stage: int = node.meta.get("stage", _COUNTS)
            return self._turn(stage)
        if node.op == "output":
            return None
        return max((place for x in node.all_input_nodes if (place := self.at[x]) is not None), default=None)

    def _turn(self, stage: int) -> int:
        return self.stages - 1 - stage if self.backward and stage != _COUNTS else stage

    def pieces(self) -> Pieces:
        found = [self._piece(place) for place in range(self.stages)]
        return Pieces(self._piece(_COUNTS), tuple(reversed(found) if self.backward else found))

    def _piece(self, place: int) -> Piece:
        stage = place != _COUNTS
        received = self._crossing(place - 1) if stage else []
        sent = self._crossing(place) if stage else []
        results = {i: n for i, n in self.returned.items() if self._returns(i, n) == place} if stage else {}
        wanted = {n for n in self.nodes if self.at[n] == place and n.op != "output"} | {*results.values()}
        for node in reversed(self.nodes):  # what is made of placeholders is made where it is read
            if node in wanted:
                wanted.update(x for x in node.all_input_nodes if self.at[x] is None)
        read = {x for n in wanted for x in n.all_input_nodes} | {*results.values()}
        graph = fx.Graph()
        given = [i for i, n in enumerate(self.placeholders) if n in wanted]
        shared = [i for i, n in enumerate(self.counts) if n in read] if stage else []
        new: dict[fx.Node, fx.Node] = {}
        for node in (*(self.placeholders[i] for i in given), *(self.counts[i] for i in shared), *received):
            new[node] = graph.placeholder(node.name)
        for node in self.nodes:
            if node in wanted and node not in new:
                new[node] = graph.node_copy(node, new.__getitem__)
        left = [*results.values()] if stage else self.counts
        graph.output((tuple(new[n] for n in left), tuple(new[n] for n in sent), ()))
        return Piece(_LazyGraphModule(self.main, graph), *map(tuple, (given, shared, received, results, sent)))  # type: ignore[arg-type]

    def _returns(self, i: int, node: fx.Node) -> int:
        """Where a result is returned from."""
        place = self.at[node]
        return self._turn(self.readers.get(i, 0)) if place is None or place == _COUNTS else place

    def _crossing(self, boundary: int) -> list[fx.Node]:
        """What is made up to a place and read behind it."""
        return [n for n in self.until if _between(self.at[n], boundary, self.until[n])]


def _between(made: int | None, boundary: int, until: int) -> bool:
    return made is not None and made != _COUNTS and made <= boundary < until


def in_two(piece: Piece) -> tuple[Piece, Piece]:
    """A backward piece in two: all that is sent is made in the first, and gradients of parameters in the second."""
    returned: Any = piece.graph.graph.output_node().args[0]
    made, sent, _ = returned
    nodes = [n for n in piece.graph.graph.nodes if n.op != "output"]
    late: dict[fx.Node, None] = {}
    for node in nodes:
        if str(node.target).endswith(WEIGHT) or not late.keys().isdisjoint(node.all_input_nodes):
            late[node] = None
    needed = list(sent)
    while needed:
        node = needed.pop()
        late.pop(node, None)
        needed += node.all_input_nodes
    results = dict(zip(piece.results, made, strict=True))
    first, second = ({k: n for k, n in results.items() if (n in late) is there} for there in (False, True))
    read = {x for n in late for x in n.all_input_nodes}
    left = [n for n in nodes if n in read and n not in late]
    early = _part(piece, (), [n for n in nodes if n not in late], (first.values(), sent, left))
    then = _part(piece, left, late, (second.values(), (), ()))
    return (
        replace(piece, graph=early, results=tuple(first), left=tuple(left)),
        Piece(then, given=(), shared=(), received=tuple(left), results=tuple(second), sent=()),
    )


def _part(piece: Piece, given: Iterable[fx.Node], nodes: Iterable[fx.Node], returned: tuple[Iterable[fx.Node], ...]) -> Any:
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in given:
        new[node] = graph.placeholder(node.name)
    for node in nodes:
        new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(tuple(tuple(new[n] for n in several) for several in returned))
    return _LazyGraphModule(piece.graph, graph)


def like(node: fx.Node) -> torch.Tensor:
    """What crosses, as a rank has it, without values.

    Raises:
        FoldError: data decide its size.
    """
    value, layout = node.meta["val"], node.meta.get("layout")
    shape = value.shape if layout is None else layout.shape
    if not all(isinstance(n, int) for n in shape):
        raise FoldError(
            f"{node.name} goes from one pipeline stage to another, and data decide its size.",
            shape=list(shape),
            at=module_of(node) or None,
            valid="pp=1; or a plan whose stages are cut elsewhere",
        )
    return torch.empty(shape, dtype=value.dtype, device="meta")


def apart(program: Program) -> tuple[fx.GraphModule, tuple[Slot, ...]]:
    """The backward main graph, in which a gradient that several stages add to is left as a term of each; and whose it is."""
    main = program.backward
    assert main is not None
    gradients: Any = main.graph.output_node().args[0]
    sums: set[fx.Node] = set()
    terms = [_terms(g, sums) for g in gradients]
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in main.graph.nodes:
        if node.op != "output" and node not in sums:
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(tuple(t and new[t] for several in terms for t in several))
    slots = tuple(slot for slot, several in zip(program.slots, terms, strict=True) for _ in several)
    return _LazyGraphModule(main, graph), slots


def _terms(gradient: fx.Node | None, sums: set[fx.Node]) -> list[fx.Node | None]:
    if gradient is None or gradient.target is not torch.ops.aten.add.Tensor or len(gradient.users) > 1:
        return [gradient]
    sums.add(gradient)
    return [t for x in gradient.all_input_nodes for t in _terms(x, sums)]
