"""Router: everything between a router's scores and its weights, as one kernel that holds whole rows.

    scores = softmax(logits)                               one row per token, [BR, E]
    weights, ids = topk(scores, K)                         the largest, K times
    weights = weights / sum(weights)                       [BR, K]

A tile has the rows of a value first and its other dimensions, each padded to a power of two, after them; padding is left
out where a row is reduced or searched. A region starts at the last top-k and grows over what it is made of and what is
made of it, as long as the text can be written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy import Expr, Integer, Symbol
from torch import Tensor, fx

from foldcc.codegen.chains import bound
from foldcc.codegen.dtypes import computed, converted
from foldcc.codegen.index import Ranges, parted, value_sizes
from foldcc.codegen.lines import REDUCTIONS
from foldcc.codegen.names import Names, NoText
from foldcc.codegen.pointwise import expression, number
from foldcc.codegen.regions import Region, is_computed, is_free, region
from foldcc.ir.node import argument, argument_or, name_of
from foldcc.rules.kinds import FILLS, RESHAPES, SAME, UNITS, filled_with

_WIDEST = 1024  # elements of a row that top-k searches
_TILE = 2048  # elements of the largest tile, at best
_MOST = 1 << 15  # and at most


@dataclass
class Tiles:
    """The text of one kernel's tiles.

    Attributes:
        inside: nodes that are computed; all others are loaded.
        rows: how many rows there are.
        lines: text of the kernel; `loads`: nodes that are loaded, in the order of first use.
        largest: elements in a row of the largest tile.
    """

    inside: set[fx.Node]
    rows: Expr
    lines: list[str] = field(default_factory=list)
    loads: dict[fx.Node, None] = field(default_factory=dict)
    largest: int = 1
    _known: dict[Any, str] = field(default_factory=dict)
    _tops: dict[tuple[fx.Node, int], tuple[str, str]] = field(default_factory=dict)
    _values: Names = field(default_factory=Names)

    @property
    def symbols(self) -> set[Symbol]:
        return self._values.symbols

    def tile(self, node: fx.Node, lead: int) -> str:
        """The name of a node's tile, [BR, ...]; its first `lead` dimensions are the rows, or have one element: [1, ...]."""
        key = (node, lead)
        if key not in self._known:
            text = self._text(node, lead)
            self._known[key] = text if text.isidentifier() else self.keep(node.name, text)
        return self._known[key]

    def _text(self, node: fx.Node, lead: int) -> str:
        self.pads(node, lead)
        if node not in self.inside:
            return self._load(node, lead)
        if node.target is operator.getitem:
            return self._top(node.args[0], lead)[node.args[1]]
        name = name_of(node.target)
        special = SPECIAL.get(name)
        return self._pointwise(node, lead) if special is None else special(self, node, lead)

    # --- shapes ---

    def pads(self, node: fx.Node, lead: int) -> list[int]:
        """The dimensions of a row of a node, each padded to a power of two."""
        sizes = value_sizes(node)[lead:]
        if not all(n.is_Integer and n > 0 for n in sizes):
            raise NoText(f"{node.name} has rows of {sizes}")
        found = [1 << (int(n) - 1).bit_length() for n in sizes]
        self.room(sympy.prod(found))
        return found

    def room(self, elements: Any) -> None:
        """Makes sure that a row of a tile is not too long."""
        self.largest = max(self.largest, int(elements))
        if self.largest > _MOST:
            raise NoText(f"a tile with {elements} elements in a row")

    def by_row(self, node: fx.Node, lead: int) -> bool:
        """Whether the leading dimensions are the rows; otherwise all rows are the same."""
        count = sympy.prod(value_sizes(node)[:lead])
        if lead and sympy.expand(count - self.rows) == 0:
            return True
        if count == 1:
            return False
        raise NoText(f"the first {lead} dimensions of {node.name} are not {self.rows} rows")

    def lead(self, node: fx.Node) -> int:
        """How many leading dimensions of a node are the rows."""
        sizes = value_sizes(node)
        for d in range(1, len(sizes) + 1):
            if sympy.expand(sympy.prod(sizes[:d]) - self.rows) == 0:
                return d
        raise NoText(f"{node.name} has no {self.rows} rows")

    def shape(self, node: fx.Node, lead: int, ones: int = 0) -> str:
        """The shape of a tile as text, with some dimensions of one element after the rows."""
        first = "BR" if self.by_row(node, lead) else "1"
        return f"[{', '.join(map(str, [first, *[1] * ones, *self.pads(node, lead)]))}]"

    def row(self, rank: int) -> str:
        """Positions along the rows of a tile with `rank` more dimensions."""
        found = f"r{rank}"
        if rank and found not in self._known:
            self.lines.append(f"{found} = r0[:, {', '.join(['None'] * rank)}]")
            self._known[found] = found
        return found

    def columns(self, rank: int, dim: int, width: int) -> str:
        """Positions along a dimension of a row of a tile with `rank` of them; negative ones count from the end."""
        dim %= rank
        found = f"c{rank}_{dim}_{width}"
        if found not in self._known:
            at = ["None"] * (rank + 1)
            at[dim + 1] = ":"
            self.lines.append(f"{found} = tl.arange(0, {width})[{', '.join(at)}]")
            self._known[found] = found
        return found

    def ok(self, node: fx.Node, lead: int, dims: Sequence[int] | None = None) -> list[str]:
        """What is true of the positions of a tile that are not padding along some dimensions of a row."""
        sizes, pads = value_sizes(node)[lead:], self.pads(node, lead)
        dims = range(len(pads)) if dims is None else dims
        return [f"({self.columns(len(pads), d, pads[d])} < {sizes[d]})" for d in dims if pads[d] != sizes[d]]

    def without_padding(self, text: str, node: fx.Node, lead: int, dims: Sequence[int], neutral: str) -> str:
        ok = self.ok(node, lead, dims)
        return f"tl.where({' & '.join(ok)}, {text}, {neutral})" if ok else text

    # --- values ---

    def keep(self, name: str, text: str) -> str:
        found = self._values.new(name)
        self.lines.append(f"{found} = {text}")
        return found

    def number(self, x: Any) -> str:
        return self._values.text(x)

    def _places(self, node: fx.Node, lead: int) -> list[str]:
        """Where an element of a tile is along each dimension of a node."""
        sizes, pads = value_sizes(node), self.pads(node, lead)
        row = Symbol(self.row(len(pads)), integer=True, nonnegative=True)
        self._values.where[row] = frozenset()
        spread = parted(row, sizes[:lead], Ranges({row: self.rows})) if self.by_row(node, lead) else [Integer(0)] * lead
        columns = [self.columns(len(pads), d, n) if n > 1 else "0" for d, n in enumerate(pads)]
        return [*map(self.number, spread), *columns]

    def _mask(self, node: fx.Node, lead: int) -> str:
        ok = [f"({self.row(len(self.pads(node, lead)))} < {self.number(self.rows)})"] if self.by_row(node, lead) else []
        return " & ".join([*ok, *self.ok(node, lead)])

    def _load(self, node: fx.Node, lead: int) -> str:
        dtype = node.meta["val"].dtype
        self.loads[node] = None
        terms = [f"{x} * {node.name}_s{d}" for d, x in enumerate(self._places(node, lead)) if x != "0"]
        mask = self._mask(node, lead)
        text = f"tl.load({' + '.join([f'{node.name}_ptr', *terms])}{f', mask={mask}, other=0' if mask else ''})"
        return f"({text} != 0)" if dtype == torch.bool else f"{text}.to({computed(dtype)})"

    def store(self, node: fx.Node) -> None:
        """Writes an output."""
        lead = self.lead(node)
        value = self.tile(node, lead)
        at = "0"
        for place, size in zip(self._places(node, lead), value_sizes(node), strict=True):
            at = place if at == "0" else f"({at}) * {self.number(size)} + {place}"
        self.lines.append(f"tl.store({node.name}_out + {at}, {value}, mask={self._mask(node, lead)})")

    def converted(self, x: fx.Node, lead: int, node: fx.Node) -> str:
        return converted(self.tile(x, lead), x, node)

    def _operand(self, x: fx.Node, node: fx.Node, lead: int) -> str:
        """An operand, with as many dimensions as the result."""
        ahead = len(value_sizes(node)) - len(value_sizes(x))
        text = self.converted(x, max(0, lead - ahead), node)
        if ahead <= lead:
            return text
        return f"tl.reshape({text}, {self.shape(x, 0, ahead - lead)})" if value_sizes(x) else text

    def _pointwise(self, node: fx.Node, lead: int) -> str:
        if not isinstance(node.meta.get("val"), Tensor):
            raise NoText(f"{node.target} returns no tensor")
        operands = [self._operand(x, node, lead) if isinstance(x, fx.Node) else number(x) for x in _plain(node)]
        text = expression(node, operands)
        if text is None:
            raise NoText(f"{node.target} has no Triton text")
        return text

    # --- operators of their own ---

    def _same(self, node: Any, lead: int) -> str:
        return self.converted(node.args[0], lead, node)

    def _filled(self, node: Any, lead: int) -> str:
        value = filled_with(node)
        dtype = node.meta["val"].dtype
        if dtype == torch.bool:
            return f"tl.full({self.shape(node, lead)}, {int(value)}, tl.int32) != 0"
        text = number(float(value) if dtype.is_floating_point else value)
        return f"tl.full({self.shape(node, lead)}, {text}, {computed(dtype)})"

    def _reshaped(self, node: Any, lead: int) -> str:
        """A row in other dimensions: with padding, only if they differ in dimensions of one element."""
        source = node.args[0]
        before = self.lead(source) if self.by_row(node, lead) else _ones(source)
        x = self.tile(source, before)
        have, want = self.pads(source, before), self.pads(node, lead)
        plain = [[int(n) for n in value_sizes(m)[d:] if n != 1] for m, d in ((source, before), (node, lead))]
        if plain[0] != plain[1] and [n for n in have + want if n > 1] != plain[0] + plain[1]:
            raise NoText(f"rows of {plain[0]} as {plain[1]}, which are no powers of two")
        return x if have == want else f"tl.reshape({x}, {self.shape(node, lead)})"

    def _expanded(self, node: Any, lead: int) -> str:
        return f"tl.broadcast_to({self._operand(node.args[0], node, lead)}, {self.shape(node, lead)})"

    def _reduced(self, node: Any, lead: int) -> str:
        source = node.args[0]
        rank = len(value_sizes(source))
        given = argument_or(node, "dim")
        dims = sorted({d % rank for d in ([given] if isinstance(given, int) else given or range(rank))})
        if dims[0] < lead or not self.by_row(source, lead):
            raise NoText(f"{node.target} over rows")
        kind = REDUCTIONS[name_of(node.target)]
        neutral = {"sum": "0", "max": "float('-inf')", "min": "float('inf')"}[kind]
        if kind != "sum" and not source.meta["val"].is_floating_point():
            raise NoText(f"{node.target} of whole numbers")
        inner = [d - lead for d in dims]
        text = self.without_padding(self.converted(source, lead, node), source, lead, inner, neutral)
        for d in reversed(inner):
            text = f"tl.{kind}({text}, {d + 1})"
        if argument_or(node, "keepdim"):
            for d in inner:
                text = f"tl.expand_dims({text}, {d + 1})"
        return f"{text} / {sympy.prod([value_sizes(source)[d] for d in dims])}" if name_of(node.target) == "aten.mean" else text

    def _softmax(self, node: Any, lead: int) -> str:
        source = node.args[0]
        axis = self._last(node, source, lead, argument(node, "dim"))
        x = self.without_padding(self.converted(source, lead, node), source, lead, [axis - 1], "float('-inf')")
        x = self.keep(f"{node.name}_x", x)
        x = self.keep(f"{node.name}_exp", f"tl.exp({x} - tl.expand_dims(tl.max({x}, {axis}), {axis}))")
        return f"{x} / tl.expand_dims(tl.sum({x}, {axis}), {axis})"

    def _last(self, node: fx.Node, source: fx.Node, lead: int, dim: int) -> int:
        """The last axis of the tile of a source, which an operator works along."""
        rank = len(value_sizes(source))
        if dim % rank != rank - 1 or rank == lead or not self.by_row(source, lead):
            raise NoText(f"{node.target} along dimension {dim}")
        return rank - lead

    def _top(self, node: Any, lead: int) -> tuple[str, str]:
        """Values and positions of the largest elements of a row, in order, of equal ones the first.

        The bits of a float, the meaning of its sign undone, are a whole number that orders like the float. Above a
        position they make one number, so that one maximum finds both; of a float64 there is no room for that.
        """
        if (node, lead) in self._tops:
            return self._tops[node, lead]
        source, k, name = node.args[0], argument(node, "k"), node.name
        axis = self._last(node, source, lead, argument(node, "dim"))
        wide = computed(source.meta["val"].dtype)
        if not argument(node, "largest") or not isinstance(k, int) or k < 1 or wide == "tl.int64":
            raise NoText(f"{node.target} of {wide}, the smallest, or none")
        x, pads = self.tile(source, lead), self.pads(source, lead)
        width, kept = pads[-1], 1 << (k - 1).bit_length()
        columns, places = (self.columns(len(pads), -1, n) for n in (width, kept))
        bits, most = (32, (1 << 31) - 1) if wide == "tl.float32" else (64, (1 << 63) - 1)
        lowest, shift = (-(1 << 62), width.bit_length() - 1) if bits == 32 else (-most, 0)
        left = self.keep(f"{name}_left", f"{x}.to(tl.int{bits}, bitcast=True)")
        left = self.keep(f"{name}_left", f"tl.where({x} == {x}, {left} ^ (({left} >> {bits - 1}) & {most}), {most})")
        packed = f"({left}.to(tl.int64) << {shift}) + {width - 1} - {columns}" if bits == 32 else left
        left = self.keep(f"{name}_left", self.without_padding(packed, source, lead, [axis - 1], str(lowest)))
        shape = f"[{', '.join(map(str, ['BR', *pads[:-1], kept]))}]"
        top = self.keep(f"{name}_top", f"tl.full({shape}, {lowest}, tl.int64)")
        best, at = f"{name}_best", f"{name}_at"
        loop = [
            f"{best} = tl.expand_dims(tl.max({left}, {axis}), {axis})",
            f"{top} = tl.where({places} == {name}_k, {best}, {top})",
        ]
        if bits == 32:
            loop.append(f"{left} = tl.where({left} == {best}, {lowest}, {left})")
        else:
            ids = self.keep(f"{name}_ids", f"tl.zeros({shape}, tl.int64)")
            loop += [
                f"{at} = tl.expand_dims(tl.min(tl.where({left} == {best}, {columns}, {width}), {axis}), {axis})",
                f"{ids} = tl.where({places} == {name}_k, {at}, {ids})",
                f"{left} = tl.where({columns} == {at}, {lowest}, {left})",
            ]
        self.lines += [f"for {name}_k in range({k}):", *(f"    {line}" for line in loop)]
        if bits == 32:
            ids = self.keep(f"{name}_ids", f"{width - 1} - ({top} & {width - 1})")
            top = self.keep(f"{name}_top", f"({top} >> {shift}).to(tl.int32)")
        value = f"({top} ^ (({top} >> {bits - 1}) & {most})).to({wide}, bitcast=True)"
        self._tops[node, lead] = self.keep(f"{name}_values", value), ids
        return self._tops[node, lead]

    def _gathered(self, node: Any, lead: int) -> str:
        source, ids = node.args[0], argument(node, "index")
        axis = self._along(node, source, ids, lead)
        places = f"{self.tile(ids, lead)} & {self.pads(source, lead)[-1] - 1}"  # padding reads some column as well
        return f"tl.gather({self.tile(source, lead)}, ({places}).to(tl.int32), {axis})"

    def _scattered(self, node: Any, lead: int) -> str:
        base, ids = node.args[0], argument(node, "index")
        axis = self._along(node, base, ids, lead)
        x = self.converted(base, lead, node)
        hit = self.keep(f"{node.name}_hit", self._hit(ids, lead, self.pads(base, lead)[-1]))
        ok = self.ok(ids, lead, [axis - 1])
        if ok:
            hit = self.keep(f"{node.name}_hit", f"{hit} & tl.expand_dims({ok[0]}, {axis + 1})")
        value = argument_or(node, "src")
        if isinstance(value, fx.Node):
            here = f"tl.expand_dims({self.converted(value, lead, node)}, {axis + 1})"
            new = f"tl.sum(tl.where({hit}, {here}, 0), {axis})"
        else:
            new = number(argument(node, "value"))
        if name_of(node.target) == "aten.scatter_add":
            return f"{x} + {new}"
        return f"tl.where(tl.max({hit}.to(tl.int32), {axis}) != 0, {new}, {x})"

    def _along(self, node: fx.Node, source: fx.Node, ids: fx.Node, lead: int) -> int:
        axis = self._last(node, source, lead, argument(node, "dim"))
        if value_sizes(source)[:-1] != value_sizes(ids)[:-1] or source.meta["val"].dtype == torch.bool:
            raise NoText(f"{node.target} of {value_sizes(source)} at {value_sizes(ids)}")
        return axis

    def _hit(self, ids: fx.Node, lead: int, width: int) -> str:
        """Which column each of a row's positions names."""
        pads = self.pads(ids, lead)
        self.room(sympy.prod(pads) * width)
        x = self.tile(ids, lead)
        return f"tl.expand_dims({x}, {len(pads) + 1}) == {self.columns(len(pads) + 1, -1, width)}"


