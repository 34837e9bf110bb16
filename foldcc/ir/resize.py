"""The program at other sizes of its inputs, read off two that differ in sizes alone.

    batch=4 seq=16                 view(x, [4, 16, -1, 8])           slice(y, 1, 0, 8)
    batch=4·65537 seq=8·65539      view(x, [262148, 524312, -1, 8])  slice(y, 1, 0, 262156)
    batch=6 seq=24                 view(x, [6, 24, -1, 8])           slice(y, 1, 0, 12)

Every number that differs is a constant and a sum of ratios times products of the inputs' sizes. One of the two programs is
compiled for sizes with large prime factors, so that a number is so in one way only: a wrong product would need such a prime
below the line. What is not of this form, and what differs besides numbers, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from fractions import Fraction
from functools import cache, cached_property, partial
from itertools import combinations_with_replacement, zip_longest
from math import prod
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from foldcc.ir.pipeline import Stage, Stages
from foldcc.ir.program import Program

Sizes = Mapping[str, int]  # of the inputs, by name
_MOST = 4  # factors of a product: attention over all samples and positions, for one, has two
_TERMS = 4  # of a sum, such as of what travels together
_BELOW = 1 << 11  # what is added to products is less than half a prime factor
# What tracers leave on nodes, and nothing reads.
_STALE = {"tensor_meta", "eager_input_vals", "stack_trace", "from_node", "torch_fn", "seq_nr"}


class Unlike(Exception):
    """Two programs differ in more than the sizes of their inputs, or a size does not come out even."""


@dataclass(frozen=True)
class Size:
    """A constant and terms, each a ratio times the product of the sizes of some names."""

    constant: int
    terms: tuple[tuple[Fraction, tuple[str, ...]], ...]

    @staticmethod
    def between(small: int, large: int, sizes: Sizes, marked: Sizes) -> Size:
        """The size that is `small` where the inputs have `sizes`, and `large` where they have those with large primes.

        Raises:
            Unlike: it is none.
        """
        counts = range(1, _MOST + 1)
        names = [names for count in counts for names in combinations_with_replacement(sizes, count)]
        known = [
            _Product(n, prod(sizes[x] for x in n), prod(marked[x] for x in n), prod(_even(marked[x]) for x in n)) for n in names
        ]
        for terms in range(1, _TERMS + 1):
            found = {*_solved(Fraction(small), Fraction(large), sorted(known, key=lambda p: -p.large), terms)}
            if len(found) > 1:
                break
            for size in found:
                return size
        raise Unlike(f"{small} is {large} where {_told(sizes)} is {_told(marked)}, which is no sum of products of them")

    def at(self, sizes: Sizes) -> int:
        found = self.constant + sum(ratio * prod(sizes[n] for n in names) for ratio, names in self.terms)
        if found.denominator != 1:
            raise Unlike(f"a size is {found} for {_told(sizes)}")
        return int(found)


class _Product(NamedTuple):
    """A product of sizes of inputs, in both programs, and what may stand below the line."""

    names: tuple[str, ...]
    small: int
    large: int
    even: int


@cache
def _even(size: int) -> int:
    """A size without its large prime factor."""
    return size // int(max(sympy.primefactors(size)))


def _solved(small: Fraction, large: Fraction, known: Sequence[_Product], terms: int) -> Iterator[Size]:
    """The sizes of this many terms that are both."""
    for i, product in enumerate(known):
        if terms == 1:
            ratio = (large - small) / (product.large - product.small)
        else:
            ratio = Fraction(round(large * product.even / product.large), product.even)
        if ratio == 0 or product.even % ratio.denominator:
            continue
        rest = small - ratio * product.small, large - ratio * product.large
        if terms > 1:
            for left in _solved(*rest, known[i + 1 :], terms - 1):
                yield Size(left.constant, ((ratio, product.names), *left.terms))
        elif rest[0].denominator == 1 and abs(rest[0]) < _BELOW:
            yield Size(int(rest[0]), ((ratio, product.names),))


def _told(sizes: Sizes) -> str:
    return ", ".join(f"{name}={n}" for name, n in sizes.items())


@dataclass(frozen=True)
class Between:
    """Programs that are the same but for the sizes of their inputs.

    Attributes:
        small: compiled for inputs of some sizes.
        large: for inputs whose sizes have large prime factors.
        sizes, marked: of both.
        known: the sizes that were found, by what they are in both.
    """

    small: Stages
    large: Stages
    sizes: Sizes
    marked: Sizes
    known: dict[tuple[int, int], Size] = field(default_factory=dict)

    def check(self) -> None:
        """Raises Unlike where the last stages differ in more than sizes."""
        self._at(self.small[-1].program, self.large[-1].program, self.sizes)

    def at(self, sizes: Sizes) -> Stages:
        """The stages for inputs of these sizes; all but the last are made when they are looked at.

        Raises:
            Unlike: the program does not divide them.
        """
        last = self._at(self.small[-1].program, self.large[-1].program, sizes)
        pairs = zip(self.small, self.large, strict=True)
        made: list[Stage] = [Resized.of(few, partial(self._of, few, many, sizes)) for few, many in pairs]
        return Stages([*made[:-1], replace(self.small[-1], program=last)])

    def _of(self, small: Stage, large: Stage, sizes: Sizes) -> Program:
        return self._at(small.program, large.program, sizes)

    def _at(self, small: Program, large: Program, sizes: Sizes) -> Program:
        return _Resizing(self, sizes, {}).program(small, large)


def named_alike(program: Program, other: Program) -> Program:
    """A captured program whose nodes have the names that they have in another one: tracers number nodes that they drop.

    Raises:
        Unlike: there are others.
    """
    nodes, others = list(program.graph.graph.nodes), list(other.graph.graph.nodes)
    for node, twin in zip_longest(nodes, others):
        if node is None or twin is None or (node.op, node.target) != (twin.op, twin.target):
            raise Unlike(f"where there was {twin}, there is {node}")
    new, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node, twin in zip(nodes, others, strict=True):
        args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
        made[node] = new.create_node(node.op, node.target, args, kwargs, name=twin.name, type_expr=node.type)
        made[node].meta = dict(node.meta)
    return replace(program, graph=_LazyGraphModule(torch.nn.Module(), new))


class Resized(Stage):
    """A stage whose program is made when it is looked at."""

    @classmethod
    def of(cls, stage: Stage, make: Callable[[], Program]) -> Resized:
        new = object.__new__(cls)
        known = {f.name: getattr(stage, f.name) for f in fields(stage) if f.name != "program"}
        vars(new).update(known, _make=make, _emitted=stage.emitted)
        return new

    @property
    def emitted(self) -> bool:
        told = vars(self).get("_emitted")
        return super().emitted if told is None else bool(told)  # one that `replace` made has its program

    @cached_property
    def program(self) -> Program:
        made: Program = vars(self)["_make"]()
        return made


@dataclass(frozen=True)
class _Resizing:
    between: Between
    wanted: Sizes
    made: dict[tuple[int, int], tuple[Any, Any, Any]]  # of two objects by where they are, which they keep

    def program(self, small: Program, large: Program) -> Program:
        backward = None
        if small.backward is not None and large.backward is not None:
            backward = self.graph(small.backward, large.backward)
        differs = {f.name: self(getattr(small, f.name), getattr(large, f.name)) for f in fields(small) if f.name in _DATA}
        self.constants(small, large)
        return replace(small, graph=self.graph(small.graph, large.graph), backward=backward, **differs)

    def constants(self, small: Program, large: Program) -> None:
        for name, x in small.constants.items():
            other = large.constants.get(name)
            same = x is other or (isinstance(other, Tensor) and x.dtype == other.dtype and torch.equal(x, other))
            if not same:
                raise Unlike(f"the tensor {name}, which is made in the forward pass, is another one")

    def graph(self, small: fx.GraphModule, large: fx.GraphModule) -> fx.GraphModule:
        nodes, others = list(small.graph.nodes), list(large.graph.nodes)
        if len(nodes) != len(others):
            raise Unlike(f"there are {len(nodes)} nodes, and {len(others)}")
        new, twins = fx.Graph(), dict(zip(others, nodes, strict=True))
        made: dict[fx.Node, fx.Node] = {}
        for node, other in zip(nodes, others, strict=True):
            if (node.op, node.target, node.name) != (other.op, other.target, other.name):
                raise Unlike(f"{node.name} is {other.name}")
            theirs = fx.map_arg((other.args, other.kwargs), twins.__getitem__)
            try:
                args, kwargs = self((node.args, node.kwargs), theirs)
                meta = {k: self.meta(k, x, other.meta.get(k)) for k, x in node.meta.items() if k not in _STALE}
            except Unlike as error:
                raise Unlike(f"of {node.name}, {error}") from None
            args, kwargs = fx.map_arg((args, kwargs), made.__getitem__)
            made[node] = new.create_node(node.op, node.target, args, kwargs, name=node.name, type_expr=node.type)
            made[node].meta = meta
        root = torch.nn.Module()
        for name, block in small.named_children():
            setattr(root, name, self.graph(block, getattr(large, name)))  # type: ignore[arg-type]
        return _LazyGraphModule(root, new)

    def meta(self, key: str, x: Any, other: Any) -> Any:
        return self(x, other) if key in _WITH_SIZES else x

    def __call__(self, x: Any, other: Any) -> Any:
        """What is `x` in one program and `other` in the other one, at the sizes that are wanted."""
        if isinstance(x, Tensor):
            return self.tensor(x, other)
        if type(x) is not type(other):
            raise Unlike(f"{x!r} is {other!r}")
        if type(x) is int:
            return x if x == other else self.number(x, other)
        if isinstance(x, (tuple, list)):
            if len(x) != len(other):
                raise Unlike(f"{x!r} is {other!r}")
            items = [self(a, b) for a, b in zip(x, other, strict=True)]
            return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
        if isinstance(x, slice):
            return slice(*self((x.start, x.stop, x.step), (other.start, other.stop, other.step)))
        if isinstance(x, Mapping) or (is_dataclass(x) and not isinstance(x, type)):
            if (id(x), id(other)) not in self.made:
                self.made[id(x), id(other)] = x, other, self.fields(x, other)
            return self.made[id(x), id(other)][2]
        if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.counted(x, other)
        if x != other and not (x != x and other != other):
            raise Unlike(f"{x!r} is {other!r}")
        return x

    def fields(self, x: Any, other: Any) -> Any:
        if not isinstance(x, Mapping):
            return replace(x, **{f.name: self(getattr(x, f.name), getattr(other, f.name)) for f in fields(x) if f.init})
        if x.keys() != other.keys():
            raise Unlike(f"{x!r} is {other!r}")
        return {k: self(a, other[k]) for k, a in x.items()}

    def number(self, x: int, other: int) -> int:
        known = self.between.known
        if (x, other) not in known:
            known[x, other] = Size.between(x, other, self.between.sizes, self.between.marked)
        return known[x, other].at(self.wanted)

    def tensor(self, x: Tensor, other: Tensor) -> Tensor:
        if x.dtype != other.dtype or x.dim() != other.dim():
            raise Unlike(f"{x.dtype} {list(x.shape)} is {other.dtype} {list(other.shape)}")
        shape = [self.size(a, b) for a, b in zip(x.shape, other.shape, strict=True)]
        if shape == list(x.shape) and not any(isinstance(n, torch.SymInt) for n in shape):
            return x
        strides = [self.size(a, b) for a, b in zip(x.stride(), other.stride(), strict=True)]
        with x.fake_mode:  # type: ignore[attr-defined]
            return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)

    def size(self, x: Any, other: Any) -> Any:
        return self.counted(x, other) if isinstance(x, torch.SymInt) else self(x, other)

    def counted(self, x: Any, other: Any) -> Any:
        """A number that is counted while the program runs, unless it was found to be known."""
        mine, theirs = x.node.expr, other.node.expr if isinstance(other, torch.SymInt) else sympy.sympify(other)
        if mine.is_Integer and theirs.is_Integer:
            return self(int(mine), int(theirs))
        if mine.atoms(sympy.Integer) != theirs.atoms(sympy.Integer):
            raise Unlike(f"{mine} is {theirs}")
        return x


_DATA = {"slots", "sizes", "literals", "batch_dims", "updates", "wanted", "properties", "mesh"}
_WITH_SIZES = {"val", "layout", "returns"}
