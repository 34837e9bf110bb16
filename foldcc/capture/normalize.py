"""Normalizing a captured graph: what says nothing goes, and what hides a sum over tokens is written out.

    loss = cross_entropy_loss(logits, target)                    # mean over valid tokens
becomes
    loss = sum(token_loss(logits, target)) / sum(target != ignore_index)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from foldcc import ops
from foldcc.capture.convolutions import causal
from foldcc.ir.node import argument, name_of
from foldcc.ir.rewrite import emit, replace_node
from foldcc.ops.capacity import most, places
from foldcc.ops.random import gain
from foldcc.rules.kinds import RESHAPES, SAME

aten = torch.ops.aten
MEAN, SUM = 1, 2
_DROPPED = SAME - {"aten.detach"} | {"aten.detach_"}  # what detach cuts off stays cut off; nobody reads what detach_ leaves


def normalize(graph: fx.GraphModule) -> None:
    """Rewrites the graph in place."""
    for node in list(graph.graph.nodes):
        if node.target in REWRITES:
            replace_node(node, REWRITES[node.target](node))
        elif name_of(node.target) in _DROPPED:
            replace_node(node, node.args[0])
        elif name_of(node.target) in RESHAPES - {"aten.reshape"}:
            node.target, node.args = aten.reshape.default, (node.args[0], list(node.meta["val"].shape))
        elif node.target is aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _cross_entropy(node: fx.Node) -> fx.Node:
    logits, target = argument(node, "self"), argument(node, "target")
    plain = argument(node, "weight") is None and not argument(node, "label_smoothing")
    if not plain or logits.meta["val"].dim() != 2 or target.meta["val"].dim() != 1:
        return node
    ignore = argument(node, "ignore_index")
    each = emit(node, ops.token_loss, logits, target, ignore)
    if argument(node, "reduction") not in (MEAN, SUM):
        return each
    total = emit(node, aten.sum.default, each)
    if argument(node, "reduction") == SUM:
        return total
    return emit(node, aten.div.Tensor, total, emit(node, aten.sum.default, emit(node, aten.ne.Scalar, target, ignore)))


def _attention(node: fx.Node) -> fx.Node:
    q, k, v = (argument(node, name) for name in ("query", "key", "value"))
    dropout = argument(node, "dropout_p")
    if argument(node, "attn_mask") is not None or q.meta["val"].dim() != 4:
        return node if not dropout else _attended(node)
    scale = argument(node, "scale")
    scale = q.meta["val"].shape[-1] ** -0.5 if scale is None else scale
    causal = argument(node, "is_causal")
    keep = None
    if dropout:
        pairs = [*q.meta["val"].shape[:3], k.meta["val"].shape[2]]
        keep = _kept(node, emit(node, aten.new_empty.default, q, pairs), dropout)
    y = emit(node, ops.attention, q, k, v, None, None, scale, causal, 0, keep=keep, dropout=dropout)
    return emit(node, aten.transpose.int, y, 1, 2)


def _attended(node: fx.Node) -> fx.Node:
    """Attention that drops out and has a mask, in the operators that it is made of."""
    q, k, v, mask = (argument(node, name) for name in ("query", "key", "value", "attn_mask"))
    scale = argument(node, "scale")
    k, v = (_repeated(node, x, q) for x in (k, v)) if argument(node, "enable_gqa") else (k, v)
    scores = emit(node, aten.matmul.default, q, emit(node, aten.transpose.int, k, -2, -1))
    scores = emit(node, aten.mul.Tensor, scores, q.meta["val"].shape[-1] ** -0.5 if scale is None else scale)
    if argument(node, "is_causal"):
        pairs = list(scores.meta["val"].shape[-2:])
        mask = emit(node, aten.tril.default, emit(node, aten.new_ones.default, scores, pairs, dtype=torch.bool))
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        scores = emit(node, aten.masked_fill.Scalar, scores, emit(node, aten.logical_not.default, mask), -math.inf)
    elif mask is not None:
        scores = emit(node, aten.add.Tensor, scores, mask)
    weights, dropout = emit(node, aten._safe_softmax.default, scores, -1), argument(node, "dropout_p")
    weights = _scaled(node, weights, _kept(node, weights, dropout), dropout)
    return emit(node, aten.matmul.default, weights, v)


def _repeated(node: fx.Node, x: fx.Node, queries: fx.Node) -> fx.Node:
    """Each of fewer heads as often as there are query heads for it."""
    shape, heads = x.meta["val"].shape, queries.meta["val"].shape[-3]
    each = [*shape[:-2], heads // shape[-3], *shape[-2:]]
    spread = emit(node, aten.expand.default, emit(node, aten.unsqueeze.default, x, -3), each)
    return emit(node, aten.reshape.default, spread, [*shape[:-3], heads, *shape[-2:]])


def _dropout(node: fx.Node) -> fx.Node:
    """Dropout by a draw of its mask; some of it returns the mask as well."""
    x: fx.Node = argument(node, "input")
    dropout = argument(node, "p") if argument(node, "train") is not False else 0.0
    masked = isinstance(node.meta["val"], tuple)
    keep = _kept(node, x, dropout) if dropout or masked else None
    y = x if keep is None or not dropout else _scaled(node, x, keep, dropout)
    for item in list(node.users) if masked else ():
        replace_node(item, (y, keep)[item.args[1]])
    return y


def _kept(node: fx.Node, like: fx.Node, dropout: float) -> fx.Node:
    """A mask of the elements that are not dropped."""
    return emit(node, aten.bernoulli.p, emit(node, aten.empty_like.default, like, dtype=torch.bool), 1 - dropout)


def _scaled(node: fx.Node, x: fx.Node, keep: fx.Node, dropout: float) -> fx.Node:
    return emit(node, aten.mul.Tensor, emit(node, aten.mul.Tensor, x, keep), gain(dropout))


def _copy(node: fx.Node) -> fx.Node:
    """What is left of `self.copy_(src)`: the source, in the shape and dtype of the destination."""
    to = node.args[0].meta["val"]
    source = _cast(node, node.args[1], to.dtype)
    if source.meta["val"].shape != to.shape:
        source = emit(node, aten.expand.default, source, list(to.shape))
    return source


def _type_as(node: fx.Node) -> fx.Node:
    """A cast: of the other operand only the dtype is read, whatever its numbers are on each rank."""
    return _cast(node, node.args[0], node.meta["val"].dtype)


def _cast(before: fx.Node, source: fx.Node, dtype: torch.dtype) -> fx.Node:
    if source.meta["val"].dtype == dtype:
        return source
    found = emit(before, aten._to_copy.default, source)
    found.kwargs = {"dtype": dtype}
    found.meta["val"] = found.meta["val"].to(dtype)
    return found


def _histc(node: fx.Node) -> fx.Node:
    """Counts of integers, which only some devices take as they are, through the numbers that they are."""
    x: fx.Node = node.args[0]
    to = node.meta["val"].dtype
    if to.is_floating_point:
        return node
    options = (argument(node, name) for name in ("bins", "min", "max"))
    counted = emit(node, aten.histc.default, _cast(node, x, torch.float64), *options)
    return _cast(node, counted, to)


def _present(node: fx.Node) -> fx.Node:
    """Experts whose weights are masked: a choice of weight zero, which has no gradient, is none, and is sent nowhere."""
    weights = argument(node, "weights")
    while name_of(weights.target) in {"aten._to_copy", "aten.to"}:
        weights = weights.args[0]
    ids = argument(node, "ids")
    if weights.target is not aten.masked_fill.Scalar or weights.args[2] != 0 or argument(node, "absent"):
        return node
    mask, experts = weights.args[1], argument(node, "w_up").meta["val"].shape[0]
    given = ops.experts_record.arguments(node) | {"absent": True}
    given["ids"] = emit(node, aten.masked_fill.Scalar, ids, mask, experts)
    placed = mask.args[0] if name_of(mask.target) == "aten.lt" else mask
    while name_of(placed.target) in RESHAPES:
        placed = placed.args[0]
    if placed.target is places.overload and argument(placed, "pad"):
        groups: torch.Tensor = argument(placed, "ids").meta["val"]
        given |= {"most": most(groups, experts, argument(placed, "factor")), "group": groups.shape[1]}
    return emit(node, ops.experts_node, *given.values())


REWRITES: dict[Any, Callable[[fx.Node], fx.Node]] = {
    aten.cross_entropy_loss.default: _cross_entropy,
    aten.scaled_dot_product_attention.default: _attention,
    aten.dropout.default: _dropout,
    aten.native_dropout.default: _dropout,
    aten.conv1d.default: causal,
    aten.copy.default: _copy,
    aten.histc.default: _histc,
    aten.type_as.default: _type_as,
    ops.experts_node: _present,
}
