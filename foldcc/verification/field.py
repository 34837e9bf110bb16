"""Arithmetic in the field of integers modulo a prime, on float64 tensors that carry its elements exactly.

A carrier holds integers 0 … prime - 1; -inf stands for a masked score, whose exponential is zero; NaN is what nobody
may read, such as memory that was never written. NaN is kept by every operation, so it cannot get lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

MERSENNE = 2**31 - 1
_LOWEST = -1e30  # a number below it is a mask, such as torch.finfo(...).min
_EXACT = 2**53  # up to here float64 holds every integer
FUNCTIONS = ("exp", "square", "shift")  # of which results may be known; a shift is a value whose differences are kept
_SIMPLE = 10**6  # largest denominator that a number in a program is read as


@dataclass(frozen=True)
class Field:
    """The field of a prime below 2**31, with keyed hashes for functions that have no meaning in it.

    Attributes:
        prime: how many elements the field has.
        seed: of the hashes; two fields with the same seed have the same ones.
        hashed: `(x, name) -> value of the function called name`, on finite carriers; None for keyed hashes.
        decisions: which ways each mask, branch or comparison went, by the node that was named in `at` meanwhile.
        near: positive numbers that the program compares with, which elements of the field stand near; see `order`.
        known: (x, what a function makes of x), by the function and x's place in memory; see `remember`.
    """

    prime: int = MERSENNE
    seed: int = 0
    hashed: Callable[[Tensor, str], Tensor] | None = None
    decisions: dict[str, set[bool]] = field(default_factory=dict, compare=False, repr=False)
    at: list[str] = field(default_factory=list, compare=False, repr=False)
    near: list[float] = field(default_factory=list, compare=False, repr=False)
    known: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    # --- elements ---

    def number(self, x: float | int | Fraction) -> float:
        """A number of a program as an element: 0.5 is the inverse of 2, 0.333… of 3; a mask's -1e38 is -inf."""
        if isinstance(x, float) and (math.isnan(x) or x <= _LOWEST):
            return math.nan if math.isnan(x) else -math.inf
        if isinstance(x, float) and math.isinf(x):
            return math.nan
        fraction = Fraction(x)
        simple = fraction.limit_denominator(_SIMPLE)
        if abs(simple - fraction) <= abs(fraction) * Fraction(1, 10**15):
            fraction = simple
        elif isinstance(x, float) and x == np.float32(x) and fraction.numerator != 1:
            fraction = Fraction(str(np.float32(x)))  # a kernel rounds 1e-6 to float32, and the program says 1e-6
        if fraction.denominator % self.prime == 0:
            return math.nan
        return float(fraction.numerator % self.prime * pow(fraction.denominator, -1, self.prime) % self.prime)

    def numbers(self, x: Tensor) -> Tensor:
        """A tensor of numbers of a program, integers included, as carriers."""
        if not x.is_floating_point():
            return torch.remainder(x.double(), self.prime)
        values = x.detach().double().flatten().tolist()
        return torch.tensor([self.number(v) for v in values], dtype=torch.float64).reshape(x.shape)

    def random(self, shape: Any, generator: torch.Generator) -> Tensor:
        """Elements drawn uniformly, zero left out."""
        return torch.randint(1, self.prime, tuple(shape), generator=generator).double()

    def keyed(self, x: Tensor, name: str) -> Tensor:
        """Keyed integers below the prime for finite elements, whatever stands in for other hashes."""
        return self._hash(x, name)

    # --- decisions ---

    def decided(self, mask: Tensor) -> Tensor:
        """Notes which ways a mask, branch or comparison of the captured program went, under the node that runs; see `at`."""
        if self.at and mask.numel():
            ways = self.decisions.setdefault(self.at[-1], set())
            ways |= {bool(mask.any()), bool(mask.all())}
        return mask

    # --- sums and products ---

    def reduced(self, x: Tensor) -> Tensor:
        """Integers below 2**53 in size, as elements."""
        return torch.remainder(x, self.prime)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        return torch.where(total == -math.inf, total, self.reduced(total))

    def negative(self, x: Tensor) -> Tensor:
        return self.reduced(-x)

    def times(self, x: Tensor, y: Tensor | float) -> Tensor:
        high = (x / 65536).floor_()
        low = torch.sub(x, high, alpha=65536)
        total = high * y  # from here on in place: on many ranks, a new tensor costs more than what is computed in it
        return (total.remainder_(self.prime).mul_(65536).add_(low * y)).remainder_(self.prime)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """The product of matrices, [..., m, k] by [..., k, n]: exact, because every partial sum stays below 2**53."""
        k = x.shape[-1]
        bits = 16 if k <= 64 else 11
        longest = _EXACT // (self.prime << bits)
        if k > longest:
            halves = zip(x.split(longest, -1), y.split(longest, -2), strict=True)
            return self.reduced(sum((self.matmul(a, b) for a, b in halves), torch.zeros((), dtype=x.dtype)))
        step = float(1 << bits)
        limbs = []
        for _ in range(math.ceil(31 / bits)):
            high = (x / step).floor_()
            limbs.append(torch.sub(x, high, alpha=step))
            x = high
        total = (limbs.pop() @ y).remainder_(self.prime)
        while limbs:
            total.mul_(step).add_((limbs.pop() @ y).remainder_(self.prime)).remainder_(self.prime)
        return total

    def sum(self, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
        return self.reduced(x.sum(list(range(x.dim())) if dim is None else dim, keepdim=keepdim))

    def inverse(self, x: Tensor) -> Tensor:
        """1 / x; NaN where x is zero. All at once: of the product of all, from which each is got by products of the others."""
        there = torch.isfinite(x) & (x != 0)
        level = torch.where(there, x, 1.0).flatten().long()
        levels = []
        while len(level) > 1:
            level = torch.nn.functional.pad(level, (0, len(level) % 2), value=1)
            levels.append(level)
            level = level[::2] * level[1::2] % self.prime
        result = torch.tensor([pow(int(e), -1, self.prime) for e in level], dtype=torch.long)
        for level in reversed(levels):  # of a pair's inverse, each one's is the product with the other
            pairs = level.view(-1, 2).flip(1)
            result = (pairs * result[: len(pairs), None] % self.prime).flatten()
        return torch.where(there, result[: x.numel()].view(x.shape).double(), math.nan)

    def power(self, x: Tensor, exponent: float) -> Tensor:
        """Whole exponents are products, halves those of a root; any other is a function of its own."""
        if exponent < 0 and exponent % 1 == 0.5:  # of 1 / sqrt(x), as its derivatives are
            return self.power(self.inverse(self.root(x)), -2 * exponent)
        if exponent < 0:
            return self.inverse(self.power(x, -exponent))
        if exponent % 1 == 0.5:
            root = self.root(x)
            return root if exponent == 0.5 else self.times(root, self.power(x, exponent - 0.5))
        if exponent != int(exponent):
            return self.function(f"pow {exponent}", x)
        square = self.recall("square", x) if exponent >= 2 else None
        if square is not None:
            return self.times(self.power(square, exponent // 2), self.power(x, exponent % 2))
        if exponent == 2:
            return self.times(x, x)
        result, base, left = torch.ones_like(x), x, int(exponent)
        while left:
            result, base, left = self.times(result, base) if left & 1 else result, self.times(base, base), left >> 1
        return result

    # --- everything else ---

    def function(self, name: str, x: Tensor) -> Tensor:
        """A function without a meaning in the field: a keyed hash, so that equality means the same argument."""
        value = (self.hashed or self._hash)(x, name)
        return torch.where(torch.isfinite(x), value, math.nan)

    def exp(self, x: Tensor) -> Tensor:
        known = self.recall("exp", x)
        if known is not None:
            return known
        above, size = self.halves(x)
        value = torch.where(x == 0, 1.0, self.function("exp", size))
        return torch.where(x == -math.inf, 0.0, torch.where(above, value, self.inverse(value)))

    def logistic(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """exp(x) / (1 + exp(x)), and 1 / (1 + exp(x))."""
        above, size = self.halves(x)
        value = torch.where(x == 0, 1.0, self.function("exp", size))
        rest = self.inverse(self.reduced(value + 1))
        share = self.times(value, rest)
        return torch.where(above, share, rest), torch.where(above, rest, share)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(whether x is the smaller one of x and -x, that one): for the laws of f(-x)."""
        size = torch.where(torch.isfinite(x), torch.minimum(x, self.prime - x), x)
        return size == x, size

    def root(self, x: Tensor) -> Tensor:
        return self.remember("square", self.function("sqrt", x), x)

    # --- what is known of a value, from how it was made ---

    def remember(self, function: str, x: Tensor, result: Tensor) -> Tensor:
        """Keeps what a function makes of a value, and returns the value.

        No hash has the laws exp(x - y) = exp(x) / exp(y) and sqrt(x)**2 = x, so they are kept for the values that are
        made by such a subtraction or root, for views of them and for copies.
        """
        if x.numel():
            x, result = x.contiguous(), result.expand(x.shape).contiguous()
            self.known[function, x.untyped_storage().data_ptr()] = x.detach(), result.detach()
        return x

    def recall(self, function: str, x: Tensor) -> Tensor | None:
        """What a function makes of a value, or of a view of one, that is remembered."""
        if not self.known:
            return None
        of, found = self.known.get((function, x.untyped_storage().data_ptr()), (None, None))
        if of is None or found is None or of.dtype != x.dtype:
            return None
        return found.as_strided(x.shape, x.stride(), x.storage_offset() - of.storage_offset() + found.storage_offset())

    def forget(self, x: Tensor) -> None:
        """Of a value that is overwritten nothing is known."""
        for function in FUNCTIONS if self.known else ():
            self.known.pop((function, x.untyped_storage().data_ptr()), None)

    def _hash(self, x: Tensor, name: str) -> Tensor:
        key = blake2b(f"{self.seed} {name}".encode(), digest_size=16).digest()
        first, second = (int.from_bytes(key[i : i + 8], "little", signed=True) for i in (0, 8))
        z = torch.nan_to_num(x, 0.0, 0.0, 0.0).long() ^ first
        for multiplier in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):  # splitmix64's, as signed integers
            z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * multiplier
        return ((z ^ second ^ ((z >> 31) & 0x1FFFFFFFF)) & 0x7FFFFFFFFFFFFFFF).remainder(self.prime).double()
