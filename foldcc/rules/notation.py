"""The notation of rules: which dimensions of an operator's operands and results are the same thing.

    "... k, n k, n -> ... n ; linear 0 | 1 ; add 2"

Operands are separated by commas, dimensions by spaces; `(g r)` is a product, `...` any leading dimensions, `[d]` must
be whole on every rank. A letter in no result is summed: shard it and the result is partial. `linear` lists the sets of
operands that may be partial together while the others are replicated; `add` the operands that join once, after the sum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

Letters = tuple[str, ...]
Pattern = tuple[Letters, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """A rule, for given shapes: each dimension of each operand and result as a product of letters.

    Attributes:
        operands, results: a pattern each, None for one that is absent.
        sizes: size of each letter.
        whole: letters that must not be sharded.
        linear: sets of operands that may be partial together.
        add: operands that join the sum once.
        reads: for each result the operands that it depends on; without it, all.
    """

    operands: tuple[Pattern | None, ...]
    results: tuple[Pattern | None, ...]
    sizes: Mapping[str, int]
    whole: frozenset[str] = frozenset()
    linear: tuple[frozenset[int], ...] = ()
    add: frozenset[int] = frozenset()
    reads: tuple[frozenset[int], ...] = ()
    wishes: Mapping[str, str] = field(default_factory=dict)

    def letters(self) -> list[str]:
        found: dict[str, None] = {}
        for pattern in (*self.operands, *self.results):
            for dim in pattern or ():
                found.update(dict.fromkeys(dim))
        return list(found)

    def summed(self, x: str) -> bool:
        return not any(x in dim for pattern in self.results for dim in pattern or ())


@dataclass(frozen=True)
class Notation:
    """A rule as written, before it meets shapes."""

    text: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    linear: tuple[frozenset[int], ...]
    add: frozenset[int]

    def rule(self, operands: Sequence[Sequence[int] | None], results: Sequence[Sequence[int] | None]) -> Rule | None:
        """The rule for these shapes, or None if they do not fit the notation."""
        sizes: dict[str, int] = {}
        whole: set[str] = set()
        found = []
        texts = [*self.operands[: len(operands)], *self.results[: len(results)]]
        shapes = [*operands, *results]
        if len(texts) != len(shapes):
            return None
        pending = []
        for text, shape in zip(texts, shapes, strict=True):
            pattern = None if shape is None else dimensions(text, len(shape), whole)
            if shape is not None and (pattern is None or len(pattern) != len(shape)):
                return None
            found.append(pattern)
            if shape is not None and pattern is not None:
                pending += list(zip(pattern, shape, strict=True))
        for dim, size in sorted(pending, key=lambda item: len(item[0])):
            unknown = [x for x in dim if x not in sizes]
            known = math.prod(sizes[x] for x in dim if x in sizes)
            if len(unknown) > 1 or (known and size % known) or (not unknown and known != size):
                return None
            if unknown:
                sizes[unknown[0]] = size // known if known else size
        return Rule(
            operands=tuple(found[: len(operands)]),
            results=tuple(found[len(operands) :]),
            sizes=sizes,
            whole=frozenset(whole),
            linear=self.linear,
            add=self.add,
            wishes={x: x for x in sizes if len(x) > 1 and not x.startswith(".")},
        )


def dimensions(text: str, rank: int, whole: set[str]) -> Pattern | None:
    """The letters of each dimension of a value of this rank; those in square brackets join `whole`."""
    tokens = re.findall(r"\([^)]*\)|\[[^\]]*\]|\S+", text)
    if "..." in tokens:
        at = tokens.index("...")
        extra = rank - (len(tokens) - 1)
        if extra < 0:
            return None
        tokens[at : at + 1] = [f".{i}" for i in range(-extra, 0)]
    dims = []
    for token in tokens:
        letters = tuple(token.strip("()[]").split())
        if token.startswith("["):
            whole.update(letters)
        dims.append(letters)
    return tuple(dims)


# (call, shapes of its operands, of its results) -> its rule, None if it has none
Derived = Callable[[Node, list[Shape | None], list[Shape | None]], Rule | None]


def notation(text: str) -> Notation:
    """Parses one line of a table of rules."""
    body, *flags = (part.strip() for part in text.split(";"))
    left, right = body.split("->")
    linear: tuple[frozenset[int], ...] = ()
    add: frozenset[int] = frozenset()
    for flag in flags:
        word, _, rest = flag.partition(" ")
        if word == "linear":
            linear = tuple(frozenset(map(int, group.split())) for group in rest.split("|"))
        elif word == "add":
            add = frozenset(map(int, rest.split()))
        else:
            raise ValueError(f"unknown flag {word!r} in rule {text!r}")
    operands = tuple(part.strip() for part in left.split(","))
    return Notation(text, operands, tuple(part.strip() for part in right.split(",")), linear, add)


def names(prefix: str, count: int) -> Pattern:
    """A pattern of letters of its own for each dimension."""
    return tuple((f"{prefix}{i}",) for i in range(count))


def build(
    inputs: Sequence[Pattern | None],
    outputs: Sequence[Pattern | None],
    shapes: Sequence[Shape | None],
    *,
    whole: set[str] | frozenset[str] = frozenset(),
    linear: Sequence[Sequence[int]] = (),
    wishes: dict[str, str] | None = None,
    sizes: dict[str, int] | None = None,
) -> Rule:
    """The rule of these patterns; a letter that stands alone has the size of its dimension."""
    sizes = dict(sizes or {})
    for pattern, shape in zip([*inputs, *outputs], shapes, strict=True):
        for dim, size in zip(pattern or (), shape or (), strict=True):
            if len(dim) == 1:
                sizes.setdefault(dim[0], size)
    return Rule(tuple(inputs), tuple(outputs), sizes, frozenset(whole), tuple(map(frozenset, linear)), wishes=wishes or {})