SPECIAL: dict[str, Callable[[Tiles, Any, int], str]] = {
    **dict.fromkeys({*SAME, "aten._to_copy"}, Tiles._same),
    **dict.fromkeys(RESHAPES | UNITS, Tiles._reshaped),
    **dict.fromkeys(FILLS, Tiles._filled),
    **dict.fromkeys(REDUCTIONS, Tiles._reduced),
    "aten.expand": Tiles._expanded,
    "aten._softmax": Tiles._softmax,
    "aten.gather": Tiles._gathered,
    "aten.scatter": Tiles._scattered,
    "aten.scatter_add": Tiles._scattered,
}


def _plain(node: fx.Node) -> Iterator[Any]:
    return (x for x in node.args if isinstance(x, (fx.Node, int, float)))


def _ones(node: fx.Node) -> int:
    """How many leading dimensions of one element a node has."""
    return next((d for d, n in enumerate(value_sizes(node)) if n != 1), len(value_sizes(node)))


# --- text ---


def router_text(name: str, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> str:
    """A kernel and its launcher for top-k and the nodes around it.

    Raises:
        NoText: the nodes do not fit into one kernel; why.
    """
    last = [n for n in nodes if _is_top(n)][-1]
    source: Any = last.args[0]
    tiles = Tiles(set(nodes), sympy.prod(value_sizes(source)[:-1]))
    for n in outputs:
        tiles.store(n)
    missing = [n for n in tiles.loads if n not in inputs]
    if missing or not tiles.loads:
        raise NoText(f"{missing[0].name} is read and not given" if missing else "it reads nothing")
    read = [n for n in inputs if n in tiles.loads]
    rows = tiles.number(tiles.rows)
    shapes = {s for n in outputs for x in value_sizes(n) for s in x.free_symbols}
    symbols = sorted(s.name for s in tiles.symbols | shapes)
    strides = [(n.name, d) for n in read for d in range(len(value_sizes(n)))]
    arguments = [*(f"{n.name}_ptr" for n in read), *(f"{n.name}_out" for n in outputs), *(f"{n}_s{d}" for n, d in strides)]
    given = [*(n.name for n in read), *(f"{n.name}_out" for n in outputs), *(f"{n}.stride({d})" for n, d in strides)]
    block = max(1, min(64, _TILE // tiles.largest))
    return "\n".join(
        [
            "@triton.jit",
            f"def {name}_kernel({', '.join([*arguments, *symbols, 'BR: tl.constexpr'])}):",
            "    r0 = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)",
            *(f"    {line}" for line in tiles.lines),
            "",
            "",
            f"def {name}({', '.join(n.name for n in inputs)}):",
            *(f"    {s} = {bound(s, inputs)}" for s in symbols),
            *(f"    {n.name}_out = {_empty(n, tiles, read[0])}" for n in outputs),
            f"    if {rows} > 0:",
            f"        {name}_kernel[(triton.cdiv({rows}, {block}),)]({', '.join([*given, *symbols, f'BR={block}'])})",
            f"    return {', '.join(f'{n.name}_out' for n in outputs)}",
        ]
    )


def _empty(node: fx.Node, tiles: Tiles, like: fx.Node) -> str:
    shape = ", ".join(map(tiles.number, value_sizes(node)))
    return f"torch.empty(({shape},), dtype={node.meta['val'].dtype}, device={like.name}.device)"


# --- regions ---


def _is_top(node: fx.Node) -> bool:
    return node.op == "call_function" and name_of(node.target) == "aten.topk"


class Reach:
    """What reaches what in a graph, for groups that must not be left and entered again."""

    def __init__(self, graph: fx.Graph):
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.nodes = list(graph.nodes)
        self.above: list[int] = []
        for n in self.nodes:
            mask = 0
            for x in n.all_input_nodes:
                mask |= self.above[self.order[x]] | 1 << self.order[x]
            self.above.append(mask)

    def convex(self, inside: set[fx.Node]) -> bool:
        """Whether no path leaves a group and comes back."""
        mask = sum(1 << self.order[n] for n in inside)
        over = 0
        for n in inside:
            over |= self.above[self.order[n]]
        over &= ~mask
        while over:
            low = over & -over
            if self.above[low.bit_length() - 1] & mask:
                return False
            over ^= low
        return True


def find(graph: fx.Graph, claimed: set[fx.Node]) -> list[Region]:
    """The routers of a graph, among the nodes that no other region has claimed."""
    reach, taken, found = Reach(graph), set(claimed), []
    for seed in reversed([n for n in graph.nodes if _is_top(n)]):
        if seed in taken or not _is_small(seed):
            continue
        try:
            grown = _checked(_with_pieces(seed), taken, reach)
        except NoText:
            continue
        while larger := _larger(grown, seed, taken, reach):
            grown = larger
        taken |= {n for n in grown.nodes if not is_free(n)}
        found.append(grown)
    return found


def _is_small(seed: fx.Node) -> bool:
    sizes = value_sizes(seed.args[0])
    return len(sizes) > 1 and bool(sizes[-1].is_Integer) and bool(sizes[-1] <= _WIDEST)


def _larger(found: Region, seed: fx.Node, taken: set[fx.Node], reach: Reach) -> Region | None:
    """A region with one node more, if there is one."""
    inside = set(found.nodes)
    for node in [*reversed(found.inputs), *_readers(inside)]:
        related = _above(node, seed, reach) or _above(seed, node, reach)
        if node in taken or not related or not _is_known(node):
            continue
        try:
            return _checked(inside | _with_pieces(node), taken, reach)
        except NoText:
            continue
    return None


def _above(one: fx.Node, other: fx.Node, reach: Reach) -> bool:
    return bool(reach.above[reach.order[other]] >> reach.order[one] & 1)


def _is_known(node: fx.Node) -> bool:
    return _is_piece(node) or (is_computed(node) and value_sizes(node) != ())


def _is_piece(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and _is_top(node.args[0])


def _with_pieces(node: fx.Node) -> set[fx.Node]:
    """A node, or a top-k and its two results."""
    top: Any = node.args[0] if _is_piece(node) else node
    return {top, *top.users} if _is_top(top) else {node}


def _readers(inside: set[fx.Node]) -> list[fx.Node]:
    """What is computed next from a region."""
    found: dict[fx.Node, None] = {}
    left = [n for n in inside if not is_free(n)]
    while left:
        for user in left.pop().users:
            if is_free(user):
                left.append(user)
            elif user not in inside:
                found[user] = None
    return list(found)


def _checked(nodes: set[fx.Node], taken: set[fx.Node], reach: Reach) -> Region:
    """A region of nodes and of what moves their operands, whose text can be written."""
    nodes = set(nodes)
    left = list(nodes)
    while left:
        for x in left.pop().all_input_nodes:
            if x not in nodes and x not in taken and is_free(x) and name_of(x.target) in SPECIAL:
                nodes.add(x)
                left.append(x)
    own = sum(1 << reach.order[n] for n in nodes if not is_free(n))
    if not reach.convex({n for n in nodes if not is_free(n) or reach.above[reach.order[n]] & own}):
        raise NoText("a path leaves it and comes back")
    found = region("router", nodes, router_text)
    found.source("kernel")
    return found
