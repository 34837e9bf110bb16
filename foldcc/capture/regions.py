"""Regions: stretches of a model that run in a mode of their own, which the flat graph could not tell.

with torch.no_grad():
    y = f(x)                  becomes         y = f(x.detach())
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.utils import _pytree as pytree

from foldcc.errors import FoldError

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
# What to do about code that cannot be captured.
STATIC = (
    "tensors instead of Python numbers; experts as foldcc.ops.experts(...), or foldcc.register_experts(cls, fn) for a "
    "module that loops over them"
)


def detach_no_grad(exported: torch.export.ExportedProgram) -> None:
    """Writes `torch.no_grad` out as `detach`, in place, because flattening the graph would lose it.

    Raises:
        FoldError: a region switches gradients on inside another, or switches autocast on.
    """
    for graph in _graphs(exported.graph_module):
        for node in list(graph.find_nodes(op="call_function", target=_AUTOCAST)):
            if node.args[2]:
                raise FoldError(
                    f"The model switches on autocast to {node.args[1]} for a part of its forward: unsupported.",
                    valid="casts written as x.to(dtype), or the whole model in one dtype",
                )
        for node in list(graph.find_nodes(op="call_function", target=_GRAD)):
            if node.args[0] and graph is not exported.graph:
                raise FoldError("The model switches gradients on inside another region, which is not supported.")
            if not node.args[0]:
                with graph.inserting_before(node):
                    node.args = (*node.args[:2], *(_detached(graph, x) for x in node.args[2:]))
    exported.graph_module.recompile()


def _graphs(module: fx.GraphModule) -> Iterator[fx.Graph]:
    for m in module.modules():
        if isinstance(m, fx.GraphModule):
            yield m.graph


def _detached(graph: fx.Graph, x: object) -> object:
    if not isinstance(x, fx.Node) or not isinstance(x.meta.get("val"), torch.Tensor):
        return x
    if not x.meta["val"].is_floating_point():
        return x
    node = graph.call_function(torch.ops.aten.detach.default, (x,))
    node.meta = dict(x.meta)
    return node


def refuse_unknown(graph: fx.GraphModule) -> None:
    """Every operator and every size is the same for all inputs.

    Raises:
        FoldError: the graph branches, or a number or a size depends on the values in a tensor.
    """
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise FoldError(
                f"The model's control flow depends on the values in a tensor, through torch.{node.target}.",
                valid="a model whose operators are the same for all inputs; torch.where chooses between values",
            )
        for value in pytree.tree_leaves(node.meta.get("val")):
            number = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
            if number or (isinstance(value, torch.Tensor) and not all(isinstance(n, int) for n in value.shape)):
                what = "is a number" if number else f"has shape {list(value.shape)}"
                raise FoldError(
                    f"The result of {node.target} {what}, which depends on the values in a tensor.",
                    at=node.meta.get("source"),
                    valid=STATIC,
                )
