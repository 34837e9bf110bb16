"""Order: one signed order of the field's elements, and every operator that compares, chooses, clamps, rounds or casts to int.

A field has no order, so each element is given a place among the real numbers. What is a small fraction, as integers, masks,
counts and positions are, stands where it stands among the real numbers, also after arithmetic. Any other element stands at a
keyed place of its own: its sign and its size are functions of the exact element, and -x stands opposite to x. So a clamp or a
mask that is left out changes about half of the elements, and two programs decide alike where they compare the same.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foldcc.verification.field import Field
from foldcc.verification.meanings import MEANINGS, Meaning, meaning, value

aten = torch.ops.aten
_HEIGHT = 2**21  # a fraction n / d with n * d below it is read as data; one random element in a hundred looks like one
_STEPS = 46  # that Euclid's algorithm takes at most below 2**31
_DECADES = 4.0  # keyed places lie between 1e-4 and 1e4, evenly in each power of ten
_CLOSE = 6.0  # those near a number differ from it by a part in one to a million
_INTEGERS = 16  # a number that is no data is cast to one of so many integers


def fraction(field: Field, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, d, whether x is the small fraction n / d), by Euclid's algorithm: every such fraction is among its convergents.

    Of several the one of least height, so that 1 / 2048 is not taken for 2**20, which is the same element.
    """
    finite = torch.isfinite(x)
    rest = torch.where(finite, x, 0.0).flatten()
    before, d_before, d = torch.full_like(rest, field.prime), torch.zeros_like(rest), torch.ones_like(rest)
    n, found, least = torch.zeros_like(rest), torch.ones_like(rest), torch.full_like(rest, _HEIGHT).masked_fill_(rest == 0, 0.0)
    size, height, quotient = d.clone(), torch.empty_like(rest), torch.empty_like(rest)
    for _ in range(_STEPS):  # x * d = rest, modulo the prime; in place, for it takes most of the time
        if not bool(((size < _HEIGHT) & (rest > 0)).any()):
            break
        torch.mul(rest, size, out=height).masked_fill_(rest == 0, _HEIGHT)
        at = (height < least).nonzero(as_tuple=True)
        n[at], found[at], least[at] = rest[at], d[at], height[at]
        torch.div(before, torch.clamp(rest, min=1, out=quotient), out=quotient).floor_()
        before, rest = rest, before.addcmul_(quotient, rest, value=-1)
        d_before, d = d, d_before.addcmul_(quotient, d, value=-1)
        torch.abs(d, out=size)
    n, d = (n * found.sign()).long().view(x.shape), found.abs().long().view(x.shape)
    return n, d, finite & (least < _HEIGHT).view(x.shape)


def standing(field: Field, x: Any) -> Tensor:
    """Where a carrier's elements stand among the real numbers; a number of the program stands where it is."""
    if not isinstance(x, Tensor):
        number = float(x)
        if math.isnan(number) or abs(number) >= 1e30:
            return torch.tensor(number if math.isnan(number) else math.copysign(math.inf, number), dtype=torch.float64)
        n, d, data = fraction(field, value(field, x))
        return torch.where(data, n.double() / d, number)
    x = value(field, x)
    n, d, data = fraction(field, x)
    size = torch.minimum(x, field.prime - x)
    key = field.keyed(size, "order")
    sign = torch.where((size == x) ^ (key % 2 == 0), 1.0, -1.0)
    unit = (key * 2**21 + size % 2**21) / 2**52  # all different, so that no two elements are equal
    place = sign * _size(field, unit)
    return torch.where(data, n.double() / d, torch.where(torch.isfinite(x), place, x))


def _size(field: Field, unit: Tensor) -> Tensor:
    """How far from zero: in any power of ten, or, every other time, near a number that the program compares with.

    So a threshold that is moved a little lets some elements go the other way.
    """
    anywhere = torch.pow(10.0, (2 * unit - 1) * _DECADES)
    if not field.near:
        return anywhere
    choice = unit * 2 * len(field.near)
    which = choice.floor()
    rest = (choice - which) * 2
    apart = torch.pow(10.0, (rest % 1 - 1) * _CLOSE)
    numbers = torch.tensor(field.near, dtype=torch.float64)
    near = numbers[which.long() % len(numbers)] * torch.where(rest < 1, 1 - 0.9 * apart, 1 + apart)
    return torch.where(which < len(numbers), near, torch.pow(10.0, (4 * unit - 3) * _DECADES))


# --- comparisons ---


def _comparison(name: str) -> Meaning:
    compare = getattr(operator, name)

    def compared(field: Field, x: Any, y: Any) -> Tensor:
        if name in ("eq", "ne"):
            never = not isinstance(y, Tensor) and (math.isnan(y) or y == math.inf)
            return torch.full(x.shape, name == "ne") if never else compare(value(field, x), value(field, y))
        return compare(standing(field, x), standing(field, y))

    return meaning(name)(compared)


