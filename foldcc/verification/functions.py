"""Functions of one value: each a hash, or made of one, such that its derivative is what PyTorch's formulas make of it.

silu(x) is x * sigmoid(x), and its derivative is written with the same sigmoid: a program that takes it apart and one that
does not agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foldcc.verification.arithmetic import add, mul, square, sub
from foldcc.verification.field import Field
from foldcc.verification.meanings import meaning, value
from foldcc.verification.order import positive


def _hashed(name: str) -> None:
    @meaning(name)
    def function(field: Field, x: Any) -> Tensor:
        return field.function(name, value(field, x))


HASHED = ("cos", "erf", "erfc", "log", "log1p", "log2", "sigmoid", "sin", "sqrt", "tan", "tanh")
for _name in HASHED:
    _hashed(_name)


@meaning("exp")
def exp(field: Field, x: Any) -> Tensor:
    return field.exp(value(field, x))


@meaning("expm1")
def expm1(field: Field, x: Tensor) -> Tensor:
    return sub(field, field.exp(x), 1)


@meaning("rsqrt")
def rsqrt(field: Field, x: Any) -> Tensor:
    return field.power(value(field, x), -0.5)


@meaning("elu")
def elu(field: Field, x: Tensor, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Tensor:
    below = mul(field, expm1(field, mul(field, x, input_scale)), alpha)
    return mul(field, torch.where(positive(field, x), x, below), scale)


@meaning("elu_backward")
def elu_backward(field: Field, grad: Tensor, alpha: Any, scale: Any, input_scale: Any, is_result: bool, x: Tensor) -> Tensor:
    inner = mul(field, mul(field, expm1(field, mul(field, x, input_scale)), alpha), 1)
    slope = add(field, mul(field, x, 1) if is_result else inner, alpha)
    return mul(field, mul(field, grad, scale), torch.where(positive(field, x), 1.0, mul(field, slope, input_scale)))


@meaning("silu")
def silu(field: Field, x: Tensor) -> Tensor:
    return field.times(x, field.function("sigmoid", x))


@meaning("silu_backward")
def silu_backward(field: Field, grad: Tensor, x: Tensor) -> Tensor:
    y = field.function("sigmoid", x)
    slope = add(field, mul(field, x, sub(field, 1, y)), 1)
    return mul(field, grad, mul(field, y, slope))


@meaning("sigmoid_backward")
def sigmoid_backward(field: Field, grad: Tensor, y: Tensor) -> Tensor:
    return mul(field, grad, mul(field, y, sub(field, 1, y)))


@meaning("tanh_backward")
def tanh_backward(field: Field, grad: Tensor, y: Tensor) -> Tensor:
    return mul(field, grad, sub(field, 1, square(field, y)))


@meaning("gelu")
def gelu(field: Field, x: Tensor, approximate: str = "none") -> Tensor:
    return mul(field, x, field.function(f"gelu {approximate}", x))


@meaning("gelu_backward")
def gelu_backward(field: Field, grad: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    slope = mul(field, x, field.function(f"gelu {approximate} slope", x))
    return mul(field, grad, add(field, field.function(f"gelu {approximate}", x), slope))


@meaning("softplus")
def softplus(field: Field, x: Tensor, beta: Any = 1, threshold: Any = 20) -> Tensor:
    return field.function(f"softplus {beta} {threshold}", x)


@meaning("softplus_backward")
def softplus_backward(field: Field, grad: Tensor, x: Tensor, beta: Any, threshold: Any) -> Tensor:
    return mul(field, grad, field.function(f"softplus {beta} {threshold} slope", x))


@meaning("log_sigmoid_forward")
def log_sigmoid_forward(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    return field.function("log_sigmoid", x), x.new_zeros(0)


@meaning("log_sigmoid_backward")
def log_sigmoid_backward(field: Field, grad: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
    return mul(field, grad, sub(field, 1, field.function("sigmoid", x)))


def pointwise(field: Field, name: str, arguments: Any) -> Tensor:
    """Any other function of each element: a keyed hash of all its operands, one after the other."""
    tensors = [value(field, x) for x in arguments if isinstance(x, Tensor)]
    numbers = [x for x in arguments if not isinstance(x, Tensor)]
    first, *others = torch.broadcast_tensors(*tensors)
    result = field.function(f"{name} {numbers}", first)
    for i, x in enumerate(others):
        result = field.function(f"{name} {numbers} {i}", field.add(field.times(result, field.keyed(x, name)), x))
    return result
