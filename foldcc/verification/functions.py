"""Functions of one value: each a hash, or made of one, such that its derivative is what PyTorch's formulas make of it.

silu(x) is x * sigmoid(x), and its derivative is written with the same sigmoid: a program that takes it apart and one that
does not agree.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foldcc.verification.arithmetic import add, mul, square, sub
from foldcc.verification.field import Field
from foldcc.verification.meanings import meaning, value
from foldcc.verification.order import clamp, hardtanh_backward, positive


def symmetric(field: Field, name: str, x: Tensor, odd: bool = True) -> Tensor:
    """A hash for which f(-x) = -f(x), or f(x) where it is even."""
    above, size = field.halves(x)
    y = torch.where(x == 0, 0.0 if odd else 1.0, field.function(name, size))
    return torch.where(above, y, field.negative(y)) if odd else y


def _symmetric(name: str, odd: bool) -> None:
    @meaning(name)
    def function(field: Field, x: Any) -> Tensor:
        return symmetric(field, name, value(field, x), odd)


HASHED = ("cos", "erf", "erfc", "log", "log1p", "log2", "sigmoid", "sin", "sqrt", "tan", "tanh")
for _name in ("cos", "erf", "sin", "tan"):
    _symmetric(_name, odd=_name != "cos")


@meaning("sigmoid")
def sigmoid(field: Field, x: Any) -> Tensor:
    """exp(x) / (1 + exp(x)), so that it has all laws that exp has; of what a mask leaves out nothing."""
    x = value(field, x)
    return torch.where(x == -math.inf, 0.0, field.logistic(x)[0])


@meaning("tanh")
def tanh(field: Field, x: Any) -> Tensor:
    """(exp(2x) - 1) / (exp(2x) + 1)."""
    x = value(field, x)
    first, second = field.logistic(field.reduced(x + x))
    return field.reduced(first - second)


@meaning("log2")
def log2(field: Field, x: Any) -> Tensor:
    return field.function("log2", value(field, x))


@meaning("log1p")
def log1p(field: Field, x: Any) -> Tensor:
    return log(field, add(field, x, 1))


@meaning("erfc")
def erfc(field: Field, x: Any) -> Tensor:
    return sub(field, 1, symmetric(field, "erf", value(field, x)))


@meaning("log")
def log(field: Field, x: Any) -> Tensor:
    return field.remember("exp", field.function("log", value(field, x)), value(field, x))


@meaning("sqrt")
def sqrt(field: Field, x: Any) -> Tensor:
    return field.root(value(field, x))


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
    if is_result:
        raise NotImplementedError("a derivative that is given the result only, whose sign is not its operand's")
    slope = mul(field, mul(field, field.exp(mul(field, x, input_scale)), alpha), input_scale)
    return mul(field, mul(field, grad, scale), torch.where(positive(field, x), 1.0, slope))


@meaning("silu")
def silu(field: Field, x: Tensor) -> Tensor:
    return field.times(x, sigmoid(field, x))


@meaning("silu_backward")
def silu_backward(field: Field, grad: Tensor, x: Tensor) -> Tensor:
    y = sigmoid(field, x)
    slope = add(field, mul(field, x, sub(field, 1, y)), 1)
    return mul(field, grad, mul(field, y, slope))


@meaning("sigmoid_backward")
def sigmoid_backward(field: Field, grad: Tensor, y: Tensor) -> Tensor:
    return mul(field, grad, mul(field, y, sub(field, 1, y)))


@meaning("tanh_backward")
def tanh_backward(field: Field, grad: Tensor, y: Tensor) -> Tensor:
    return mul(field, grad, sub(field, 1, square(field, y)))


def _inside(field: Field, x: Tensor) -> Tensor:
    return mul(field, add(field, x, mul(field, field.power(x, 3), 0.044715)), math.sqrt(2) * (2 / math.sqrt(math.pi)) * 0.5)


def _normal(field: Field, x: Tensor, approximate: str) -> Tensor:
    """The share of a normal distribution below x, by PyTorch's formulas."""
    inner = tanh(field, _inside(field, x)) if approximate == "tanh" else symmetric(field, "erf", mul(field, x, math.sqrt(0.5)))
    return mul(field, add(field, inner, 1), 0.5)


@meaning("gelu")
def gelu(field: Field, x: Tensor, approximate: str = "none") -> Tensor:
    return mul(field, x, _normal(field, x, approximate))


