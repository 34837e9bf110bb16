"""Rewriting a graph: calls that are inserted say what they compute and where they come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

_PROVENANCE = ("nn_module_stack", "stack_trace", "source", "origin")


def provenance(node: fx.Node) -> dict[str, Any]:
    """What says where a node comes from, for one that stands in its place."""
    return {k: node.meta[k] for k in _PROVENANCE if k in node.meta}


def emit(before: fx.Node, target: Any, *args: Any, about: fx.Node | None = None, **kwargs: Any) -> fx.Node:
    """Inserts a call before a node, with its fake value and a provenance.

    Args:
        about: the node whose place in the model it has; `before`, unless said otherwise.
    """
    with before.graph.inserting_before(before):
        new = before.graph.call_function(target, args, kwargs)
    new.meta = provenance(about if about is not None else before)
    values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    with next(x.fake_mode for x in pytree.tree_leaves((values, named)) if isinstance(x, FakeTensor)):
        new.meta["val"] = target(*values, **named)
    return new


def inline(before: fx.Node, function: Callable[..., Any], *values: fx.Node) -> fx.Node:
    """Inserts before a node, in its place of the model, the calls of which a function of tensors is made."""
    fakes = [x.meta["val"] for x in values]
    with fakes[0].fake_mode, torch.no_grad(), torch._C.DisableTorchFunction():  # as it is written, whatever lifts the model
        traced = make_fx(function)(*fakes)
    copied = dict(zip(traced.graph.find_nodes(op="placeholder"), values, strict=True))
    for node in (n for n in traced.graph.nodes if n.op == "call_function"):
        with before.graph.inserting_before(before):
            copied[node] = before.graph.node_copy(node, copied.__getitem__)
        copied[node].meta = provenance(before) | {"val": node.meta["val"]}
    (output,) = traced.graph.find_nodes(op="output")
    return copied[output.args[0]]


def replace_node(node: fx.Node, new: fx.Node) -> None:
    """Puts another node in a node's place, which goes."""
    if new is not node:
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
