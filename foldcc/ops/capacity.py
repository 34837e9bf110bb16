"""Capacity: how many of a group's tokens an expert takes; choices beyond it are dropped, by setting their weights to zero.

    weights = limited(ids, weights, experts, Capacity(factor=1.25, group=4096))

It is part of what a model means: one process drops what ranks drop. Which choices stay depends on all of a group, and on
nothing else, so a division of whole groups needs nothing of other ranks; elsewhere a group's ids and weights are gathered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor

from foldcc.errors import FoldError, divisors, listed, require
from foldcc.ops.captured import Captured, registered
from foldcc.ops.operator import operator

_KEPT = ("probability", "position")


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What experts take of each group of tokens.

    Attributes:
        factor: of the share that each would take if all took alike: of G tokens that choose K of E experts, an expert takes
            `ceil(factor * G * K / E)`.
        group: G, a number of consecutive tokens of the flattened batch, such as the length of the sequences; None for all.
        keep: the choices that stay: those with the highest weights ("probability"), of equal ones the first; or the first
            ("position"). Weights that stay are what they were: nothing is normalised again.
        pad: on a fold, experts are given as many rows as their capacities hold, zeros where there are fewer: sizes are static,
            exchanges are even, and no rank waits for numbers on the host. It changes nothing of what is computed.
    """

    factor: float
    group: int | None = None
    keep: str = "probability"
    pad: bool = False

    def __post_init__(self) -> None:
        require("factor", self.factor, Real, "a number")
        require("pad", self.pad, bool, "True or False")
        if not (0 < self.factor < math.inf):
            raise FoldError(f"factor={self.factor!r} is no capacity of experts.", valid="a number above 0, such as 1.25")
        if self.group is not None and (type(self.group) is not int or self.group < 1):
            raise FoldError(f"group={self.group!r} is no number of tokens.", valid="such as a sequence's length, or None")
        if self.keep not in _KEPT:
            raise FoldError(f"keep={self.keep!r} says of no choice whether it stays.", valid=", ".join(_KEPT))


def _share(factor: float, group: int, chosen: int, experts: int) -> Fraction:
    return Fraction(str(factor)) * group * chosen / experts  # of the factor as it is written: 1.1 * 10 is 11


@torch.compiler.assume_constant_result
def _group(factor: float, group: int | None, tokens: int, chosen: int, experts: int) -> int:
    """The tokens of a group.

    Raises:
        FoldError: groups do not divide the tokens, or an expert takes less than one.
    """
    group = group or tokens
    number, rest = divmod(tokens, group)
    if rest:
        raise FoldError(
            f"Groups of {group} tokens do not divide {tokens} tokens ({tokens} = {number} * {group} + {rest}).",
            valid=f"group: {listed(divisors(tokens))}",
        )
    share = _share(factor, group, chosen, experts)
    if share < 1:
        raise FoldError(
            f"{factor} * {group} tokens * {chosen} choices / {experts} experts = {float(share):g}, a capacity of no token.",
            valid=f"a factor of at least {experts} / ({group} * {chosen}), or larger groups",
        )
    return group


def _ranked(ids: Tensor, weights: Tensor, by_weight: bool) -> tuple[Tensor, Tensor]:
    """The choices of each group in the order in which experts take them, and the expert of each."""
    ids, weights = ids.flatten(1), weights.flatten(1)
    if by_weight:
        order = weights.argsort(dim=1, descending=True, stable=True)
    else:
        order = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return order, ids.gather(1, order)


def most(ids: Tensor, experts: int, factor: float) -> int:
    """How many choices of a group an expert takes; ids are [N, G, K]."""
    return math.ceil(_share(factor, ids.shape[1], ids.shape[2], experts))


def _places(ids: Tensor, weights: Tensor, experts: int, factor: float, by_weight: bool, pad: bool) -> Tensor:
    order, chosen = _ranked(ids, weights, by_weight)
    by_expert = chosen.argsort(dim=1, stable=True)
    chosen = chosen.gather(1, by_expert).contiguous()
    place = torch.arange(chosen.shape[1], device=ids.device) - torch.searchsorted(chosen, chosen)
    place = place.masked_fill(place >= most(ids, experts, factor), -1)
    return torch.empty_like(place).scatter(1, order.gather(1, by_expert), place).view(ids.shape)


def _defined(ids: Tensor, weights: Tensor, experts: int, factor: float, by_weight: bool, pad: bool) -> Tensor:
    """The same by counting, expert by expert."""
    order, chosen = _ranked(ids, weights, by_weight)
    place = torch.zeros_like(chosen)
    for e in range(experts):
        place += (chosen == e) * ((chosen == e).cumsum(1) - 1)
    place = torch.where(place < most(ids, experts, factor), place, -1)
    return place.gather(1, order.argsort(dim=1)).view(ids.shape)


# Integers, as choices are: they are not made again where a backward pass computes again.
places = operator(
    "places(Tensor ids, Tensor weights, int experts, float factor, bool by_weight, bool pad) -> Tensor",
    meaning="of each choice, its place among those that its expert takes of a group, -1 beyond the capacity; ids are [N, G, K]",
    eager=_places,
    shape=lambda ids, weights, experts, factor, by_weight, pad: torch.empty_like(ids),
)

registered(
    Captured(
        overload=places.overload,
        local=places.overload,
        meaning=places.meaning,
        defined=_defined,
        rule="n [g] [k], n [g] [k] -> n [g] [k]",
    )
)


def limited(ids: Tensor, weights: Tensor, experts: int, capacity: Capacity) -> Tensor:
    """The weights of the choices that experts have room for; zero for the others.

    Args:
        ids: chosen experts, [T, K]; weights: theirs, [T, K].
        experts: how many there are.

    Raises:
        FoldError: the capacity does not fit the tokens, with the arithmetic, or is none.
    """
    if not isinstance(capacity, Capacity):
        raise FoldError(f"capacity is a foldcc.Capacity, not {capacity!r}.", valid="Capacity(factor=1.25)")
    tokens, chosen = ids.shape
    groups = (-1, _group(capacity.factor, capacity.group, tokens, chosen, experts), chosen)
    traced = torch.compiler.is_exporting() or torch.compiler.is_compiling()
    place = places.overload if traced else _places
    by_weight = capacity.keep == "probability"
    given = ids.reshape(groups), weights.detach().reshape(groups), experts, capacity.factor, by_weight, capacity.pad
    found = place(*given)
    return weights.masked_fill(found.reshape(ids.shape) < 0, 0)
