"""One record for each operator that stands in captured programs and runs as something else on the ranks.

    token_loss = captured("token_loss(Tensor logits, Tensor target, int ignore_index) -> Tensor", rule="t vocab, t -> t", ...)

Such a node stays one node until `localize`, so that layouts are chosen for what it means. Its record says where its
dimensions go, in which ways it can be divided, and what runs in its place for each; nobody else asks which operator it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from foldcc.layout import Layout
from foldcc.ops.autocast import computes_in_autocast_dtype
from foldcc.ops.operator import LIBRARY, by_name, positional, without_gradient

Emit = Callable[..., Node]  # (operator, arguments, layout of the result) -> the call, which is inserted
_CAPTURED: dict[Any, Captured] = {}


@dataclass(frozen=True)
class Site:
    """Where a node is lowered.

    Attributes:
        emit: inserts a call.
        axes: those on which the letters of the division are divided, comma separated, in the order of the mesh.
        layout: of the result.
        local: the operator on what a rank has, given by the arguments' names.
    """

    emit: Emit
    axes: str
    layout: Layout
    local: Callable[..., Node]


@dataclass(frozen=True)
class Division:
    """One way to run an operator on the ranks of an axis: each takes a part of a product of letters of the rule.

    An operand that does not hold the product is whole on every rank; a result that does not hold it is a term of a sum.
    Every letter that a rule does not call whole can be divided alone. A record lists what else can be, or needs more.

    Attributes:
        letters: of which each is divided, outermost first.
        stretch: a rank's part must be one stretch, so that the outermost factor is divided.
        zigzag: it must be a block from each end of the factor; where neither is said, it may be either.
        ends_sum: the operator ends its own sum, on every rank.
        beside: letters of other operands that are divided alike; they have to stand for the same factors.
        only: the axis that it is for, which may then divide these letters whatever else it takes; empty for any.
        way: its name, where there are several ways to divide on one axis; a plan says it.
        unfit: `(ranks, **arguments) -> why it cannot be`, empty if it can.
        sent: `(ranks, **arguments) -> (how often a rank sends each element of an operand, by its name; collectives)`, of what
            `lower` writes, forward and backward.
        share: `(ranks, **arguments) -> the share of the work that a rank does`, where that is not its part.
        lower: `(site, **arguments) -> what stands in the node's place`; None where the local operator is enough.
    """

    letters: tuple[str, ...]
    stretch: bool = False
    zigzag: bool = False
    ends_sum: bool = False
    beside: tuple[str, ...] = ()
    only: str = ""
    way: str = ""
    unfit: Callable[..., str] | None = None
    sent: Callable[..., tuple[Mapping[str, float], int]] | None = None
    share: Callable[..., float] | None = None
    lower: Callable[..., Node] | None = None


@dataclass(frozen=True, kw_only=True)
class Index:
    """An operand that counts along a dimension of another.

    Attributes:
        operand: the indices; table, dim: along what they count.
        padding: the argument that is an index of its own, none if it is -1; ignored: one that need not be an index.
    """

    operand: str
    table: str
    dim: int
    padding: str = ""
    ignored: str = ""


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Positions of a sequence that see each other.

    Attributes:
        queries, keys: operands of what sees, and is seen; dim: of each, the one along which they stand.
        window: the argument that says how far, 0 for no limit; valid: the operand that says which keys are there.
        pairs: the operand that says of each pair whether it sees.
    """

    queries: str
    keys: str
    dim: int
    window: str
    valid: str
    pairs: str


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What is known about one operator of captured programs.

    Attributes:
        overload: the operator; local: what runs on a rank in its place.
        meaning: one sentence.
        defined: what it computes, in plain PyTorch; None for an operator of PyTorch's.
        rule: where dimensions go, in the notation of `foldcc/rules/notation.py`; or `(**arguments) -> that`.
        divisions: those that need more than the rule says.
        placed: letters that are divided over an axis of the experts' side, whatever attention's side does. Then each token
            must stand on one rank, and operands that hold such a letter are left as they are stored.
        products: `(shapes of the operands by name) -> (FLOPs, names of the first factor, of the second)` of each product.
        degree: `(degrees of the operands) -> degree of the result`, as a rational function whose hashes are new variables.
        pinned: letters of which positions are data, so that a smaller program keeps their sizes.
        alike: letters that a smaller program shrinks together.
        index, positions: see there.
        narrow: the arguments that are cast to the dtype of products, as autocast does; returns: the one whose dtype the result
            is cast back to.
        in_pieces: what is traced in place of `local` where kernels are written.
    """

    overload: Any
    local: Any
    meaning: str
    defined: Callable[..., Any] | None
    rule: str | Callable[..., str]
    divisions: tuple[Division, ...] = ()
    placed: Mapping[str, str] = field(default_factory=dict)
    products: Callable[..., Sequence[tuple[float, Sequence[str], Sequence[str]]]] | None = None
    degree: Callable[[Sequence[int]], int] | None = None
    pinned: Collection[str] = ()
    alike: Collection[str] = ()
    index: Index | None = None
    positions: Positions | None = None
    narrow: Collection[str] = ()
    returns: str | None = None
    in_pieces: Callable[..., Any] | None = None

    def arguments(self, node: Node) -> dict[str, Any]:
        """The arguments of a call by name, defaults filled in."""
        return by_name(self.overload, node.args, node.kwargs)

    def rule_of(self, node: Node) -> str:
        """The rule of a call, as text."""
        return self.rule if isinstance(self.rule, str) else self.rule(**self.arguments(node))

    def lowered(self, emit: Emit, node: Node, divided: Mapping[Division, str]) -> Node | None:
        """What stands in a node's place on a rank, None if that is the local operator on the same arguments.

        Args:
            divided: the axes on which each division was chosen.
        """
        ways = [(d, axes) for d, axes in divided.items() if d.lower is not None]
        layout: Layout = node.meta["layout"]

        def local(**arguments: Any) -> Node:
            named = {a.name: arguments.get(a.name) for a in self.local._schema.arguments if a.kwarg_only}
            return emit(
                self.local, positional(self.local, arguments), layout, **{k: x for k, x in named.items() if x is not None}
            )

        for division, axes in ways:
            local = _through(division, Site(emit, axes, layout, local))
        return local(**self.arguments(node)) if ways else None


def _through(division: Division, site: Site) -> Callable[..., Node]:
    assert division.lower is not None
    lower = division.lower
    return lambda **arguments: lower(site, **arguments)


def registered(record: Captured) -> Captured:
    """The record, which from now on is that of its operator."""
    _CAPTURED[record.overload] = record
    return record


def captured(
    schema: str,
    *,
    eager: Callable[..., Any],
    shape: Callable[..., Any],
    dissolves: bool = True,
    defined: Callable[..., Any] | None = None,
    **known: Any,
) -> Captured:
    """Registers `foldcc::<schema>`, which captured programs keep as one node, and returns its record.

    Args:
        eager: what it computes, in plain PyTorch; `shape` on fake tensors.
        dissolves: registers `foldcc::local_<schema>` as well, which on a rank becomes the ATen operators of `eager`.
        defined: another way to compute the same, so that no proof has one code on both sides.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"foldcc::{name}", shape, lib=LIBRARY)
    without_gradient(name)
    overload = local = getattr(torch.ops.foldcc, name).default
    if known.get("narrow"):
        computes_in_autocast_dtype(overload, known["narrow"], returns=known.get("returns"))
    if dissolves:
        LIBRARY.define(f"local_{schema}")
        LIBRARY.impl(f"local_{name}", eager, "CompositeImplicitAutograd")
        local = getattr(torch.ops.foldcc, f"local_{name}").default
    return registered(Captured(overload=overload, local=local, defined=defined or eager, **known))


PLAIN = Captured(overload=None, local=None, meaning="an operator without such a record", defined=None, rule="")


def captured_record(target: Any) -> Captured:
    """The record of an fx node's target; PLAIN, which says nothing, if it has none."""
    return _CAPTURED.get(target, PLAIN)


def captured_records() -> tuple[Captured, ...]:
    """All records, in the order of definition."""
    return tuple(_CAPTURED.values())