for _name in ("eq", "ne", "ge", "gt", "le", "lt"):
    _comparison(_name)


def positive(field: Field, x: Tensor, than: Any = 0.0) -> Tensor:
    """Whether x > than, which is noted as a decision of the program."""
    return field.decided(standing(field, x) > standing(field, than))


@meaning("where")
def where(field: Field, mask: Tensor, x: Any = None, y: Any = None) -> Any:
    return torch.where(mask) if x is None else torch.where(mask, value(field, x), value(field, y))


@meaning("clamp")
def clamp(field: Field, x: Any, min: Any = None, max: Any = None) -> Tensor:
    y = value(field, x)
    for bound, beyond in ((min, operator.lt), (max, operator.gt)):
        if bound is not None:
            outside = field.decided(beyond(standing(field, y), standing(field, bound)))
            y = torch.where(outside, value(field, bound), y)
    return y


@meaning("clamp_min")
def clamp_min(field: Field, x: Tensor, min: Any) -> Tensor:
    return clamp(field, x, min)


@meaning("clamp_max")
def clamp_max(field: Field, x: Tensor, max: Any) -> Tensor:
    return clamp(field, x, None, max)


@meaning("hardtanh")
def hardtanh(field: Field, x: Tensor, low: Any = -1, high: Any = 1) -> Tensor:
    return clamp(field, x, low, high)


@meaning("hardtanh_backward")
def hardtanh_backward(field: Field, grad: Tensor, x: Tensor, low: Any, high: Any) -> Tensor:
    at = standing(field, x)
    return torch.where((at > standing(field, low)) & (at < standing(field, high)), grad, 0.0)


@meaning("relu")
def relu(field: Field, x: Tensor) -> Tensor:
    return torch.where(positive(field, x), x, 0.0)


@meaning("threshold")
def threshold(field: Field, x: Tensor, bound: Any, other: Any) -> Tensor:
    return torch.where(positive(field, x, bound), x, value(field, other))


@meaning("threshold_backward")
def threshold_backward(field: Field, grad: Tensor, x: Tensor, bound: Any) -> Tensor:
    return torch.where(positive(field, x, bound), grad, 0.0)


@meaning("leaky_relu")
def leaky_relu(field: Field, x: Tensor, slope: Any = 0.01) -> Tensor:
    return torch.where(positive(field, x), x, field.times(x, value(field, slope)))


@meaning("leaky_relu_backward")
def leaky_relu_backward(field: Field, grad: Tensor, x: Tensor, slope: Any, is_result: bool) -> Tensor:
    if is_result:
        raise NotImplementedError("a derivative that is given the result only, whose sign is not its operand's")
    return torch.where(positive(field, x), grad, field.times(grad, value(field, slope)))


@meaning("_prelu_kernel")
def prelu(field: Field, x: Tensor, weight: Tensor) -> Tensor:
    return torch.where(positive(field, x), x, field.times(x, weight))


