"""Simplify: the backward pass without the detours that automatic differentiation and its tracing leave.

    pow(x, 1)                                                                      becomes    x
    t(t(x))                                                                        becomes    x
    div(expand(x), n)                                                              becomes    expand(div(x, n))
    mul(expand(x), y), of y's shape                                                becomes    mul(x, y)
    grad * (sigmoid(x) * (1 + x * (1 - sigmoid(x))))                               becomes    silu_backward(grad, x)

Every number stays what it was, except for the last line, which rounds as PyTorch does when it is not traced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.subgraph_rewriter import replace_pattern_with_filters

from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program

aten = torch.ops.aten
_WITH_NUMBER = {aten.mul.Scalar, aten.div.Scalar}
_ELEMENTWISE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


@dataclass(frozen=True, kw_only=True)
class Simplify(Pass):
    requires = frozenset({"lowered"})
    provides = frozenset({"simplified"})

    def run(self, program: Program) -> Program:
        for block in program.backward.children() if program.backward is not None else ():
            assert isinstance(block, fx.GraphModule)
            for node in block.graph.nodes:  # with those that are inserted after it
                _drop(node)
            block.graph.eliminate_dead_code()
            _join_silu(block)
            block.recompile()
        return program


def _drop(node: fx.Node) -> None:
    args: tuple[Any, ...] = node.args
    if node.target is aten.pow.Tensor_Scalar and args[1] == 1:
        node.replace_all_uses_with(args[0])
    elif node.target is aten.t.default and args[0].target is aten.t.default:
        node.replace_all_uses_with(args[0].args[0])
    elif node.target is aten.expand.default:
        for user in list(node.users):
            if user.target in _WITH_NUMBER:
                _expand_late(node, user)
            elif user.target in _ELEMENTWISE and all(_same_shape(x, node) for x in _others(user, node)):
                user.replace_input_with(node, args[0])


def _expand_late(expand: fx.Node, user: fx.Node) -> None:
    x, graph = expand.args[0], expand.graph
    assert isinstance(x, fx.Node)
    with graph.inserting_after(user):
        late = graph.call_function(expand.target, (user, *expand.args[1:]), expand.kwargs)
    late.meta = dict(user.meta)
    user.replace_all_uses_with(late, delete_user_cb=lambda n: n is not late)
    user.replace_input_with(expand, x)
    user.meta = {**user.meta, "val": x.meta["val"].to(user.meta["val"].dtype)}


def _others(user: fx.Node, node: fx.Node) -> Iterator[Any]:
    others = [x for x in user.args[:2] if x is not node]
    yield from others or [None]


def _same_shape(x: Any, node: fx.Node) -> bool:
    return isinstance(x, fx.Node) and str(x.meta["val"].shape) == str(node.meta["val"].shape)


def _join_silu(block: fx.GraphModule) -> None:
    """Puts together again what tracing takes apart: `silu_backward` has no decomposition that could be switched off."""
    replace_pattern_with_filters(block, _silu_apart(), _silu_whole())
    for new in block.graph.find_nodes(op="call_function", target=aten.silu_backward.default):
        grad, x = new.args
        new.meta = {**grad.meta, "val": x.meta["val"]}


def _silu_apart() -> fx.Graph:
    graph = fx.Graph()
    grad, x = graph.placeholder("grad"), graph.placeholder("x")
    call = graph.call_function
    sigmoid = call(aten.sigmoid.default, (x,))
    one = call(aten.fill.Scalar, (call(aten.empty_like.default, (sigmoid,), {"memory_format": torch.preserve_format}), 1))
    slope = call(aten.add.Scalar, (call(aten.mul.Tensor, (x, call(aten.sub.Tensor, (one, sigmoid)))), 1))
    result = call(aten.mul.Tensor, (grad, call(aten.mul.Tensor, (sigmoid, slope))))
    graph.output(result)
    return graph


def _silu_whole() -> fx.Graph:
    graph = fx.Graph()
    grad, x = graph.placeholder("grad"), graph.placeholder("x")
    graph.output(graph.call_function(aten.silu_backward.default, (grad, x)))
    return graph
