"""Layout: what a rank holds of a value, for each mesh axis.

    [b@dp, s@tp, h]          the batch is sharded over dp, the sequence over tp
    [(b@dp s@tp), h]         one dimension, the product of both
    [(g h)@tp, d]            the product of two factors is sharded over tp
    [s@(cp,tp), h]           one factor is sharded over two axes, the first one slowest
    [b@dp+, h]               divided over dp, which need not divide its size: what is shorter on some ranks is filled up
    [b, s@cp~, h]            zig-zag: of 2 n blocks of the sequence, rank i of the n of cp has blocks i and 2 n - 1 - i
    [b@dp, s, h] P(tp)       each rank of tp holds a term of the sum

Axes are listed in the order of the mesh, slowest first; what prints parses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import prod

import sympy
from sympy import Symbol as Symbol

from foldcc.mesh import MOE, View


@dataclass(frozen=True)
class Shard:
    """A run of factors, `start` to `stop` in the product of dimension `dim`, is divided over the ranks of an axis.

    Attributes:
        filled: the run ends its dimension, and ranks have the parts that `torch.chunk` makes of it. The last of them may be
            shorter, or have nothing, and are filled up.
        zigzag: of twice as many blocks as ranks, a rank has one from each end.
    """

    dim: int
    start: int
    stop: int
    filled: bool = False
    zigzag: bool = False


State = Shard | str  # a shard, or "R" replicated, "I" invariant, "P" partial, "V" varying by data
REPLICATED, INVARIANT, PARTIAL, VARYING = "R", "I", "P", "V"


def letter(state: State) -> str:
    """The type R, I, V or P of a state."""
    return VARYING if isinstance(state, Shard) else state


@dataclass(frozen=True)
class Layout:
    """Dimensions as products of factors, and the state on each axis of one view of the mesh.

    Attributes:
        dims: for each tensor dimension, its factors, outermost first; data-dependent sizes are factors too.
        sizes: global size of each factor; a data-dependent one is missing.
        states: state on each axis of size > 1.
        ranks: size of each of these axes.
        view: "attention" or "moe".
    """

    dims: tuple[tuple[Symbol, ...], ...]
    sizes: Mapping[Symbol, int] = field(compare=False, repr=False)
    states: Mapping[str, State] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    view: View = "attention"

    def __hash__(self) -> int:
        return hash((self.dims, tuple(sorted((a, str(s)) for a, s in self.states.items())), self.view))

    def with_state(self, axis: str, state: State) -> Layout:
        return replace(self, states={**self.states, axis: state})

    def axes(self, *types: str) -> tuple[str, ...]:
        """The axes on which the value has one of the given types."""
        return tuple(a for a, s in self.states.items() if letter(s) in types)

    def _local(self, dim: int) -> list[int | Symbol]:
        """Size on a rank of each factor of a dimension, before what is filled up is divided."""
        product: list[int | Symbol] = [self.sizes.get(f, f) for f in self.dims[dim]]
        for axis, state in self.states.items():
            if isinstance(state, Shard) and state.dim == dim and not state.filled:
                left = self.ranks[axis]
                for i in range(state.start, state.stop):
                    size = product[i]
                    if isinstance(size, int):
                        taken = min(left, size) if left % min(left, size) == 0 else left
                        product[i], left = size // taken, left // taken
        return product

    def rest(self, dim: int) -> tuple[str, int] | None:
        """The axis over which a dimension is divided and filled up, and the size of what it divides; None if there is none."""
        for axis, s in self.states.items():
            if isinstance(s, Shard) and s.dim == dim and s.filled:
                return axis, int(_times(self._local(dim)[s.start :]))
        return None

    def filled(self, dim: int) -> Layout:
        """The layout of what is as long as the parts of all ranks, where it is filled up."""
        axis, size = self.rest(dim) or ("", 0)
        state = self.states[axis]
        assert isinstance(state, Shard)
        whole = Symbol(f"{self.dims[dim][state.start].name}_over_{axis}", integer=True, positive=True)
        dims = tuple((*each[: state.start], whole) if d == dim else each for d, each in enumerate(self.dims))
        sizes = {**self.sizes, whole: size + -size % self.ranks[axis]}
        return replace(self.with_state(axis, Shard(dim, state.start, state.start + 1)), dims=dims, sizes=sizes)

    @property
    def shape(self) -> tuple[int | Symbol, ...]:
        """The shape on one rank; data-dependent sizes stay symbols."""
        found = [_times(self._local(d)) for d in range(len(self.dims))]
        for d in range(len(self.dims)):
            if (rest := self.rest(d)) is not None:
                found[d] = found[d] // rest[1] * -(-rest[1] // self.ranks[rest[0]])
        return tuple(found)

    @property
    def global_shape(self) -> tuple[int | Symbol, ...]:
        return tuple(_times([self.sizes.get(f, f) for f in dim]) for dim in self.dims)

    def outer(self, axis: str) -> int:
        """How many local blocks stand before the sharded factors in their dimension; negative if ranks have these zig-zag."""
        state = self.states[axis]
        assert isinstance(state, Shard)
        found = _times(self._local(state.dim)[: state.start])
        assert isinstance(found, int)
        return -found if state.zigzag else found

    def used_up(self, state: State) -> bool:
        """Whether what a rank has left of the factors that a state divides may have size 1."""
        if not isinstance(state, Shard):
            return False
        ranks = prod(self.ranks[a] for a, s in self.states.items() if isinstance(s, Shard) and s.dim == state.dim)
        return prod(self.sizes.get(f, ranks + 1) for f in self.dims[state.dim][state.start : state.stop]) <= ranks

    @property
    def transposed(self) -> Layout:
        """The layout of the value's gradient: R and P change places."""
        swap: dict[State, State] = {REPLICATED: PARTIAL, PARTIAL: REPLICATED}
        return replace(self, states={a: swap.get(s, s) for a, s in self.states.items()})

    def __str__(self) -> str:
        texts = []
        for d, dim in enumerate(self.dims):
            over = [self._dividing(d, i) for i in range(len(dim))]
            pairs = groupby(zip(over, dim, strict=True), lambda pair: pair[0])
            runs = [(axes, " ".join(f.name for _, f in members)) for axes, members in pairs]
            if len(runs) == 1 and len(dim) > 1:
                texts.append(f"({runs[0][1]}){_at(runs[0][0])}")
                continue
            parts = [(f"({run})" if axes and " " in run else run) + _at(axes) for axes, run in runs]
            texts.append(f"({' '.join(parts)})" if len(dim) > 1 else "".join(parts) or "1")
        types = [f"{t}({','.join(a for a, s in self.states.items() if s == t)})" for t in "RPIV" if t in self._types]
        return " ".join([f"[{', '.join(texts)}]", *types])

    def _dividing(self, dim: int, position: int) -> tuple[str, ...]:
        """The axes over which a factor of a dimension is divided."""
        shards = [(a, s) for a, s in self.states.items() if isinstance(s, Shard) and s.dim == dim]
        return tuple(a + "+" * s.filled + "~" * s.zigzag for a, s in shards if s.start <= position < s.stop)

    @property
    def _types(self) -> set[str]:
        return {s for s in self.states.values() if isinstance(s, str)}

    @classmethod
    def parse(cls, text: str, sizes: Mapping[Symbol, int], ranks: Mapping[str, int]) -> Layout:
        """The layout that prints as `text`.

        Args:
            sizes: size of each factor; a name that is missing stands for a data-dependent size.
            ranks: size of every axis of both views of the mesh, outermost first.

        Raises:
            ValueError: the text is no layout.
        """
        match = _LAYOUT.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is no layout.")
        known = {f.name: f for f in sizes}
        dims: list[tuple[Symbol, ...]] = []
        states: dict[str, State] = {}
        for d, dim in enumerate(split_outside(match["dims"])):
            factors, spans = _dimension(dim)
            dims.append(tuple(known.get(f) or Symbol(f, integer=True, nonnegative=True) for f in factors))
            states |= {a.rstrip("+~"): Shard(d, *span, a.endswith("+"), a.endswith("~")) for a, span in spans.items()}
        for letter_, axes in re.findall(r"([RPIV])\(([^)]*)\)", match["types"]):
            states |= dict.fromkeys(axes.split(","), letter_)
        if unknown := set(states) - set(ranks):
            raise ValueError(f"{text!r} is divided over {', '.join(sorted(unknown))}, and the mesh has no such axis.")
        view: View = "moe" if set(MOE[1:]) & set(states) else "attention"
        in_order = {a: states[a] for a in ranks if a in states}
        return cls(tuple(dims), sizes, in_order, {a: ranks[a] for a in in_order}, view)


