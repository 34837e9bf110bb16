"""Softmax, losses, norms, attention, triangular systems: sums and inverses of hashes, so that dividing them stays exact."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foldcc.verification.arithmetic import add, mean, mul, square, sub
from foldcc.verification.field import Field
from foldcc.verification.functions import rsqrt
from foldcc.verification.meanings import MEANINGS, meaning


@meaning("linalg_solve_triangular")
def solve_triangular(
    field: Field, a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """x of `a @ x = b`, or of `x @ a = b`, one row after the other: what is known of x is taken from b."""
    if not left:
        return solve_triangular(field, a.mT, b.mT, upper=not upper, unitriangular=unitriangular).mT
    count = a.shape[-1]
    rows: dict[int, Tensor] = {}
    for i in range(count - 1, -1, -1) if upper else range(count):
        row = b[..., i : i + 1, :].expand(*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), 1, b.shape[-1])
        if rows:
            row = sub(field, row, field.matmul(a[..., i : i + 1, list(rows)], torch.cat([*rows.values()], -2)))
        rows[i] = row if unitriangular else field.times(row, field.inverse(a[..., i : i + 1, i : i + 1]))
    return torch.cat([rows[i] for i in range(count)], -2)


@meaning("_softmax")
def softmax(field: Field, x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """A row of the least number of a type, which is no infinity, is as likely everywhere."""
    weights = torch.where((x == -math.inf).all(dim, keepdim=True), 1.0, field.exp(x))
    return field.times(weights, field.inverse(field.sum(weights, dim, True)))


@meaning("_safe_softmax")
def safe_softmax(field: Field, x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    empty = (x == -math.inf).all(dim, keepdim=True)
    return torch.where(empty, 0.0, softmax(field, x, dim))


@meaning("logsumexp")
def logsumexp(field: Field, x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    largest = MEANINGS["amax"](field, x, dim, True)
    total = MEANINGS["log"](field, field.sum(field.exp(sub(field, x, largest)), dim, True))
    y = field.remember("exp", field.add(largest, total), field.sum(field.exp(x), dim, True))
    return y if keepdim else y.squeeze(dim)


@meaning("_softmax_backward_data")
def softmax_backward_data(field: Field, grad: Tensor, y: Tensor, dim: int, dtype: Any = None) -> Tensor:
    product = mul(field, grad, y)
    return sub(field, product, mul(field, y, field.sum(product, dim, True)))


@meaning("_log_softmax")
def log_softmax(field: Field, x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """The exponential of the result is the softmax, which is remembered for the derivative: it is given the result only."""
    shifted = sub(field, x, MEANINGS["amax"](field, x, dim, True))
    weights = field.exp(shifted)
    total = field.sum(weights, dim, True)
    return sub(field, shifted, MEANINGS["log"](field, total))


@meaning("_log_softmax_backward_data")
def log_softmax_backward_data(field: Field, grad: Tensor, y: Tensor, dim: int, dtype: Any = None) -> Tensor:
    return sub(field, grad, mul(field, field.exp(y), field.sum(grad, dim, True)))


@meaning("nll_loss_forward")
def nll_loss_forward(
    field: Field, x: Tensor, target: Tensor, weight: Any, reduction: int, ignore: int
) -> tuple[Tensor, Tensor]:
    if weight is not None:
        raise NotImplementedError("a loss with class weights")
    valid = target != ignore
    each = x.gather(-1, torch.where(valid, target, 0).unsqueeze(-1)).squeeze(-1)
    losses = torch.where(valid, field.negative(each), 0.0)
    count = valid.sum().double()
    if reduction == 0:
        return losses, torch.zeros(())
    total = field.sum(losses)
    return (field.times(total, field.inverse(count)) if reduction == 1 else total), count


@meaning("nll_loss_backward")
def nll_loss_backward(
    field: Field, grad: Tensor, x: Tensor, target: Tensor, weight: Any, reduction: int, ignore: int, count: Tensor
) -> Tensor:
    valid = target != ignore
    each = grad if reduction != 1 else field.times(grad, field.inverse(count))
    each = torch.where(valid, field.negative(each).expand(target.shape), 0.0)
    return torch.zeros_like(x).scatter(-1, torch.where(valid, target, 0).unsqueeze(-1), each.unsqueeze(-1))


@meaning("native_layer_norm")
def native_layer_norm(field: Field, x: Tensor, shape: Any, w: Any, b: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(-len(shape), 0))
    middle = mean(field, x, dims, True)
    centred = sub(field, x, middle)
    inverse = rsqrt(field, add(field, mean(field, square(field, centred), dims, True), eps))
    y = mul(field, centred, inverse)
    y = y if w is None else mul(field, y, w)
    return (y if b is None else field.add(y, b)), middle, inverse


@meaning("native_layer_norm_backward")
def native_layer_norm_backward(
    field: Field, grad: Tensor, x: Tensor, shape: Any, middle: Tensor, inverse: Tensor, w: Any, b: Any, mask: Any
) -> tuple[Any, Any, Any]:
    dims, rows = list(range(-len(shape), 0)), list(range(x.dim() - len(shape)))
    normal = mul(field, sub(field, x, middle), inverse)
    weighted = grad if w is None else mul(field, grad, w)
    inner = mul(field, normal, mean(field, mul(field, weighted, normal), dims, True))
    dx = mul(field, inverse, sub(field, sub(field, weighted, mean(field, weighted, dims, True)), inner))
    dw, db = mul(field, grad, normal), grad
    if rows:
        dw, db = field.sum(dw, rows), field.sum(db, rows)
    return tuple(g if wanted else None for g, wanted in zip((dx, dw, db), mask, strict=True))  # type: ignore[return-value]


@meaning("_fused_rms_norm")
def fused_rms_norm(field: Field, x: Tensor, shape: Any, w: Any, eps: Any) -> tuple[Tensor, Tensor]:
    dims = list(range(-len(shape), 0))
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    inverse = rsqrt(field, add(field, mean(field, square(field, x), dims, True), eps))
    y = mul(field, x, inverse)
    return (y if w is None else mul(field, y, w)), inverse


@meaning("_fused_rms_norm_backward")
def fused_rms_norm_backward(
    field: Field, grad: Tensor, x: Tensor, shape: Any, inverse: Tensor, w: Any, mask: Any
) -> tuple[Any, Any]:
    dims, rows = list(range(-len(shape), 0)), list(range(x.dim() - len(shape)))
    normal = mul(field, x, inverse)
    weighted = grad if w is None else mul(field, grad, w)
    inner = mul(field, normal, mean(field, mul(field, weighted, normal), dims, True))
    dx = mul(field, inverse, sub(field, weighted, inner))
    dw = mul(field, grad, normal)
    dw = field.sum(dw, rows) if rows else dw
    return tuple(g if wanted else None for g, wanted in zip((dx, dw), mask, strict=True))  # type: ignore[return-value]


def _attend(
    field: Field, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Any, scale: Any
) -> tuple[Tensor, Tensor, Tensor, float]:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    factor = field.number(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = field.times(field.matmul(q, k.transpose(-1, -2)), factor)
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask, scores, -math.inf)
    elif mask is not None:
        scores = field.add(scores, mask)
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = torch.where(allowed, scores, -math.inf)
    return k, v, safe_softmax(field, scores, -1), factor


@meaning("_scaled_dot_product_flash_attention_for_cpu")
def scaled_dot_product_flash_attention_for_cpu(
    field: Field,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    attn_mask: Any = None,
    scale: Any = None,
) -> tuple[Tensor, Tensor]:
    if dropout:
        raise NotImplementedError("dropout")
    _, v, weights, _ = _attend(field, q, k, v, causal, attn_mask, scale)
    return field.matmul(weights, v), field.sum(weights, -1)


@meaning("_scaled_dot_product_flash_attention_for_cpu_backward")
def scaled_dot_product_flash_attention_for_cpu_backward(
    field: Field,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout: float,
    causal: bool,
    attn_mask: Any = None,
    scale: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = k.shape[1]
    k, v, weights, factor = _attend(field, q, k, v, causal, attn_mask, scale)
    dv = field.matmul(weights.transpose(-1, -2), grad)
    dweights = field.matmul(grad, v.transpose(-1, -2))
    dscores = field.times(softmax_backward_data(field, dweights, weights, -1), factor)
    dq, dk = field.matmul(dscores, k), field.matmul(dscores.transpose(-1, -2), q)
    if heads != q.shape[1]:
        dk, dv = (field.sum(x.unflatten(1, (heads, -1)), 2) for x in (dk, dv))
    return dq, dk, dv


# --- experts ---

_AT_ONCE = 1 << 20  # products of elements that are made at once


@meaning("grouped_linear")
def grouped_linear(field: Field, x: Tensor, w: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    """Each row by the weight of its expert: a few rows all at once, where the operator takes one expert after the other."""
    w = w if transposed else w.transpose(1, 2)
    if x.shape[0] * w.shape[1] * w.shape[2] > _AT_ONCE:
        return torch.cat([field.matmul(rows, each) for rows, each in zip(x.split(counts.tolist()), w, strict=True)])
    expert = torch.arange(counts.shape[0]).repeat_interleave(counts)
    return field.matmul(x.unsqueeze(1), w[expert]).squeeze(1)


@meaning("grouped_outer")
def grouped_outer(field: Field, x: Tensor, grad: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    first, second = (x, grad) if transposed else (grad, x)
    if x.shape[0] * x.shape[1] * grad.shape[1] > _AT_ONCE:
        pairs = zip(first.split(counts.tolist()), second.split(counts.tolist()), strict=True)
        return torch.stack([field.matmul(a.t(), b) for a, b in pairs])
    expert = torch.arange(counts.shape[0]).repeat_interleave(counts)
    products = field.times(first.unsqueeze(2), second.unsqueeze(1))
    return field.reduced(x.new_zeros(counts.shape[0], *products.shape[1:]).index_add(0, expert, products))
