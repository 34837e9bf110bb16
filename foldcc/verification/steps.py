"""At which values of an integer input a program steps: `ids % 1000 == 3` has to be tried at 3, at 1003 and beside them.

What is made of an input alone, element by element, is computed for all values that the input may take, with PyTorch's own
integers and real numbers. Where it changes its course, the input is tried: a mask at the values of its rarer side, if they are
few, or on both sides of where it flips; an integer, such as a bucket, where it is not a straight line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from foldcc.verification.meanings import REARRANGES

_UNBOUNDED = (-256, 4096)  # what is tried of an input whose range no use says
_SEARCHED = 2**20  # of how many values at most
_FEW = 32  # steps of one operator at most; of more, so many that are spread evenly
_MOST = 2**23  # elements of a comparison of all values with the elements of a buffer
_LOOKED_UP = ("bucketize", "searchsorted", "isin")
_BY_ELEMENT = ("to", "_to_copy", "floor_divide")
_PLACES = ("device", "memory_format", "layout", "pin_memory")


def steps(node: fx.Node, bound: int | None, data: Mapping[fx.Node, Tensor]) -> tuple[set[int], range | None]:
    """The values of an integer input at which the program changes its course, and those that it may have at all, None for any.

    Args:
        bound: how many values the input may take, if its uses say it.
        data: values of buffers and constants, by their placeholders.
    """
    low, high = _UNBOUNDED if bound is None else (0, min(bound, _SEARCHED))
    tried = torch.arange(low, high).unsqueeze(1)  # against the elements of a buffer as columns
    run = _Steps(tried)
    run.follow(node.graph, {node: tried}, dict(data))
    allowed = tried[run.allowed]
    if len(allowed) in (0, len(tried)):
        return run.found, None if bound is None else range(bound)
    there = range(int(allowed[0]), int(allowed[-1]) + 1)
    return {x for x in run.found if x in there}, there


class _Steps:
    def __init__(self, tried: Tensor):
        self.tried, self.allowed = tried, torch.ones(len(tried), dtype=torch.bool)
        self.found: set[int] = set()

    def follow(self, graph: fx.Graph, made: dict[fx.Node, Tensor], data: dict[fx.Node, Tensor]) -> None:
        """Adds the steps of all that a graph makes of the values that are tried."""
        for node in graph.nodes:
            read = [x for x in node.all_input_nodes if x in made]
            if node.op == "call_module" and read:
                block: Any = graph.owning_module.get_submodule(str(node.target))
                pairs = list(zip(block.graph.find_nodes(op="placeholder"), node.args, strict=True))
                entering = {p: made[a] for p, a in pairs if a in made}
                self.follow(block.graph, entering, {p: data[a] for p, a in pairs if a in data})
            elif node.op == "call_function" and read:
                self._names_rows(node, made)
                result = _made(node, made, data)
                if result is not None:
                    made[node] = result
                    self.found |= _changes(result, self.tried)
            elif node.op == "call_function" and _moves(node) and node.all_input_nodes[0] in data:
                data[node] = data[node.all_input_nodes[0]]

    def _names_rows(self, node: fx.Node, made: Mapping[fx.Node, Tensor]) -> None:
        """Notes which values name a row that is there."""
        if plain_name(node) not in ("embedding", "index", "index_select"):
            return
        table: Any = node.args[0]
        dims = {"embedding": [0], "index": range(table.meta["val"].dim()), "index_select": [node.args[1]]}[plain_name(node)]
        indices = {"embedding": [node.args[1]], "index": node.args[1], "index_select": [node.args[-1]]}[plain_name(node)]
        for dim, index in zip(dims, indices, strict=False):
            if index in made and made[index].dtype != torch.bool:
                there = (made[index] >= 0) & (made[index] < table.meta["val"].shape[dim])
                self.allowed &= there.all(1)


def _moves(node: fx.Node) -> bool:
    return len(node.all_input_nodes) == 1 and plain_name(node) in REARRANGES


def _made(node: fx.Node, made: Mapping[fx.Node, Tensor], data: Mapping[fx.Node, Tensor]) -> Tensor | None:
    """An operator's result for each value that is tried; None where it is not made of that value and of data alone."""
    name = plain_name(node)
    mine = [made[x] for x in node.all_input_nodes if x in made]
    others = {x: data[x].flatten() for x in node.all_input_nodes if x not in made and x in data}
    if len(mine) + len(others) < len(node.all_input_nodes):
        return None
    if _moves(node):
        return mine[0].any(1, True) if name == "any" else mine[0].all(1, True) if name == "all" else mine[0]
    if name == "index" and list(others) == [node.args[0]] and data[node.args[0]].dim() == len(node.args[1]) == 1:
        table, at = others[node.args[0]], mine[0]
        return table[at.clamp(0, len(table) - 1)] if at.dtype == torch.long else None
    if name not in _LOOKED_UP:
        if name not in _BY_ELEMENT and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            return None
        widths = {x.shape[-1] for x in [*mine, *others.values()]} - {1}
        if len(widths) > 1 or len(mine[0]) * max(widths, default=1) > _MOST:
            return None
    values = {x: made.get(x, others.get(x)) for x in node.all_input_nodes}
    args, kwargs = fx.map_arg((node.args, {k: v for k, v in node.kwargs.items() if k not in _PLACES}), values.__getitem__)
    result = node.target(*args, **kwargs)
    return result if isinstance(result, Tensor) and result.dim() == 2 else None


def _changes(result: Tensor, tried: Tensor) -> set[int]:
    """The values that are tried at which a result changes its course, as far as they are few."""
    if result.is_floating_point() or len(tried) < 3:
        return set()
    if result.dtype == torch.bool:
        rarer = result if int(result.sum()) * 2 <= result.numel() else ~result
        at = rarer.any(1).nonzero().flatten()
        if len(at) > _FEW:
            flips = (result[1:] != result[:-1]).any(1).nonzero().flatten()
            at = torch.cat([flips + step for step in (-1, 0, 1, 2)]).clamp(0, len(tried) - 1).unique()
    else:
        at = (result.long().diff(n=2, dim=0) != 0).any(1).nonzero().flatten() + 1
    if len(at) > _FEW:
        at = at[torch.linspace(0, len(at) - 1, _FEW).long()]
    return set(tried[at].flatten().tolist())


def plain_name(node: fx.Node) -> str:
    return str(node.target._schema.name.split("::")[1]) if hasattr(node.target, "_schema") else ""
