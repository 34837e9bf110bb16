"""Random numbers that are a function of a key and of where an element stands, and of nothing else.

    bits = random_bits(key, [rows, columns])        rows [4], columns [16]: 24 random bits for each element of [4, 16]

A rank that is given its own positions draws the numbers of these positions: every division gives the same numbers, and so
does drawing them again. Such generators are called counter-based (Salmon et al. 2011, doi:10.1145/2063384.2063405). The mixer
is that of splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foldcc.errors import FoldError
from foldcc.ops.captured import Captured, registered
from foldcc.ops.operator import Operator, operator

BITS = 24  # what a float32 below 1 holds, so that a number is the same in every type
_GOLDEN = -0x61C8864680B583EB  # odd constants of splitmix64, as signed integers
_AT_ONCE = 1 << 22  # elements that are mixed at once, in 8 bytes each
_MIXER = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))


def _shifted(z: Tensor, by: int) -> Tensor:
    """A shift that brings zeros, where that of signed integers brings copies of the sign."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


def mixed(z: Tensor) -> Tensor:
    """A bijection of 64-bit integers, in which every bit of the result depends on every bit; in place."""
    for by, factor in _MIXER:
        z.bitwise_xor_(_shifted(z, by)).mul_(factor)
    return z.bitwise_xor_(_shifted(z, 31))