_LAYOUT = re.compile(r"\[(?P<dims>.*)\](?P<types>( [RPIV]\([^)]*\))*)")
_AXES = r"(?:@\((?P<{0}several>[^)]*)\)|@(?P<{0}one>\w+[+~]?))?"
_TOKEN = re.compile(r"\(|\)" + _AXES.format("run_") + r"|(?P<factor>\w+)" + _AXES.format(""))


def _at(axes: tuple[str, ...]) -> str:
    return "" if not axes else f"@{axes[0]}" if len(axes) == 1 else f"@({','.join(axes)})"


def split_outside(text: str) -> list[str]:
    """The parts of a text, at the commas that stand in no parentheses and no brackets."""
    found, depth = [""], 0
    for c in text:
        depth += (c in "([") - (c in ")]")
        if c == "," and depth == 0:
            found.append("")
        else:
            found[-1] += c
    return [x.strip() for x in found if x.strip()]


def _dimension(text: str) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The factors of a dimension's text, and for each axis the first and last + 1 of those it divides."""
    factors: list[str] = []
    spans: dict[str, tuple[int, int]] = {}
    opened: list[int] = []
    for token in _TOKEN.finditer(text):
        start = len(factors)
        if token["factor"]:
            factors += [token["factor"]] if token["factor"] != "1" else []
        elif token[0] == "(":
            opened.append(start)
        else:
            start = opened.pop()
        axes = token["several"] or token["one"] or token["run_several"] or token["run_one"] or ""
        for axis in axes.split(","):
            if axis:
                first, last = spans.get(axis, (start, start))
                spans[axis] = (min(first, start), max(last, len(factors)))
    return factors, spans


def _times(sizes: list[int | Symbol]) -> int | Symbol:
    number, unknown = 1, []
    for size in sizes:
        if isinstance(size, int):
            number *= size
        else:
            unknown.append(size)
    return number if not unknown else sympy.Mul(number, *unknown)
