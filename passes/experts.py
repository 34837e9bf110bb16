"""Experts: their backward pass without the widest values, and without a scatter into memory.

    rows = grouped_linear(a, w, counts)                              d  = grouped_linear(permute(dy), w^T, counts)
    y    = unpermute(rows, order, s)
                                                    becomes
    ds = unpermute_weights(dy, rows, order, s)                       ds = gather_rows(sum(d * a), order)
    da = grouped_linear(s * permute(dy), w^T, counts)                da = s * d
    dw = grouped_outer(a, s * permute(dy), counts)                   dw = grouped_outer(s * a, permute(dy), counts)

A row times a number, times a matrix, is the same in any order (SonicMoE takes the gradient so). The rows, which are the
widest values of a layer, are then not kept, and no kernel writes the weighted gradient of each. Where rows come back from
other ranks, the weights are with the tokens and the experts' width is not, and nothing is changed.

    db = index_add(zeros, 0, expert_of_row(rows, counts), dy)        db = grouped_outer(ones, dy, counts)

The rows of an expert are summed in order, so that the result does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from foldcc.ir import rewrite
from foldcc.ir.joint import read_sizes
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program
from foldcc.ops.experts import expert_of_row, gather_rows, grouped_linear, grouped_outer, permute, unpermute_weights

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Experts(Pass):
    """For programs whose grouped products are kernels."""

    requires = frozenset({"joint"})
    provides = frozenset({"late weights"})

    def run(self, program: Program) -> Program:
        for block in program.blocks.values():
            for node in block.graph.find_nodes(op="call_function", target=unpermute_weights.overload):
                _weigh_late(node)
            for node in block.graph.find_nodes(op="call_function", target=aten.index_add.default):
                _sum_in_order(node)
            block.graph.eliminate_dead_code()
            read_sizes(block)
            block.recompile()
        return program


def _weigh_late(node: fx.Node) -> None:
    """The gradient of routing weights, where experts are combined on the rank that ran them."""
    grad, rows, order, weights = node.args
    product, bias = (rows.args[0], rows.args[1]) if rows.target is aten.add.Tensor else (rows, None)
    if product.target is not grouped_linear.overload:
        return
    a, w, counts, transposed = product.args
    copies = weights.meta["val"].shape[1]
    each = [n for n in grad.users if n.target is permute.overload and n.args == (grad, order, copies)]
    weighted = [m for n in each for m in n.users if m.target is aten.mul.Tensor and _is_weight(m.args[1], weights, order)]
    weighted += [n for m in weighted for n in m.users if n.target is aten._to_copy.default]
    back = [n for m in weighted for n in m.users if n.args == (m, w, counts, not transposed)]
    outer = [n for m in weighted for n in m.users if n.args == (a, m, counts, transposed)]
    if [n.target for n in (*back, *outer)] != [grouped_linear.overload, grouped_outer.overload]:
        return
    emit = partial(rewrite.emit, node)
    scale = emit(aten.unsqueeze.default, emit(aten.index.Tensor, emit(aten.reshape.default, weights, [-1]), [order]), 1)
    plain = emit(permute.overload, grad, order, copies)
    d = emit(grouped_linear.overload, plain, w, counts, not transposed)
    dots = emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, d, a), [1], True)
    if bias is not None:
        dots = emit(aten.add.Tensor, dots, emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, plain, bias), [1], True))
    found = emit(aten.reshape.default, emit(gather_rows.overload, dots, order, 1), list(weights.meta["val"].shape))
    scaled, left = (_as(emit, emit(aten.mul.Tensor, x, scale), x) for x in (d, a))
    narrow = emit(grouped_outer.overload, left, plain, counts, transposed)
    for old, new in ((node, _as(emit, found, node)), (back[0], scaled), (outer[0], narrow)):
        old.replace_all_uses_with(new)


def _sum_in_order(node: fx.Node) -> None:
    """The gradient of a bias of each expert."""
    zeros, dim, which, grad = node.args[:4]
    if dim != 0 or which.target is not expert_of_row.overload or zeros.target is not aten.new_zeros.default:
        return
    emit = partial(rewrite.emit, node)
    ones = emit(aten.ones_like.default, emit(aten.slice.Tensor, grad, 1, 0, 1))
    total = emit(grouped_outer.overload, ones, grad, which.args[1], True)
    node.replace_all_uses_with(emit(aten.reshape.default, total, list(node.meta["val"].shape)))


def _as(emit: Callable[..., fx.Node], x: fx.Node, like: fx.Node) -> fx.Node:
    """A value in the dtype of another; weights may be wider than rows."""
    dtype = like.meta["val"].dtype
    return x if x.meta["val"].dtype == dtype else emit(aten._to_copy.default, x, dtype=dtype)


def _is_weight(x: Any, weights: fx.Node, order: fx.Node) -> bool:
    """Whether a node is the weight of each row, as a column."""
    if not isinstance(x, fx.Node) or x.target is not aten.unsqueeze.default or x.args[1] != 1:
        return False
    index: Any = x.args[0]
    return index.target is aten.index.Tensor and index.args[1] == [order] and index.args[0].args[0] is weights
