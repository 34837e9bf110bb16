"""Rewriting a graph: calls that are inserted say what they compute and where they come from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

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


def inline(before: fx.Node, function: Callable[..., Any], *values: fx.Node) -> Any:
    """Inserts before a node, in its place of the model, the calls of which a function of tensors is made.

    Returns:
        The nodes of what it returns, in the same structure.
    """
    fakes = [x.meta["val"] for x in values]
    inserting = _Inserting(before, dict(zip(map(id, fakes), values, strict=True)))
    with fakes[0].fake_mode, torch.no_grad(), torch._C.DisableTorchFunction(), inserting:  # as it is written, whatever lifts it
        result = function(*fakes)
    return inserting.nodes_of(result)


class _Inserting(TorchDispatchMode):
    """Operators that run inside this context are inserted before a node.

    Attributes:
        nodes: by the identity of each fake tensor, the node whose value it is.
    """

    def __init__(self, before: fx.Node, nodes: dict[int, fx.Node]):
        super().__init__()
        self.before, self.nodes = before, nodes

    def nodes_of(self, values: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda x: self.nodes[id(x)], values)

    def __torch_dispatch__(self, target: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = target(*args, **(kwargs or {}))
        with self.before.graph.inserting_before(self.before):
            node = self.before.graph.call_function(target, *self.nodes_of((tuple(args), dict(kwargs or {}))))
            self._is(node, result)
            for i, x in enumerate(result if isinstance(result, (tuple, list)) else ()):
                self._is(self.before.graph.call_function(operator.getitem, (node, i)), x)
        return result

    def _is(self, node: fx.Node, value: Any) -> None:
        node.meta = provenance(self.before) | {"val": value}
        self.nodes[id(value)] = node


def replace_node(node: fx.Node, new: fx.Node) -> None:
    """Puts another node in a node's place, which goes."""
    if new is not node:
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