@meaning("_prelu_kernel_backward")
def prelu_backward(field: Field, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    above = positive(field, x)
    return torch.where(above, grad, field.times(grad, weight)), torch.where(above, 0.0, field.times(grad, x))


@meaning("abs")
def absolute(field: Field, x: Tensor) -> Tensor:
    return torch.where(field.decided(standing(field, x) < 0), field.negative(x), x)


@meaning("sign", "sgn")
def sign(field: Field, x: Tensor) -> Tensor:
    at = standing(field, x)
    return torch.where(at < 0, field.prime - 1.0, torch.where(at > 0, 1.0, at))


# --- the largest, the smallest, the order ---


@meaning("maximum", "fmax")
def maximum(field: Field, x: Any, y: Any) -> Tensor:
    x, y = value(field, x), value(field, y)
    found = torch.where(field.decided(_at_least(field, x, y)), x, y)
    return field.remember("shift", found, found)


@meaning("minimum", "fmin")
def minimum(field: Field, x: Any, y: Any) -> Tensor:
    x, y = value(field, x), value(field, y)
    return torch.where(field.decided(_at_least(field, y, x)), x, y)


def _at_least(field: Field, x: Tensor, y: Tensor) -> Tensor:
    at = standing(field, x)
    return (at >= standing(field, y)) | at.isnan()


def _picked(name: str, dim_first: int) -> None:
    operator_ = getattr(aten, name)

    @meaning(name)
    def picked(field: Field, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        dim = kwargs.get("dim", args[dim_first] if len(args) > dim_first else -1)
        index = operator_(standing(field, x), *args, **kwargs)[1]
        at = index if kwargs.get("keepdim") or index.dim() == x.dim() or not x.dim() else index.unsqueeze(dim)
        found = x.gather(dim, at) if x.dim() else x.clone()
        return found.reshape(index.shape), index


for _name, _dim in (("topk", 1), ("kthvalue", 1), ("sort", 0), ("cummax", 0), ("cummin", 0), ("mode", 0)):
    _picked(_name, _dim)


@meaning("aminmax")
def aminmax(field: Field, x: Tensor, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    dims = () if dim is None else dim
    return MEANINGS["amin"](field, x, dims, keepdim), MEANINGS["amax"](field, x, dims, keepdim)


@meaning("median")
def median(field: Field, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """The lower of the two in the middle."""
    if dim is None:
        return median(field, x.flatten(), 0)[0]
    return MEANINGS["kthvalue"](field, x, (x.shape[dim] + 1) // 2, dim, keepdim)


def _extreme(name: str, pick: Callable[..., Tensor], both: Meaning) -> None:
    def extreme(field: Field, x: Tensor, dim: Any = (), keepdim: bool = False) -> Any:
        """Over some dimensions: the element, as if they were one."""
        x = value(field, x)
        dims = range(x.dim()) if dim is None or dim == () or dim == [] else [dim] if isinstance(dim, int) else dim
        gone = sorted(d % max(1, x.dim()) for d in dims)
        left = [d for d in range(x.dim()) if d not in gone]
        rows = x.permute(*left, *gone).reshape(*(x.shape[d] for d in left), -1)
        found = rows.gather(-1, pick(standing(field, rows), -1, True)).squeeze(-1)
        found = found.reshape([1 if d in gone else x.shape[d] for d in range(x.dim())]) if keepdim else found
        return field.remember("shift", found, found)

    def largest(field: Field, x: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
        if isinstance(dim, Tensor):
            return both(field, x, dim)
        if dim is None:
            return extreme(field, x)
        if not x.dim():
            return x.clone(), torch.zeros((), dtype=torch.long)
        index = pick(standing(field, x), dim, True)
        found = x.gather(dim, index)
        found = field.remember("shift", found, found)
        return (found, index) if keepdim else (found.squeeze(dim), index.squeeze(dim))

    meaning("a" + name)(extreme)
    meaning(name)(largest)


_extreme("max", torch.argmax, maximum)
_extreme("min", torch.argmin, minimum)


def _by_place(name: str) -> None:
    operator_ = getattr(aten, name)

    @meaning(name)
    def placed(field: Field, *args: Any, **kwargs: Any) -> Any:
        """Its result is positions or counts: those of the elements' places."""
        floats = lambda x: standing(field, x) if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
        return operator_(*map(floats, args), **{k: floats(v) for k, v in kwargs.items()})


for _name in ("argmax", "argmin", "argsort", "bucketize", "searchsorted"):
    _by_place(_name)


@meaning("histc")
def histc(field: Field, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return aten.histc(standing(field, x), *args, **kwargs)


# --- rounding ---


def _whole(name: str, of: Callable[[Tensor, Tensor], Tensor], keyed: Callable[[Field, Tensor], Tensor]) -> Meaning:
    def rounded(field: Field, x: Any, decimals: int = 0) -> Tensor:
        """Of data, what it is; of any other element a keyed function."""
        x = value(field, x)
        if decimals:
            scale = value(field, 10**decimals)
            return field.times(rounded(field, field.times(x, scale)), field.inverse(scale))
        n, d, data = fraction(field, x)
        return torch.where(data, field.reduced(of(n, d).double()), keyed(field, x))

    return meaning(name)(rounded)


def _odd(name: str) -> Callable[[Field, Tensor], Tensor]:
    def keyed(field: Field, x: Tensor) -> Tensor:
        above, size = field.halves(x)
        y = field.function(name, size)
        return torch.where(above, y, field.negative(y))

    return keyed


def _below(field: Field, x: Tensor) -> Tensor:
    return field.function("floor", x)


floor = _whole("floor", lambda n, d: torch.div(n, d, rounding_mode="floor"), _below)
ceil = _whole("ceil", lambda n, d: -torch.div(-n, d, rounding_mode="floor"), lambda f, x: f.negative(_below(f, f.negative(x))))
trunc = _whole("trunc", lambda n, d: torch.div(n, d, rounding_mode="trunc"), _odd("trunc"))
round_ = _whole("round", lambda n, d: (n.double() / d).round().long(), _odd("round"))
ROUNDED = {"floor": floor, "trunc": trunc}


@meaning("frac")
def frac(field: Field, x: Tensor) -> Tensor:
    return field.add(x, field.negative(trunc(field, x)))


def to_integer(field: Field, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A cast: true or false is exact, data is cut off as it is, any other element becomes one of a few integers."""
    if dtype == torch.bool or not x.is_floating_point():
        return x.to(dtype)
    n, d, data = fraction(field, x)
    keyed = field.keyed(torch.where(torch.isfinite(x), x, 0.0), "to an integer").long() % _INTEGERS
    return torch.where(data, torch.div(n, d, rounding_mode="trunc"), keyed).to(dtype)
