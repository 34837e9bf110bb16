"""Regions: stretches of a model that run in a mode of their own, which the flat graph could not tell.

with torch.no_grad():
    y = f(x)                  becomes         y = f(x.detach())
"""

from __future__ import annotations

import torch
from torch import fx
from torch.utils import _pytree as pytree

from foldcc.errors import FoldError

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
INLINED = {_GRAD: 1, _AUTOCAST: 4}  # and which argument of each is the region, before its operands
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
    for module in parts(exported.graph_module):
        graph = module.graph
        _keep_operands(module)
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


def _keep_operands(module: fx.GraphModule) -> None:
    """What a region returns as it was given, such as `x.to(x.dtype)`, is what it was outside, with its gradient."""
    for target, first in INLINED.items():
        for node in module.graph.find_nodes(op="call_function", target=target):
            inner = getattr(module, node.args[first].target).graph
            given = dict(zip(inner.find_nodes(op="placeholder"), node.args[first + 1 :], strict=True))
            (returned,) = inner.find_nodes(op="output")
            for item in list(node.users):
                if returned.args[0][item.args[1]] in given:
                    item.replace_all_uses_with(given[returned.args[0][item.args[1]]])


def inline(module: fx.GraphModule) -> None:
    """Puts the operators of each region in its place."""
    graph = module.graph
    for region in (m for m in module.children() if isinstance(m, fx.GraphModule)):
        inline(region)
    for target, first in INLINED.items():
        for node in graph.find_nodes(op="call_function", target=target):
            body, *operands = node.args[first:]
            with graph.inserting_before(node):
                inner = getattr(module, body.target).graph
                copied = dict(zip(inner.find_nodes(op="placeholder"), operands, strict=True))
                results = graph.graph_copy(inner, copied)
            for item in list(node.users):
                item.replace_all_uses_with(results[item.args[1]])
                graph.erase_node(item)
            graph.erase_node(node)
            if not body.users:
                graph.erase_node(body)


def parts(module: fx.GraphModule) -> list[fx.GraphModule]:
    """The module and its regions, each behind those inside it."""
    return [m for m in reversed(list(module.modules())) if isinstance(m, fx.GraphModule)]


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
