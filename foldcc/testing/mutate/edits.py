"""Small edits of a graph: what stands before or after a node, or in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from foldcc import ops

aten = torch.ops.aten
_RESHAPING = {aten.cat.default, aten.slice.Tensor, aten.reshape.default, aten.unsqueeze.default, aten.index_select.default}


def wrap(node: fx.Node, target: Any, *rest: Any, **kwargs: Any) -> None:
    """All that reads `node` reads `target(node, *rest)`. What is known about the node is claimed of the new one."""
    with node.graph.inserting_after(node):
        new = node.graph.call_function(target, (node, *rest), kwargs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def feed(node: fx.Node, target: Any, *rest: Any) -> None:
    """A node reads `target(x, *rest)`, where its first argument was `x`."""
    first: Any = node.args[0]
    new = before(node, target, first, *rest)
    new.meta = dict(first.meta)
    node.args = (new, *node.args[1:])


def instead(node: fx.Node, new: fx.Node) -> None:
    """Puts one node in the place of another, whose claims about type and shape it takes over."""
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def before(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A new call that stands before a node and comes from the same place in the model."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace", "source")}
    if target in _RESHAPING:
        values = fx.map_arg(args, lambda n: n.meta["val"])
        with pytree.tree_leaves(values)[0].fake_mode:
            new.meta["val"] = target(*values)
    elif isinstance(args[0], fx.Node):
        new.meta["val"] = args[0].meta["val"]  # of the same shape, or else `instead` knows better
    return new


def joined(node: fx.Node, blocks: list[fx.Node], dim: int, outer: int) -> fx.Node:
    """The shards of a dimension, one for each rank, joined as a gather joins them, before a node."""
    if outer == 1:
        return before(node, aten.cat.default, blocks, dim)
    apart = [before(node, aten.reshape.default, b, _parts(b, dim, outer)) for b in blocks]
    whole = before(node, aten.cat.default, apart, dim + 1)
    return before(node, aten.reshape.default, whole, [*_shape(blocks[0])[:dim], -1, *_shape(blocks[0])[dim + 1 :]])


def exchanged(node: fx.Node, x: fx.Node, dim: int, outer: int, ranks: int, first: int, second: int) -> fx.Node:
    """What is joined along a dimension, the shards of two ranks in each other's place, before a node."""
    order = list(range(ranks))
    order[first], order[second] = second, first
    if outer < 0:  # zig-zag: twice as many blocks as ranks
        order += [2 * ranks - 1 - i for i in reversed(order)]
        outer = -outer
    apart = x if outer == 1 else before(node, aten.reshape.default, x, _parts(x, dim, outer))
    at = dim if outer == 1 else dim + 1
    size = _shape(apart)[at] // len(order)
    shards = [before(node, aten.slice.Tensor, apart, at, i * size, (i + 1) * size) for i in order]
    whole = before(node, aten.cat.default, shards, at)
    return whole if outer == 1 else before(node, aten.reshape.default, whole, _shape(x))


def _shape(x: fx.Node) -> list[int]:
    return list(x.meta["val"].shape)


def _parts(x: fx.Node, dim: int, outer: int) -> list[int]:
    shape = _shape(x)
    return [*shape[:dim], outer, shape[dim] // outer, *shape[dim + 1 :]]


def place(node: fx.Node, axes: str) -> fx.Node:
    """This rank's coordinate on axes, as a new node before another."""
    new = before(node, ops.axis_index.overload, axes, torch.device("cpu"))
    new.meta["val"] = torch.empty((), dtype=torch.int64)
    return new
