"""FLOPs of matrix products, over global shapes and on one rank, by the module that they serve.

A product that contracts k values costs 2 * k for each element of its result. A product of the forward pass has another
one of the same cost in the backward pass for each operand that has a gradient. Attention is two products over all pairs
of positions, and what its backward pass recomputes is not counted. Convolutions are counted as PyTorch does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import conv_flop_count

from foldcc import ops
from foldcc.ir.node import argument, argument_or, name_of, operands
from foldcc.ir.program import Program
from foldcc.ir.sizes import Sizes
from foldcc.ir.walk import Mains, module_of, parts
from foldcc.ops.captured import captured_record
from foldcc.ops.experts import grouped_outer
from foldcc.rules.kinds import CONVOLUTIONS

aten = torch.ops.aten
# Position of the operand whose last dimension is contracted.
_PRODUCTS = {
    "aten.linear": 0, "aten.matmul": 0, "aten.mm": 0, "aten.bmm": 0, "aten.mv": 0, "aten.dot": 0, "aten.addmm": 1,
    "aten.baddbmm": 1,
}  # fmt: skip
_ATTENTION = "aten._scaled_dot_product"


def global_flops(program: Program) -> Counter[str]:
    """FLOPs of a training step of the whole model, from a sharded program, whose shapes are global still."""
    found: Counter[str] = Counter()
    for name, node in program.nodes():
        if node.op == "call_function":
            found[module_of(node)] += program.count(name) * _global(node)
    return found


def local_flops(program: Program, mains: Mains | None = None, *, again: bool = False) -> Counter[str]:
    """FLOPs of a training step on one rank, from a differentiated program, with balanced routing.

    Args:
        mains: of its main graphs, pieces; unless said otherwise, all of them.
        again: those of what the backward pass computes again; they are not in the others.
    """
    found: Counter[str] = Counter()
    sizes: dict[str, Sizes] = {}
    for part in parts(program, mains):
        known = sizes.setdefault(part.block, Sizes(program.mesh))
        for node in part.graph.graph.nodes:
            known.learn(node)
            if node.op == "call_function" and bool(node.meta.get("again")) == again:
                found[module_of(node)] += part.calls * round(flops_of(node, known))
    return found


def _global(node: fx.Node) -> int:
    if products := (known := captured_record(node.target)).products:
        given = {k: x for k, x in known.arguments(node).items() if isinstance(x, fx.Node)}
        graded = {name for name, x in given.items() if x.meta["grad"]}
        each = products(**{name: x.meta["val"].shape for name, x in given.items()})
        return int(sum(flops * (1 + sum(not graded.isdisjoint(f) for f in factors)) for flops, *factors in each))
    if name_of(node.target) in CONVOLUTIONS:
        passes = 1 + sum(bool(n.meta["grad"]) for n in operands(node)[:2] if n is not None)
        return int(_convolution(node, node, lambda n: n.meta["val"].shape) * passes)
    if name_of(node.target) not in _PRODUCTS:
        return 0
    position = _PRODUCTS[name_of(node.target)]
    contracted = node.args[position].meta["val"].shape[-1]
    pair = operands(node)[position : position + 2]
    passes = 1 + sum(bool(n.meta["grad"]) for n in pair if n is not None)
    return int(2 * contracted * node.meta["val"].numel() * passes)


def _convolution(node: fx.Node, result: fx.Node, shape: Callable[[fx.Node], Any]) -> float:
    """One convolution; `result` is what it returns, or the gradient of that."""
    x, weight = shape(argument(node, "input")), shape(argument(node, "weight"))
    batch = [1] * (len(weight) - len(x))  # an operand may have no batch dimension
    transposed = bool(argument_or(node, "transposed")) or "transpose" in name_of(node.target)
    return conv_flop_count([*batch, *x], weight, [*batch, *shape(result)], transposed)


def _pairs(q: Any, v: Any, passes: int) -> int:
    """Attention over all pairs; q is [b, h, q, d], v is [b, g, k, e]."""
    return int(2 * math.prod(q[:3]) * v[2] * (q[3] + v[3]) * passes)


def flops_of(node: fx.Node, sizes: Sizes) -> float:
    """FLOPs of one call of an operator on one rank: those of matrix products, attention and convolutions."""

    def shape(n: Any) -> list[float]:
        return [sizes.number(s) for s in n.meta["val"].shape]

    if node.target is ops.grouped_linear.overload:
        return 2 * math.prod(shape(node)) * shape(node.args[0])[1]
    if node.target is grouped_outer.overload:
        return 2 * math.prod(shape(node.args[0])) * shape(node.args[1])[1]
    name = name_of(node.target)
    if name.startswith(_ATTENTION):
        names = [a.name for a in node.target._schema.arguments]
        q, v = (shape(node.args[names.index(x)]) for x in ("query", "value"))
        return _pairs(q, v, 2 if name.endswith("_backward") else 1)
    if name.startswith("foldcc.attend_block"):
        return _pairs(shape(argument(node, "q")), shape(argument(node, "v")), 2 if name.endswith("_backward") else 1)
    if name in CONVOLUTIONS:
        return _convolution(node, node, shape)
    if name == "aten.convolution_backward":
        return _convolution(node, argument(node, "grad_output"), shape) * sum(argument(node, "output_mask")[:2])
    if name not in _PRODUCTS:
        return 0
    return 2 * math.prod(shape(node)) * shape(node.args[_PRODUCTS[name]])[-1]
