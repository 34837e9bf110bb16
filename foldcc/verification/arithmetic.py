"""Arithmetic: sums and products, sums into places, and constants that a program writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foldcc.verification.field import Field
from foldcc.verification.meanings import MEANINGS, meaning, value

aten = torch.ops.aten


def scaled(field: Field, x: Tensor, number: Any) -> Tensor:
    return x if number == 1 else field.times(x, field.number(number))


def over(field: Field, count: int) -> float:
    """1 / count."""
    return float(pow(count, -1, field.prime)) if count % field.prime else math.nan


@meaning("add")
def add(field: Field, x: Any, y: Any, alpha: Any = 1) -> Tensor:
    return field.add(value(field, x), scaled(field, value(field, y), alpha))


@meaning("sub")
def sub(field: Field, x: Any, y: Any, alpha: Any = 1) -> Tensor:
    x, y = value(field, x), value(field, y)
    both = (x == -math.inf) & (y == -math.inf)  # the least number of a type less itself
    result = field.add(x, torch.where(y == -math.inf, math.nan, -scaled(field, y, alpha)))
    result = torch.where(both, 0.0, result)
    if alpha == 1 and any(field.recall(known, y) is not None for known in ("shift", "exp")):
        quotient = torch.where(both, 1.0, field.times(field.exp(x), field.inverse(field.exp(y))))
        return field.remember("exp", result, torch.where(result.isnan(), math.nan, quotient))
    return result


@meaning("rsub")
def rsub(field: Field, x: Any, y: Any, alpha: Any = 1) -> Tensor:
    return sub(field, y, x, alpha)


@meaning("mul")
def mul(field: Field, x: Any, y: Any) -> Tensor:
    if isinstance(x, Tensor) and isinstance(y, Tensor) and _same(x, y):
        return field.power(value(field, x), 2)
    product = field.times(value(field, x), value(field, y))
    for flags, mask in ((x, y), (y, x)):  # times the least number of a type, which is no infinity: nothing or a mask
        least = isinstance(mask, Tensor) or not math.isinf(mask)
        if isinstance(flags, Tensor) and (not flags.is_floating_point() or not isinstance(mask, Tensor)) and least:
            flags, mask = value(field, flags), value(field, mask)
            lowest = mask == -math.inf
            if bool(lowest.any()):
                masked = lowest & MEANINGS["gt"](field, flags, 0)
                product = torch.where(masked, -math.inf, torch.where(lowest & (flags == 0), 0.0, product))
    return product


def _same(x: Tensor, y: Tensor) -> bool:
    places = [(z.untyped_storage().data_ptr(), z.storage_offset(), z.shape, z.stride()) for z in (x, y)]
    return places[0] == places[1]


@meaning("div")
def div(field: Field, x: Any, y: Any, rounding_mode: str | None = None) -> Tensor:
    quotient = field.times(value(field, x), field.inverse(value(field, y)))
    return quotient if rounding_mode is None else MEANINGS[rounding_mode](field, quotient)


@meaning("floor_divide")
def floor_divide(field: Field, x: Any, y: Any) -> Tensor:
    return div(field, x, y, "floor")


@meaning("remainder")
def remainder(field: Field, x: Any, y: Any) -> Tensor:
    return sub(field, x, mul(field, div(field, x, y, "floor"), y))


@meaning("fmod")
def fmod(field: Field, x: Any, y: Any) -> Tensor:
    return sub(field, x, mul(field, div(field, x, y, "trunc"), y))


@meaning("neg")
def neg(field: Field, x: Tensor) -> Tensor:
    return field.negative(x)


@meaning("reciprocal")
def reciprocal(field: Field, x: Any) -> Tensor:
    return field.inverse(value(field, x))


@meaning("square")
def square(field: Field, x: Tensor) -> Tensor:
    return field.power(x, 2)


@meaning("addcmul")
def addcmul(field: Field, x: Any, a: Tensor, b: Tensor, value: Any = 1) -> Tensor:
    return add(field, x, mul(field, a, b), alpha=value)


@meaning("addcdiv")
def addcdiv(field: Field, x: Any, a: Tensor, b: Tensor, value: Any = 1) -> Tensor:
    return add(field, x, div(field, a, b), alpha=value)


@meaning("lerp")
def lerp(field: Field, x: Tensor, y: Tensor, weight: Any) -> Tensor:
    return add(field, x, mul(field, sub(field, y, x), weight))


@meaning("mm", "bmm", "matmul")
def mm(field: Field, x: Tensor, y: Tensor) -> Tensor:
    return field.matmul(x, y)


@meaning("mv")
def mv(field: Field, x: Tensor, y: Tensor) -> Tensor:
    return field.matmul(x, y.unsqueeze(-1)).squeeze(-1)


@meaning("dot")
def dot(field: Field, x: Tensor, y: Tensor) -> Tensor:
    return field.matmul(x.unsqueeze(0), y.unsqueeze(1)).view(())


@meaning("linear")
def linear(field: Field, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    y = field.matmul(x, w.t())
    return y if bias is None else field.add(y, bias)


@meaning("addmm", "baddbmm")
def addmm(field: Field, bias: Tensor, x: Tensor, y: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return field.add(scaled(field, bias, beta), scaled(field, field.matmul(x, y), alpha))


@meaning("sum", "nansum")
def total(field: Field, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    return field.sum(value(field, x), dim or None, keepdim)


@meaning("mean")
def mean(field: Field, x: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    total = field.sum(x, dim or None, keepdim)
    return field.times(total, over(field, x.numel() // max(1, total.numel())))


@meaning("var")
def var(field: Field, x: Tensor, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> Tensor:
    centred = sub(field, x, mean(field, x, dim, True))
    total = field.sum(square(field, centred), dim or None, keepdim)
    count = x.numel() // max(1, total.numel())
    return field.times(total, over(field, count - int(1 if correction is None else correction)))


@meaning("var_mean")
def var_mean(field: Field, x: Tensor, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return var(field, x, dim, correction, keepdim), mean(field, x, dim, keepdim)


@meaning("std_mean")
def std_mean(field: Field, x: Tensor, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return std(field, x, dim, correction, keepdim), mean(field, x, dim, keepdim)


@meaning("std")
def std(field: Field, x: Tensor, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> Tensor:
    return field.root(var(field, x, dim, correction, keepdim))


@meaning("prod")
def prod(field: Field, x: Any, dim: int | None = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    x = value(field, x)
    rows = x.flatten().unsqueeze(-1) if dim is None else x.movedim(dim, 0)
    product = torch.ones_like(rows[0]) if len(rows) else torch.ones(rows.shape[1:], dtype=torch.float64)
    for row in rows:
        product = field.times(product, row)
    return product.squeeze(-1) if dim is None else product.unsqueeze(dim) if keepdim else product


@meaning("linalg_vector_norm")
def vector_norm(field: Field, x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    dims = list(range(x.dim())) if dim is None else dim
    if math.isinf(ord):
        return MEANINGS["amax" if ord > 0 else "amin"](field, MEANINGS["abs"](field, x), dims, keepdim)
    if ord == 2:
        return field.root(field.sum(square(field, x), dims, keepdim))
    if ord == 0:
        return (x != 0).double().sum(dims, keepdim)
    powers = field.sum(field.power(MEANINGS["abs"](field, x), float(ord)), dims, keepdim)
    return field.power(powers, 1 / ord)


@meaning("convolution")
def convolution(field: Field, x: Tensor, w: Tensor, bias: Any, *how: Any) -> Tensor:
    """Bilinear, so that it is taken of a few bits at a time, for which every sum is exact."""
    y = _by_bits(field, lambda bits: (aten.convolution(bits, w, None, *how),), x, w.numel())[0]
    return y if bias is None else field.add(y, bias.view(-1, *[1] * (w.dim() - 2)))


@meaning("convolution_backward")
def convolution_backward(
    field: Field, grad: Tensor, x: Tensor, w: Tensor, sizes: Any, *how: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *how, mask = how
    linear = lambda bits: aten.convolution_backward(bits, x, w, sizes, *how, [True, True, False])[:2]  # noqa: E731
    dx, dw = _by_bits(field, linear, grad, max(w.numel(), grad.numel()))
    db = field.sum(grad, [0, *range(2, grad.dim())]) if mask[2] else None
    return dx if mask[0] else None, dw if mask[1] else None, db


@meaning("avg_pool2d")
def avg_pool2d(field: Field, x: Tensor, *how: Any) -> Tensor:
    """Sums over windows, of numbers far below 2**53, times what the operator itself divides each by."""
    how, share = _windows(field, x, how)
    return field.times(field.reduced(aten.avg_pool2d(x, *how)), share)


@meaning("avg_pool2d_backward")
def avg_pool2d_backward(field: Field, grad: Tensor, x: Tensor, *how: Any) -> Tensor:
    how, share = _windows(field, x, how)
    return field.reduced(aten.avg_pool2d_backward(field.times(grad, share.expand_as(grad)), x, *how))


def _windows(field: Field, x: Tensor, how: tuple[Any, ...]) -> tuple[tuple[Any, ...], Tensor]:
    """The arguments that make an average a sum, and what the sum of each window is to be multiplied by."""
    summing = (*how, *((), 0, False, True)[len(how) - 1 :])[:5] + (1,)
    ones = torch.ones_like(x[..., :1, :, :])
    sizes = (aten.avg_pool2d(ones, *summing) / aten.avg_pool2d(ones, *how)).round()
    return summing, field.inverse(sizes)


def _by_bits(field: Field, linear: Callable[[Tensor], Any], x: Tensor, count: int) -> list[Tensor]:
    """What a linear function, whose results are sums of at most so many products, makes of x."""
    bits = 53 - 31 - math.ceil(math.log2(max(2, count)))
    if bits < 1:
        raise NotImplementedError(f"its sums are of {count} products")
    limbs = []
    for _ in range(math.ceil(31 / bits)):
        high = (x / 2.0**bits).floor()
        limbs.append(x - high * 2.0**bits)
        x = high
    totals = [field.reduced(y) for y in linear(limbs.pop())]
    while limbs:
        pairs = zip(totals, linear(limbs.pop()), strict=True)
        totals = [field.reduced(field.times(t, 2.0**bits) + field.reduced(y)) for t, y in pairs]
    return totals


@meaning("cumsum")
def cumsum(field: Field, x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    return field.reduced(x.cumsum(dim))


@meaning("cumprod")
def cumprod(field: Field, x: Any, dim: int, dtype: Any = None) -> Tensor:
    rows = list(value(field, x).unbind(dim))
    for i in range(1, len(rows)):
        rows[i] = field.times(rows[i - 1], rows[i])
    return torch.stack(rows, dim) if rows else value(field, x)


@meaning("trace")
def trace(field: Field, x: Tensor) -> Tensor:
    return field.reduced(x.trace())


@meaning("index_add")
def index_add(field: Field, x: Tensor, dim: int, index: Tensor, source: Tensor, alpha: Any = 1) -> Tensor:
    return field.reduced(x.index_add(dim, index, scaled(field, source, alpha)))


@meaning("scatter_add")
def scatter_add(field: Field, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return field.reduced(x.scatter_add(dim, index, source))


@meaning("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(field: Field, x: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
    return field.reduced(aten.index_put(x, indices, value(field, values), accumulate))


@meaning("embedding")
def embedding(field: Field, w: Tensor, ids: Tensor, padding: int = -1, scale: bool = False, sparse: bool = False) -> Tensor:
    return w[ids]


@meaning("embedding_dense_backward")
def embedding_dense_backward(field: Field, grad: Tensor, ids: Tensor, rows: int, padding: int, scale: bool) -> Tensor:
    if scale:
        raise NotImplementedError("an embedding whose gradient is scaled by frequency")
    kept = torch.where((ids == padding).unsqueeze(-1), 0.0, grad)
    start = torch.zeros(rows, grad.shape[-1], dtype=grad.dtype)
    return field.reduced(start.index_add(0, ids.flatten(), kept.flatten(0, -2)))


@meaning("view", "_unsafe_view", "_reshape_alias")
def view(field: Field, x: Tensor, size: Any, *strides: Any) -> Tensor:
    """A carrier may lie in memory in another order than the operator's own result would."""
    return x.reshape(size)


