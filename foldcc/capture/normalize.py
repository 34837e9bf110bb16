"""Normalizing a captured graph: what says nothing goes, and what hides a sum over tokens is written out.

    loss = cross_entropy_loss(logits, target)                    # mean over valid tokens
becomes
    loss = sum(token_loss(logits, target)) / sum(target != ignore_index)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from foldcc import ops
from foldcc.ir.node import argument, name_of
from foldcc.ir.rewrite import emit, inline
from foldcc.rules.kinds import RESHAPES, SAME

aten = torch.ops.aten
MEAN, SUM = 1, 2
_DROPPED = SAME - {"aten.detach"} | {"aten.detach_"}  # what detach cuts off stays cut off; nobody reads what detach_ leaves


def normalize(graph: fx.GraphModule) -> None:
    """Rewrites the graph in place."""
    for node in list(graph.graph.nodes):
        if node.target in REWRITES:
            _replace(node, REWRITES[node.target](node))
        elif name_of(node.target) in _DROPPED:
            _replace(node, node.args[0])
        elif name_of(node.target) in RESHAPES - {"aten.reshape"}:
            node.target, node.args = aten.reshape.default, (node.args[0], list(node.meta["val"].shape))
        elif node.target is aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _replace(node: fx.Node, new: Any) -> None:
    if new is not node:
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)


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
        shape = (*q.meta["val"].shape[:3], k.meta["val"].shape[2])
        keep = inline(node, lambda q: aten.bernoulli.p(q.new_empty(shape, dtype=torch.bool), 1 - dropout), q)
    y = emit(node, ops.attention, q, k, v, None, None, scale, causal, 0, keep=keep, dropout=dropout)
    return emit(node, aten.transpose.int, y, 1, 2)


def _attended(node: fx.Node) -> fx.Node:
    """Attention with a mask that drops out, in the operators that it is made of."""
    operands = [x for name in ("query", "key", "value", "attn_mask") if (x := argument(node, name)) is not None]
    dropout, causal, scale, grouped = (argument(node, n) for n in ("dropout_p", "is_causal", "scale", "enable_gqa"))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if grouped:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        weights = torch._safe_softmax(scores, -1)
        keep = aten.bernoulli.p(torch.empty_like(weights, dtype=torch.bool), 1 - dropout)
        return weights * keep * _gain(dropout) @ v

    return inline(node, attend, *operands)


def _dropout(node: fx.Node) -> fx.Node:
    """Dropout whose results are the operand and the mask, by a draw of the mask."""
    x: fx.Node = argument(node, "input")
    dropout = argument(node, "p") if argument(node, "train") is not False else 0.0
    keep, y = None, x
    if dropout:
        keep = emit(node, aten.bernoulli.p, emit(node, aten.empty_like.default, x, dtype=torch.bool), 1 - dropout)
        y = emit(node, aten.mul.Tensor, emit(node, aten.mul.Tensor, x, keep), _gain(dropout))
    for item in list(node.users):
        mask = item.args[1] == 1
        _replace(item, (keep or emit(node, aten.ones_like.default, x, dtype=torch.bool)) if mask else y)
    return y


def _gain(dropout: float) -> float:
    return 0.0 if dropout == 1 else 1 / (1 - dropout)


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


REWRITES: dict[Any, Callable[[fx.Node], fx.Node]] = {
    aten.cross_entropy_loss.default: _cross_entropy,
    aten.scaled_dot_product_attention.default: _attention,
    aten.native_dropout.default: _dropout,
    aten.copy.default: _copy,
    aten.histc.default: _histc,
    aten.type_as.default: _type_as,
}