@meaning("gelu_backward")
def gelu_backward(field: Field, grad: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    """The product rule, with the derivatives that PyTorch has for tanh and erf."""
    if approximate == "tanh":
        root = math.sqrt(2) * (2 / math.sqrt(math.pi)) * 0.5
        inner = mul(field, add(field, mul(field, square(field, x), 3 * 0.044715), 1), root)
        slope = mul(field, sub(field, 1, square(field, tanh(field, _inside(field, x)))), inner)
    else:
        scaled = mul(field, x, math.sqrt(0.5))
        density = field.exp(field.negative(square(field, scaled)))
        slope = mul(field, mul(field, density, 2 / math.sqrt(math.pi)), math.sqrt(0.5))
    slope = mul(field, slope, 0.5)
    return mul(field, grad, add(field, _normal(field, x, approximate), mul(field, x, slope)))


@meaning("softplus")
def softplus(field: Field, x: Tensor, beta: Any = 1, threshold: Any = 20) -> Tensor:
    scaled = mul(field, x, beta)
    below = mul(field, log1p(field, field.exp(scaled)), field.inverse(value(field, beta)))
    return torch.where(positive(field, scaled, threshold), x, below)


@meaning("softplus_backward")
def softplus_backward(field: Field, grad: Tensor, x: Tensor, beta: Any, threshold: Any) -> Tensor:
    scaled = mul(field, x, beta)
    z = field.exp(scaled)
    return mul(
        field, grad, torch.where(positive(field, scaled, threshold), 1.0, mul(field, z, field.inverse(add(field, z, 1))))
    )


@meaning("mish")
def mish(field: Field, x: Tensor) -> Tensor:
    return mul(field, x, tanh(field, softplus(field, x)))


@meaning("mish_backward")
def mish_backward(field: Field, grad: Tensor, x: Tensor) -> Tensor:
    inner = tanh(field, softplus(field, x))
    slope = mul(field, sub(field, 1, square(field, inner)), sigmoid(field, x))
    return mul(field, grad, add(field, inner, mul(field, x, slope)))


@meaning("hardsigmoid")
def hardsigmoid(field: Field, x: Tensor) -> Tensor:
    return mul(field, clamp(field, add(field, x, 3), 0, 6), 1 / 6)


@meaning("hardsigmoid_backward")
def hardsigmoid_backward(field: Field, grad: Tensor, x: Tensor) -> Tensor:
    return hardtanh_backward(field, mul(field, grad, 1 / 6), add(field, x, 3), 0, 6)


@meaning("hardswish")
def hardswish(field: Field, x: Tensor) -> Tensor:
    return mul(field, x, hardsigmoid(field, x))


@meaning("hardswish_backward")
def hardswish_backward(field: Field, grad: Tensor, x: Tensor) -> Tensor:
    return add(field, mul(field, grad, hardsigmoid(field, x)), hardsigmoid_backward(field, mul(field, grad, x), x))


@meaning("log_sigmoid_forward")
def log_sigmoid_forward(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    return log(field, sigmoid(field, x)), x.new_zeros(0)


@meaning("log_sigmoid_backward")
def log_sigmoid_backward(field: Field, grad: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
    return mul(field, grad, sub(field, 1, sigmoid(field, x)))


@meaning("glu")
def glu(field: Field, x: Tensor, dim: int = -1) -> Tensor:
    first, second = x.chunk(2, dim)
    return field.times(first, sigmoid(field, second))


@meaning("glu_backward")
def glu_backward(field: Field, grad: Tensor, x: Tensor, dim: int) -> Tensor:
    first, second = x.chunk(2, dim)
    gate = sigmoid(field, second)
    return torch.cat([field.times(grad, gate), sigmoid_backward(field, field.times(grad, first), gate)], dim)


@meaning("hypot")
def hypot(field: Field, x: Tensor, y: Tensor) -> Tensor:
    return field.root(add(field, square(field, x), square(field, y)))


@meaning("pow")
def power(field: Field, x: Any, y: Any) -> Tensor:
    if not isinstance(x, Tensor):
        return field.function(f"{x} to the power", value(field, y))
    if isinstance(y, Tensor):
        return pointwise(field, "pow", (x, y))
    return field.power(value(field, x), float(y))


def pointwise(field: Field, name: str, arguments: Any) -> Tensor:
    """Any other function of each element: a keyed hash of all its operands, one after the other."""
    tensors = [value(field, x) for x in arguments if isinstance(x, Tensor)]
    numbers = [x for x in arguments if not isinstance(x, Tensor)]
    first, *others = torch.broadcast_tensors(*tensors)
    result = field.function(f"{name} {numbers}", first)
    for i, x in enumerate(others):
        result = field.function(f"{name} {numbers} {i}", field.add(field.times(result, field.keyed(x, name)), x))
    return result
