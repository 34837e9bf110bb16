"""Normalizing a captured graph: what says nothing goes, and what hides a sum over tokens is written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from foldcc import ops
from foldcc.capture import losses
from foldcc.capture.convolutions import causal
from foldcc.ir.node import argument, name_of
from foldcc.ir.rewrite import emit, replace_node
from foldcc.ops.capacity import most, places
from foldcc.ops.random import gain
from foldcc.rules.kinds import FILLS, RESHAPES, SAME, filled_with

aten = torch.ops.aten
_DROPPED = SAME - {"aten.detach"} | {"aten.detach_"}  # what detach cuts off stays cut off; nobody reads what detach_ leaves


ALIASES = {
    getattr(getattr(aten, f"__{name}__"), overload): getattr(getattr(aten, f"bitwise_{name}"), overload)
    for name in ("and", "or", "xor")
    for overload in ("Tensor", "Scalar")
}


def normalize(graph: fx.GraphModule) -> None:
    """Rewrites the graph in place."""
    for node in list(graph.graph.nodes):
        if node.target in REWRITES:
            replace_node(node, REWRITES[node.target](node))
        elif name_of(node.target) in _DROPPED:
            replace_node(node, node.args[0])
        elif node.target in ALIASES:
            node.target = ALIASES[node.target]
        elif name_of(node.target) in RESHAPES - {"aten.reshape"}:
            node.target, node.args = aten.reshape.default, (node.args[0], list(node.meta["val"].shape))
        elif node.target is aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _attention(node: fx.Node) -> fx.Node:
    q, k, v, mask = (argument(node, name) for name in ("query", "key", "value", "attn_mask"))
    scale, causal, dropout = (argument(node, name) for name in ("scale", "is_causal", "dropout_p"))
    scale = q.meta["val"].shape[-1] ** -0.5 if scale is None else scale
    heads = q.meta["val"].dim() == 4
    if not heads and q.meta["val"].dim() != 3:
        return node
    if not heads:
        q, k, v = (emit(node, aten.unsqueeze.default, x, 1) for x in (q, k, v))
    if not heads and mask is not None and mask.meta["val"].dim() == 3:
        mask = emit(node, aten.unsqueeze.default, mask, 1)
    keep = None
    if dropout:
        pairs = [*q.meta["val"].shape[:3], k.meta["val"].shape[2]]
        keep = _kept(node, emit(node, aten.new_empty.default, q, pairs), dropout)
    y = emit(node, ops.attention, q, k, v, None, None, scale, causal, 0, keep=keep, dropout=dropout, mask=mask)
    return emit(node, aten.transpose.int, y, 1, 2) if heads else emit(node, aten.squeeze.dim, y, 2)


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


def _scaled_by(node: fx.Node) -> fx.Node:
    """A product with, or a quotient by, a tensor of one number that is known: with that number, which may go with sizes."""
    x, by = node.args
    filled = isinstance(by, fx.Node) and name_of(by.target) in FILLS and by.meta["val"].dim() == 0
    number = filled_with(by) if filled else None
    if not isinstance(x, fx.Node) or not isinstance(number, (int, float)) or node.meta["val"].dtype != x.meta["val"].dtype:
        return node
    return emit(node, node.target, x, torch.tensor(number, dtype=by.meta["val"].dtype, device="cpu").item())


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


def _index(node: fx.Node) -> fx.Node:
    """`x[batch, position]` by indices that count all entries of x is x, as masks are made of functions of positions."""
    x, indices = node.args[0], node.args[1]
    found = [x for x in (None if i is None else _constant(i) for i in indices) if x is not None]
    if len(found) < len(indices):
        return node
    shape = torch.broadcast_shapes(*(i.shape for i in found))
    wide, left = x.meta["val"].shape, [1] * len(shape)
    for n, i in zip(wide, found, strict=False):
        dims = [d - i.dim() for d, m in enumerate(i.shape) if m != 1] or [-1]
        left[dims[0]] *= n
        if len(dims) > 1 or i.numel() != n or not torch.equal(i.flatten(), torch.arange(n, device="cpu")):
            return node
    order = [d - i.dim() for i in found for d, m in enumerate(i.shape) if m != 1]
    if tuple(left) != shape or order != sorted(order):
        return node
    return emit(node, aten.reshape.default, x, [*shape, *wide[len(found) :]])


def _constant(node: fx.Node) -> torch.Tensor | None:
    """The numbers of a value that no operand of the program decides."""
    known: dict[fx.Node, Any] = {}

    def value(n: fx.Node) -> Any:
        if n not in known:
            known[n] = None
            args, kwargs = fx.map_arg((n.args, n.kwargs), value)
            drawn = torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
            if n.op == "call_function" and not drawn and not any(known[x] is None for x in n.all_input_nodes):
                kwargs = {k: torch.device("cpu") if k == "device" else x for k, x in kwargs.items()}
                known[n] = n.target(*args, **kwargs)
        return known[n]

    with torch.device("cpu"):
        return value(node)


def _repeat(node: fx.Node) -> fx.Node:
    """Each dimension several times over: one that is expanded before it."""
    x, times = node.args
    shape = [1] * (len(times) - x.meta["val"].dim()) + list(x.meta["val"].shape)
    apart = emit(node, aten.reshape.default, x, [m for n in shape for m in (1, n)])
    apart = emit(node, aten.expand.default, apart, [m for pair in zip(times, shape, strict=True) for m in pair])
    return emit(node, aten.reshape.default, apart, list(node.meta["val"].shape))


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
    aten.cross_entropy_loss.default: losses.cross_entropy,
    aten.nll_loss_nd.default: losses.nll,
    aten.nll_loss.default: losses.nll,
    aten.scaled_dot_product_attention.default: _attention,
    aten.dropout.default: _dropout,
    aten.native_dropout.default: _dropout,
    aten.conv1d.default: causal,
    aten.copy.default: _copy,
    aten.div.Tensor: _scaled_by,
    aten.mul.Tensor: _scaled_by,
    aten.index.Tensor: _index,
    aten.histc.default: _histc,
    aten.repeat.default: _repeat,
    aten.type_as.default: _type_as,
    ops.experts_node: _present,
}