@meaning("slice_scatter")
def slice_scatter(
    field: Field, x: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """PyTorch's own copies all memory that x is a part of, which may be the stack of all ranks."""
    y = x.clone()
    y.movedim(dim, 0)[start:end:step] = source.movedim(dim, 0)
    return y


@meaning("fill")
def fill(field: Field, x: Tensor, number: Any) -> Tensor:
    return torch.zeros_like(x) + value(field, number)


@meaning("full")
def full(field: Field, size: Any, value: Any, **kwargs: Any) -> Tensor:
    return aten.full(size, field.number(value), dtype=torch.float64)


@meaning("full_like")
def full_like(field: Field, x: Tensor, value: Any, **kwargs: Any) -> Tensor:
    return aten.full(x.shape, field.number(value), dtype=torch.float64)


@meaning("new_full")
def new_full(field: Field, x: Tensor, size: Any, value: Any, **kwargs: Any) -> Tensor:
    return aten.full(size, field.number(value), dtype=torch.float64)


@meaning("ones")
def ones(field: Field, size: Any, **kwargs: Any) -> Tensor:
    return aten.ones(size, dtype=torch.float64)


@meaning("new_ones")
def new_ones(field: Field, x: Tensor, size: Any, **kwargs: Any) -> Tensor:
    return aten.ones(size, dtype=torch.float64)


@meaning("scalar_tensor")
def scalar_tensor(field: Field, number: Any, **kwargs: Any) -> Tensor:
    return value(field, number)


@meaning("arange")
def arange(field: Field, *bounds: Any, **kwargs: Any) -> Tensor:
    return field.numbers(aten.arange(*bounds, dtype=torch.float64))


@meaning("linspace")
def linspace(field: Field, *bounds: Any, **kwargs: Any) -> Tensor:
    return field.numbers(aten.linspace(*bounds, dtype=torch.float64))


@meaning("nan_to_num")
def nan_to_num(field: Field, x: Tensor, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Tensor:
    """An infinity is the carrier of a type's least number as well, which the operator keeps or makes of it."""
    field.decided(~torch.isfinite(x))
    lowest = x if neginf is None else torch.where(x == -math.inf, value(field, neginf), x)
    return torch.where(x.isnan(), value(field, 0.0 if nan is None else nan), lowest)


@meaning("eye")
def eye(field: Field, *sizes: Any, **kwargs: Any) -> Tensor:
    return torch.eye(*sizes, dtype=torch.float64)


@meaning("masked_fill")
def masked_fill(field: Field, x: Tensor, mask: Tensor, number: Any) -> Tensor:
    return torch.where(mask, value(field, number), x)


@meaning("scatter")
def scatter(field: Field, x: Tensor, dim: int, index: Tensor, source: Any = None, value: Any = None) -> Tensor:
    source = value if source is None else source
    return x.scatter(dim, index, source if isinstance(source, Tensor) else field.number(source))


@meaning("constant_pad_nd")
def constant_pad_nd(field: Field, x: Tensor, pad: Any, value: Any = 0) -> Tensor:
    return aten.constant_pad_nd(x, pad, field.number(value))
