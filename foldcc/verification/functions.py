"""Functions of one value: each a hash, or made of one, such that its derivative is what PyTorch's formulas make of it.

silu(x) is x * sigmoid(x), and its derivative is written with the same sigmoid: a program that takes it apart and one that
does not agree.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foldcc.verification.arithmetic import add, mul, square, sub
from foldcc.verification.field import Field
from foldcc.verification.meanings import meaning, value


def _hashed(name: str) -> None:
    @meaning(name)
    def function(field: Field, x: Any) -> Tensor:
        return field.function(name, value(field, x))


HASHED = ("cos", "erf", "erfc", "expm1", "log", "log1p", "log2", "rsqrt", "sigmoid", "sin", "sqrt", "tan", "tanh")
for _name in HASHED:
    _hashed(_name)


@meaning("exp")
def exp(field: Field, x: Tensor) -> Tensor:
    return field.exp(x)


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
