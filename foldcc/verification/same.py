"""That the blocks of a reduced program are those of the full one, and those of the full one what was captured.

Block by block, every node of one is held against its node in the other: operator, operands, axes, layouts and every other
argument that is no whole number. Whole numbers are sizes and offsets, which are what differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx

from foldcc.ir.pipeline import Stages
from foldcc.ir.program import Program
from foldcc.layout import Layout


def first_unlike(full: Stages, small: Stages, last: str) -> str | None:
    """The first node of the full program, at a stage, that is another one in the reduced program; None if none is."""
    order = [stage.name for stage in full]
    later = [last] if order.index(last) > order.index("shard") else []  # until then a reduced program is what was captured
    for stage in ("annotate", "shard", *later):
        ours, theirs = full[stage].program, small[stage].program
        for main, other in zip(ours.mains, theirs.mains, strict=True):
            for name, block in main.named_children():
                for node, twin in _paired(block, other.get_submodule(name)):
                    if not _alike(node, twin):
                        return f"{name} {stage}: {node.format_node() if node is not None else 'nothing'}"
    return None


def vanishes(program: Program, small: Program) -> bool:
    """Whether a dimension that is longer than 1 is so no more."""
    values = ([n.meta.get("val") for _, n in p.nodes()] for p in (program, small))
    sizes = ((x.shape, y.shape) for x, y in zip(*values, strict=True) if isinstance(x, Tensor))
    return any(m == 1 != n for whole, part in sizes for n, m in zip(whole, part, strict=True))


def first_not_captured(stages: Stages) -> str | None:
    """The first node that the annotated program computes otherwise than the captured one, blocks put in line; None if none.

    Casts from one floating-point dtype to another are none, here as over a field.
    """
    captured, annotated = (_in_line(stages[name].program) for name in ("capture", "annotate"))
    for ours, theirs in zip_longest(captured, annotated, fillvalue="nothing"):
        if ours != theirs:
            return f"{ours} became {theirs}"
    return None


def _in_line(program: Program) -> list[str]:
    """What a program computes, step by step, without the names of its values."""
    steps: list[str] = []
    values: dict[fx.Node, Any] = {node: node.name for node in program.placeholders}

    def run(graph: fx.GraphModule, given: list[Any]) -> Any:
        entering = iter(given)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(entering)
            elif node.op == "call_module":
                block: Any = graph.get_submodule(str(node.target))
                values[node] = run(block, [values[a] for a in node.args])
            elif node.op == "call_function" and isinstance(values.get(node.args[0]), list):
                values[node] = values[node.args[0]][node.args[1]]  # a result of a call
            elif node.op == "output":
                return [values[x] for x in node.args[0]]
            elif node.target is torch.ops.aten._to_copy.default and _are_floats(node, *node.all_input_nodes):
                values[node] = values[node.args[0]]
            else:
                read = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = f"#{len(steps)}"
                steps.append(f"{node.target}{read}")

    steps.append(f"returns {run(program.graph, [values[x] for x in program.placeholders])}")
    return steps


def _are_floats(*nodes: fx.Node) -> bool:
    return all(n.meta["val"].is_floating_point() for n in nodes)


def _paired(block: fx.GraphModule, other: fx.GraphModule) -> Iterator[tuple[fx.Node | None, fx.Node | None]]:
    ours, theirs = list(block.graph.nodes), list(other.graph.nodes)
    longest = max(len(ours), len(theirs))
    yield from zip(ours + [None] * (longest - len(ours)), theirs + [None] * (longest - len(theirs)), strict=True)


def _alike(node: fx.Node | None, twin: fx.Node | None) -> bool:
    if node is None or twin is None:
        return False
    told = [(n.op, n.name if n.op != "output" else "", str(n.target), _plain(n.args), _plain(n.kwargs)) for n in (node, twin)]
    layouts = [n.meta.get("layout") for n in (node, twin)]
    return told[0] == told[1] and layouts[0] == layouts[1]


def _plain(argument: Any) -> Any:
    """An argument without whole numbers; nodes by name."""
    if isinstance(argument, fx.Node):
        return argument.name
    if isinstance(argument, Mapping):
        return {k: _plain(v) for k, v in argument.items()}
    if isinstance(argument, (tuple, list)):
        return [_plain(x) for x in argument]
    if isinstance(argument, Layout):
        return argument
    whole = isinstance(argument, (int, torch.SymInt)) and not isinstance(argument, bool)
    return "number" if whole else str(argument)
