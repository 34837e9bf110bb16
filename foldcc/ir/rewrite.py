"""Rewriting a graph: calls that are inserted say what they compute and where they come from."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._subclasses import FakeTensor
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
