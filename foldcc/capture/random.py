"""Random numbers of a captured program: each draw is a function of a key of its own, which enters the program.

    y = rand_like(x)
becomes
    bits = random_bits(key0, [arange(4), arange(16)])
    y = to(bits, f32) * 2**-24

where key0 is the first number that the model draws from PyTorch's default generator in a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from foldcc.errors import FoldError
from foldcc.ir.node import argument
from foldcc.ir.program import Slot, entering, where
from foldcc.ir.rewrite import emit, inline, replace_node
from foldcc.ops.experts import activate, experts_node
from foldcc.ops.operator import by_name
from foldcc.ops.random import DRAWS, check_draw, everywhere, name_of_draw

aten = torch.ops.aten


def with_keys(graph: fx.GraphModule, slots: Sequence[Slot]) -> tuple[Slot, ...]:
    """Rewrites the graph in place; returns the slots and those of the keys, in the order in which the model draws.

    Raises:
        FoldError: what is drawn is no function of a key and of positions.
    """
    found = list(slots)
    drawn = 0
    activations = {(argument(n, "act"), _width(n)): n for n in graph.graph.find_nodes(op="call_function", target=experts_node)}
    for node in activations.values():
        _check_activation(node)
    for node in list(graph.graph.nodes):
        name = name_of_draw(node.target)
        given = by_name(node.target, node.args, node.kwargs) if name else {}
        if not name or given.get("dropout_p") == 0:
            continue
        check_draw(node.target, given)
        like = node.meta["val"]
        if given.get("p") in (0, 1):  # certain, and drawn by nobody
            replace_node(node, emit(node, aten.full_like.default, given["self"], given["p"], dtype=like.dtype))
            continue
        with like.fake_mode:
            value = torch.empty((), dtype=torch.int64, device=like.device)
        key = entering(graph.graph, found, Slot(f"key{drawn}", "key", (str(drawn),)), value)
        drawn += 1
        named = {n: x for n, x in given.items() if isinstance(x, fx.Node)}
        rest = given | {"dtype": like.dtype}
        new = inline(node, partial(_drawn, DRAWS[name], like.shape, tuple(named), rest), key, *named.values())
        replace_node(node, new)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return tuple(found)


def _drawn(
    draw: Any, shape: Sequence[int], names: Sequence[str], rest: dict[str, Any], key: Tensor, *operands: Tensor
) -> Tensor:
    given = {**rest, **dict(zip(names, operands, strict=True)), "at": everywhere(shape, key.device)}
    found: Tensor = draw(key, given)
    return found


def _check_activation(node: fx.Node) -> None:
    """The rows of an expert are tokens in the order of a routing, so what is drawn for a row has no position."""
    with torch.no_grad():
        traced = make_fx(lambda rows: activate(rows, argument(node, "act")))(torch.empty(2, _width(node), device="meta"))
    for inside in traced.graph.nodes:
        if name_of_draw(inside.target):
            raise FoldError(
                f"The activation of experts draws random numbers with {inside.target}: it is given the rows of one expert, "
                "which have no places of their own.",
                at=where(node),
                valid="dropout on the tokens before the experts or behind them",
            )


def _width(node: fx.Node) -> int:
    """Of what an activation is given."""
    return int(argument(node, "w_up").meta["val"].shape[2 if argument(node, "transposed") else 1])