def _bits(key: Tensor, at: Sequence[Tensor]) -> Tensor:
    z = mixed(key.clone())
    for positions in at[:-1]:
        z = mixed(z.unsqueeze(-1) + (positions + 1) * _GOLDEN)
    if not at:
        return _narrowed(z)
    columns = (at[-1] + 1) * _GOLDEN
    found = z.new_empty((z.numel(), len(columns)), dtype=torch.int32)
    step = max(1, _AT_ONCE // max(1, len(columns)))
    for rows, into in zip(z.view(-1, 1).split(step), found.split(step), strict=True):
        into.copy_(_narrowed(mixed(rows + columns)))
    return found.view(*z.shape, len(columns))


def _narrowed(z: Tensor) -> Tensor:
    return _shifted(z, 64 - BITS).to(torch.int32)


random_bits: Operator = operator(
    "random_bits(Tensor key, Tensor[] at) -> Tensor",
    meaning="random bits for each element, of a key and its positions: at[d] are those along dimension d",
    eager=_bits,
    shape=lambda key, at: key.new_empty([x.shape[0] for x in at], dtype=torch.int32),
)


def _rule(at: Sequence[Any], **_: Any) -> str:
    letters = [chr(ord("A") + d) for d in range(len(at))]
    return f"{', '.join(['', *letters])} -> {' '.join(letters)}"


registered(
    Captured(
        overload=random_bits.overload,
        local=random_bits.overload,
        meaning=random_bits.meaning,
        defined=None,
        rule=_rule,
    )
)


# --- what PyTorch's random operators draw, of these bits ---

Options = Mapping[str, Any]  # positions and dtype of what is drawn, `at` and `dtype`, and the operator's arguments by name


def everywhere(shape: Sequence[int], device: torch.device) -> list[Tensor]:
    """The positions of a whole tensor."""
    return [torch.arange(n, device=device) for n in shape]


def _units(key: Tensor, given: Options, wide: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 2**-24 in [0, 1), at least as wide as they are asked for."""
    return random_bits(key, given["at"]).to(torch.promote_types(given["dtype"], wide)) * 2.0**-BITS


def _fixed(x: Any) -> Any:
    """A parameter of a distribution, which gets no gradient."""
    return x.detach() if isinstance(x, Tensor) else x


def kept(key: Tensor, at: Sequence[Tensor], share: float) -> Tensor:
    """A mask that is true for a share of the elements."""
    return random_bits(key, at) < round(share * 2**BITS)


def gain(dropout: float) -> float:
    """By what the elements that dropout keeps are multiplied."""
    return 0.0 if dropout == 1 else 1 / (1 - dropout)


def _bernoulli(key: Tensor, given: Options) -> Tensor:
    share = given.get("p", given.get("self"))
    if isinstance(share, Tensor):
        return (_units(key, given) < share.detach()).to(given["dtype"])
    return kept(key, given["at"], share).to(given["dtype"])


def _uniform(key: Tensor, given: Options) -> Tensor:
    low, high = given.get("from", 0.0), given.get("to", 1.0)
    found = (_units(key, given) * (high - low) + low).to(given["dtype"])
    # Narrow types round numbers up to 1, which is none of them: logarithms of 1 - u are taken. PyTorch does the same on CUDA.
    return torch.where(found == 1, low, found) if high == 1 and given["dtype"].itemsize < 4 else found


def _normal(key: Tensor, given: Options) -> Tensor:
    """Box and Muller's, of two numbers for each; in float64, because logarithms of vectors and of numbers round differently."""
    both = [*given["at"], *everywhere([2], key.device)]
    first, second = _units(key, {**given, "at": both}, torch.float64).unbind(-1)
    found = (torch.log1p(-first) * -2).sqrt() * (second * (2 * math.pi)).cos()
    return (found * _fixed(given.get("std", 1.0)) + _fixed(given.get("mean", 0.0))).to(given["dtype"])


def _exponential(key: Tensor, given: Options) -> Tensor:
    return (torch.log1p(-_units(key, given, torch.float64)) / -given["lambd"]).to(given["dtype"])


def _integers(key: Tensor, given: Options) -> Tensor:
    low = given.get("low", 0)
    return (((random_bits(key, given["at"]).long() * (given["high"] - low)) >> BITS) + low).to(given["dtype"])


def _order(key: Tensor, given: Options) -> Tensor:
    """An order of all positions: by two numbers for each, of which hardly any are equal."""
    first, second = random_bits(key, [*given["at"], *everywhere([2], key.device)]).long().unbind(-1)
    return ((first << BITS) + second).argsort(stable=True).to(given["dtype"])


def _choices(key: Tensor, given: Options) -> Tensor:
    """Of numbers p, places with the chance of p each: where p / e is largest, with exponential e, and the next ones.

    With replacement, each choice has numbers e of its own. None of them is zero, so that what has no chance is not chosen.
    """
    p, count = given["self"].detach(), given["num_samples"]
    shape = [*p.shape[:-1], *([count] if given["replacement"] else []), p.shape[-1]]
    bits = random_bits(key, everywhere(shape, key.device)).to(torch.float64)
    waits = -torch.log1p((bits + 0.5) * -(2.0**-BITS))
    ratios = (p.unsqueeze(-2) if given["replacement"] else p) / waits
    return ratios.argmax(-1) if given["replacement"] else ratios.topk(count, -1).indices


# By the operator's name, without the _ of one that writes into its operand.
DRAWS: dict[str, Callable[[Tensor, Options], Tensor]] = {
    "bernoulli": _bernoulli,
    "exponential": _exponential,
    "multinomial": _choices,
    "randperm": _order,
    **dict.fromkeys(("normal", "normal_functional", "randn", "randn_like"), _normal),
    **dict.fromkeys(("rand", "rand_like", "uniform"), _uniform),
    **dict.fromkeys(("randint", "randint_like"), _integers),
}


def name_of_draw(target: Any) -> str:
    """What DRAWS calls an operator; empty if it makes no random numbers."""
    random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
    return target._schema.name.removeprefix("aten::").rstrip("_") if random else ""


def check_draw(target: Any, given: Options) -> None:
    """Raises:
    FoldError: what an operator draws is no function of a key and of positions.
    """
    why = ""
    name = name_of_draw(target)
    if name not in DRAWS and name != "native_dropout":
        why = "whose numbers are not drawn for each element alone"
    elif given.get("generator") is not None:
        why = "with a generator of its own, where numbers come from the default one"
    elif name.startswith("randint") and given["high"] - given.get("low", 0) > 2**BITS:
        why = f"from more than 2**{BITS} integers"
    if why:
        raise FoldError(
            f"The model draws random numbers with {target}, {why}.",
            valid="dropout, rand, randn, randint, randperm, multinomial, bernoulli, uniform_, normal_, exponential_; eval()",
        )
