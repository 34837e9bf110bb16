"""What torch.export traces, in functional operators alone: none writes in place, and none may or may not be a view.

    y = x.to(torch.float32)       becomes       x, where that is its dtype, else _to_copy(x, dtype=float32)
    w /= w.sum()                  becomes       v = w / w.sum(), which is read in the place of w from there on

torch.export's own way traces the whole program once more. So only a program that writes into what something else is a view
of, or is called under autocast, goes it; any other is rewritten where it stands.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram

from foldcc.capture import batch_norm, regions
from foldcc.ir.node import name_of
from foldcc.ir.rewrite import inline, replace_node
from foldcc.rules.kinds import named

_WRITTEN_OUT = named("concat diff einsum outer repeat_interleave")  # no rule says more of them than what they are made of
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The same program in functional operators; the one that is given is used up."""
    module = exported.graph_module
    for part in regions.parts(module):
        for node in [n for n in part.graph.nodes if _ambiguous(n.target)]:
            _expand(node)
    regions.detach_no_grad(exported)
    casts = torch._C._is_any_autocast_enabled()  # which are made in a second trace
    if not casts:
        regions.inline(module)
        _out_of_place(module.graph)
    if not casts and not any(isinstance(n.target, HigherOrderOperator) or _writes(n.target) for n in module.graph.nodes):
        return exported
    for part in regions.parts(module):
        part.recompile()
    with torch._C.DisableTorchFunction():  # what a mode of the caller makes of a call is in the graph already
        return exported.run_decompositions(batch_norm.DECOMPOSED)


def _ambiguous(target: Any) -> bool:
    """Whether what an operator is made of, or whether its result is a view, depends on its operands."""
    if not isinstance(target, OpOverload) or not torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), _COMPOSITE):
        return False
    return (_views(target) or name_of(target) in _WRITTEN_OUT) and not _writes(target)


def _views(target: Any) -> bool:
    """Whether results of an operator share memory with an operand."""
    return not isinstance(target, OpOverload) or any(a.alias_info is not None for a in target._schema.arguments)


def _writes(target: Any) -> bool:
    """Whether an operator changes an operand, or may. Schemas do not say it of running statistics."""
    if not isinstance(target, OpOverload) or target is torch.ops.aten.dropout.default:  # `normalize` says what that is
        return False
    named = any(a.name == "running_mean" for a in target._schema.arguments)
    return named or target._schema.is_mutable or torch.Tag.maybe_aliasing_or_mutating in target.tags


def _out_of_place(graph: fx.Graph) -> None:
    """What is written into a value that the graph has made is a value of its own, if nothing that is read later shares it."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    sharing: dict[fx.Node, list[fx.Node]] = {}  # by each value that the graph has made, all in the same memory
    for node in [n for n in graph.nodes if n.op == "call_function"]:
        x = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if _writes(node.target) and x in sharing:
            last = max((order[u] for v in sharing[x] if v is not x for u in v.users), default=-1)
            if last < order[node] and _write_anew(node):
                for user in [u for u in x.users if order[u] > order[node]]:
                    user.replace_input_with(x, node)
                sharing[node] = [node]
        elif node.target is operator.getitem and not _views(x.target):
            first = next(n for n in x.users if n.args == node.args)
            sharing.setdefault(first, []).append(node)
            sharing[node] = sharing[first]
        elif not _views(node.target):
            sharing[node] = [node]
        elif x in sharing:
            sharing[node] = sharing[x]
            sharing[x].append(node)


def _write_anew(node: fx.Node) -> bool:
    """Makes a call that writes into its first operand one that leaves it as it is, where there is such an operator."""
    target, x = node.target, node.args[0].meta["val"]
    name, _, overload = target.name().removesuffix(".default").partition(".")
    packet = getattr(getattr(torch.ops, target.namespace), name.split("::")[1].removesuffix("_"), None)
    plain = getattr(packet, overload or "default", None)
    if plain is None or plain is target or _views(plain) or _writes(plain):
        return False
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with torch.no_grad(), torch._C.DisableTorchFunction():
        result = plain(*args, **kwargs)
    if result.shape != x.shape or result.dtype != x.dtype:
        return False
    node.target, node.meta["val"] = plain, result
    return True


def _expand(node: fx.Node) -> None:
    """Puts what an operator is made of, for operands such as it has, in its place."""
    operands = node.all_input_nodes

    def called(*values: Tensor) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), dict(zip(operands, values, strict=True)).__getitem__)
        return node.target(*args, **kwargs)

    made = inline(node, called, *operands)
    if isinstance(made, fx.Node):
        replace_node(node, made)
        return
    for item in list(node.users):
        replace_node(item, made[item.args[1]])
    node.graph.erase_node(node)
