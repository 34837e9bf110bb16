"""Operators that compute an element from one element of each operand, as Triton text. The arithmetic is float32 or wider.

A line reads: operator, text; `{0}` is the first operand, `{name}` an argument of the schema that is a number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from foldcc.ir.node import argument

aten = torch.ops.aten

FLOATS = {
    aten.neg.default: "-{0}",
    aten.exp.default: "tl.exp({0})",
    aten.log.default: "tl.log({0})",
    aten.sin.default: "tl.sin({0})",
    aten.cos.default: "tl.cos({0})",
    aten.sqrt.default: "tl.sqrt({0})",
    aten.rsqrt.default: "tl.rsqrt({0})",
    aten.erf.default: "tl.erf({0})",
    aten.abs.default: "tl.abs({0})",
    aten.reciprocal.default: "1.0 / {0}",
    aten.sigmoid.default: "1.0 / (1.0 + tl.exp(-{0}))",
    aten.tanh.default: "2.0 / (1.0 + tl.exp(-2.0 * {0})) - 1.0",
    aten.silu.default: "{0} / (1.0 + tl.exp(-{0}))",
    aten.relu.default: "tl.maximum({0}, 0.0)",
    aten.sigmoid_backward.default: "{0} * {1} * (1.0 - {1})",
    aten.tanh_backward.default: "{0} * (1.0 - {1} * {1})",
    aten.div.Tensor: "{0} / {1}",
    aten.div.Scalar: "{0} / {other}",
}

# Of a large number they keep arrays in memory; a kernel computes them once, and another reads the table.
SLOW = {aten.sin.default, aten.cos.default}

ANY = {
    aten.mul.Tensor: "{0} * {1}",
    aten.mul.Scalar: "{0} * {other}",
    aten.maximum.default: "tl.maximum({0}, {1})",
    aten.minimum.default: "tl.minimum({0}, {1})",
    aten.eq.Scalar: "{0} == {other}",
    aten.ne.Scalar: "{0} != {other}",
    aten.ge.Scalar: "{0} >= {other}",
    aten.gt.Scalar: "{0} > {other}",
    aten.le.Scalar: "{0} <= {other}",
    aten.lt.Scalar: "{0} < {other}",
    aten.eq.Tensor: "{0} == {1}",
    aten.ne.Tensor: "{0} != {1}",
    aten.ge.Tensor: "{0} >= {1}",
    aten.gt.Tensor: "{0} > {1}",
    aten.le.Tensor: "{0} <= {1}",
    aten.lt.Tensor: "{0} < {1}",
    aten.logical_and.default: "({0} != 0) & ({1} != 0)",
    aten.logical_or.default: "({0} != 0) | ({1} != 0)",
    aten.logical_not.default: "{0} == 0",
    aten.where.self: "tl.where({0}, {1}, {2})",
    aten.masked_fill.Scalar: "tl.where({1}, {value}, {0})",
    aten.clone.default: "{0}",
    aten._to_copy.default: "{0}",
}


def expression(node: fx.Node, operands: list[str]) -> str | None:
    """The text of a pointwise operator, or None for one that has none."""
    target: Any = node.target
    if target in (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar):
        return _sum(node, operands)
    if target is aten.pow.Tensor_Scalar:
        return _power(operands[0], argument(node, "exponent"))
    if target is aten.clamp.default:
        return _clamped(operands[0], argument(node, "min"), argument(node, "max"))
    if target is aten.silu_backward.default:
        y = f"(1.0 / (1.0 + tl.exp(-{operands[1]})))"
        return f"{operands[0]} * {y} * (1.0 + {operands[1]} * (1.0 - {y}))"
    if target in (aten.bitwise_and.Tensor, aten.bitwise_or.Tensor):
        return f"{operands[0]} {'&' if target is aten.bitwise_and.Tensor else '|'} {operands[1]}"
    if target is aten.bitwise_not.default and node.meta["val"].dtype == torch.bool:
        return f"{operands[0]} == 0"
    text = FLOATS.get(target) or ANY.get(target)
    if text is None:
        return None
    named = {a.name: number(argument(node, a.name)) for a in target._schema.arguments if f"{{{a.name}}}" in text}
    return text.format(*operands, **named)


def number(x: Any) -> str:
    """A number of a program as Triton text."""
    if isinstance(x, bool):
        return "1" if x else "0"
    if isinstance(x, float) and not math.isfinite(x):
        return "float('nan')" if math.isnan(x) else f"float('{'-' if x < 0 else ''}inf')"
    return f"({x!r})" if x < 0 else repr(x)


def _sum(node: fx.Node, operands: list[str]) -> str:
    alpha = argument(node, "alpha")
    sign = "-" if node.target in (aten.sub.Tensor, aten.sub.Scalar) else "+"
    return f"{operands[0]} {sign} {operands[1]}" if alpha == 1 else f"{operands[0]} {sign} {number(alpha)} * {operands[1]}"


def _power(x: str, exponent: float) -> str | None:
    if exponent == 0.5:
        return f"tl.sqrt({x})"
    if exponent == -0.5:
        return f"tl.rsqrt({x})"
    if exponent != int(exponent) or not 1 <= abs(exponent) <= 8:
        return None
    product = " * ".join([x] * abs(int(exponent)))
    return product if exponent > 0 else f"1.0 / ({product})"


def _clamped(x: str, low: Any, high: Any) -> str:
    x = x if low is None else f"tl.maximum({x}, {number(low)})"
    return x if high is None else f"tl.minimum({x}, {number(high)})"
