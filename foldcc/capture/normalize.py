"""Normalizing a captured graph: what says nothing goes, and what hides a sum over tokens is written out.

    loss = cross_entropy_loss(logits, target)                    # mean over valid tokens
becomes
    loss = sum(token_loss(logits, target)) / sum(target != ignore_index)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from foldcc import ops
from foldcc.errors import FoldError
from foldcc.ir.node import argument, name_of
from foldcc.ir.rewrite import emit
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
        elif node.op == "call_function":
            _check_random(node)
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
    if argument(node, "dropout_p"):
        raise FoldError(
            f"Attention drops out with p={argument(node, 'dropout_p')}; random masks are not supported yet.",
            at=node.meta.get("stack_trace", "").strip().splitlines()[-1:] or None,
            valid="dropout_p=0.0",
        )
    if argument(node, "attn_mask") is not None:
        return node
    q, k, v = (argument(node, name) for name in ("query", "key", "value"))
    if q.meta["val"].dim() != 4:
        return node
    scale = argument(node, "scale")
    scale = q.meta["val"].shape[-1] ** -0.5 if scale is None else scale
    y = emit(node, ops.attention, q, k, v, None, None, scale, argument(node, "is_causal"), 0)
    return emit(node, aten.transpose.int, y, 1, 2)


def _dropout(node: fx.Node) -> fx.Node:
    if argument(node, "train") and argument(node, "p"):
        raise FoldError(
            f"The model drops out with p={argument(node, 'p')}; random masks are not supported yet.",
            valid="p=0.0, or model.eval()",
        )
    found: fx.Node = argument(node, "input")
    if isinstance(node.meta["val"], (tuple, list)):  # the result and its mask, which nothing reads
        for item in list(node.users):
            item.replace_all_uses_with(found)
            node.graph.erase_node(item)
    return found


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
    aten.dropout.default: _dropout,
    aten.native_dropout.default: _dropout,
    aten.copy.default: _copy,
    aten.histc.default: _histc,
    aten.type_as.default: _type_as,
}


def _check_random(node: fx.Node) -> None:
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        raise FoldError(
            f"The model draws random numbers with {node.target}, which is not supported yet.",
            valid="a model without dropout, jitter or noise, or model.eval()",
        )
