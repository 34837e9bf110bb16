"""Running a program on many virtual ranks at once: values of one shape are stacked, and an operator runs on all of them.

A value is a plain tensor where it is the same on every rank, a stack of all ranks' tensors where they have one shape, and
a list where they have not, as the rows that dispatch sends. `foldcc.runtime.simulate` is the plain way of doing this; it runs
each operator on each rank by itself, and the two agree.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from foldcc.mesh import FoldedMesh
from foldcc.ops import record
from foldcc.ops.experts import gather_rows, grouped_linear, grouped_outer, permute, unpermute, unpermute_weights
from foldcc.ops.operator import Operator
from foldcc.verification.field import FUNCTIONS, Field


class Ranked(list[Any]):
    """A value on each rank."""


Watch = Callable[[fx.Node, Ranked], None]


@dataclass(frozen=True)
class Stack:
    """One tensor per rank, of one shape: [ranks, ...]."""

    tensor: Tensor


# Operators that do on a stack what they do on each of its members, by vmap's rules.
_STACKED = frozenset(
    """_log_softmax _log_softmax_backward_data _safe_softmax _softmax _softmax_backward_data _to_copy _unsafe_view add
    addmm alias amax bitwise_and bitwise_not bmm cat clamp clone constant_pad_nd cos detach div eq exp expand gather ge
    gt index_select le log logical_and logical_not lt masked_fill mean mm mul ne neg pow reshape rsqrt scatter select
    sigmoid sigmoid_backward silu silu_backward sin slice slice_backward split split_with_sizes squeeze sub sum t tanh
    topk transpose tril unsqueeze view where zeros_like""".split()
)


def run_in_lockstep(
    mesh: FoldedMesh,
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    watch: Watch | None = None,
    field: Field | None = None,
) -> Any:
    """Runs a graph on every rank of the mesh; see `foldcc.runtime.simulate.simulate`, which this agrees with.

    Args:
        inputs: for each placeholder, its value, a `Ranked` or whatever this returned.
        watch: is shown each node of this graph, with its value on each rank.
        field: whose elements the values are, if they are.

    Returns:
        What the graph returns, with values as they are kept here; `on_ranks` gives them rank by rank.
    """
    values: dict[fx.Node, Any] = {}
    last = {x: node for node in graph.graph.nodes for x in node.all_input_nodes}
    given = iter(inputs)
    for node in graph.graph.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        if node.op == "placeholder":
            values[node] = _packed(next(given))
        elif node.op == "call_module":
            block: Any = graph.get_submodule(str(node.target))
            values[node] = run_in_lockstep(mesh, block, [values[a] for a in node.args], None, field)
        else:
            values[node] = _call(mesh, node, values, field)
        if watch is not None:
            watch(node, on_ranks(values[node], mesh.world_size))
        for x in node.all_input_nodes:
            if last[x] is node:
                del values[x]
    raise AssertionError("a graph ends with its output")


def on_ranks(value: Any, ranks: int) -> Ranked:
    """A value rank by rank; of a tuple, a tuple on each rank."""
    if isinstance(value, Stack):
        return Ranked(value.tensor.unbind())
    if isinstance(value, Ranked):
        return value
    if isinstance(value, (tuple, list)):
        parts = [on_ranks(x, ranks) for x in value]
        return Ranked(tuple(p[r] for p in parts) for r in range(ranks))
    return Ranked([value] * ranks)


def _packed(value: Any) -> Any:
    """A value on each rank, as it is kept; anything else as it is."""
    if not isinstance(value, Ranked):
        return value
    first = value[0]
    if isinstance(first, (tuple, list)):
        return tuple(_packed(Ranked(column)) for column in zip(*value, strict=True))
    if all(x is first for x in value):
        return first
    same = all(isinstance(x, Tensor) and x.shape == first.shape and x.dtype == first.dtype for x in value)
    return Stack(torch.stack(list(value))) if same else value


def _call(mesh: FoldedMesh, node: fx.Node, values: dict[fx.Node, Any], field: Field | None) -> Any:
    read = [values[x] for x in node.all_input_nodes]
    known = record(node.target)
    if known is None and not any(isinstance(x, Ranked) for x in read):
        if node.target is operator.getitem:
            return values[node.args[0]][node.args[1]]
        if not any(isinstance(x, Stack) for x in read):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            return node.target(*args, **kwargs)
        if _name(node.target) in _STACKED:
            return _on_stack(node, values)
    ranked = {x: on_ranks(values[x], mesh.world_size) for x in node.all_input_nodes}
    if node.target in _ROWS:
        return _joined(node, ranked)
    if known is None and _name(node.target) in _EACH and _same_rows(ranked):
        return _each_row(node, ranked)
    calls = [_on_rank(node, ranked, r) for r in range(mesh.world_size)]
    if known is None or known.simulate is None:
        compute = node.target if known is None else known.eager  # a record's meaning, without PyTorch's way to it
        return _packed(Ranked(compute(*args, **kwargs) for args, kwargs in calls))
    return _packed(_exchanged(mesh, known, node, calls, field))


# Operators on rows: the rows of all ranks are computed as if one rank held them all. Experts are then further experts, and
# an order counts from where its rank's rows begin.
_ROWS = {x.overload: x for x in (grouped_linear, grouped_outer, permute, gather_rows, unpermute, unpermute_weights)}
_EACH = frozenset("add mul neg sigmoid sigmoid_backward silu silu_backward sub tanh".split())


def _joined(node: fx.Node, ranked: dict[fx.Node, Ranked]) -> Any:
    """An operator on the rows of all ranks at once."""
    known = _ROWS[node.target]
    given = known.arguments(node.args, dict(node.kwargs))
    held = {name: ranked[x] for name, x in given.items() if isinstance(x, fx.Node)}
    whole = {name: torch.cat(x) for name, x in held.items()}
    if "order" in given:
        sizes = [len(x) * given["copies"] for x in held["x"]] if known is permute else [len(x) for x in held["order"]]
        whole["order"] = torch.cat(_shifted(held["order"], sizes))
    result = node.target(*(whole.get(name, x) for name, x in given.items()))
    like = {grouped_linear: "x", grouped_outer: "counts", permute: "order", gather_rows: "order"}.get(known, "weights")
    copies = given["copies"] if known is gather_rows else 1
    return _packed(Ranked(result.split([len(x) // copies for x in held[like]])))


def _shifted(orders: Ranked, sizes: Sequence[int]) -> list[Tensor]:
    """The orders of all ranks, each counting from where its rank's positions begin, of which it must name no other."""
    found, start = [], 0
    for order, size in zip(orders, sizes, strict=True):
        found.append(order + start)
        start += size
    everyone, limits = torch.cat(found), torch.tensor(sizes).cumsum(0)
    owners = torch.arange(len(sizes)).repeat_interleave(torch.tensor([len(x) for x in orders]))
    if not bool((torch.searchsorted(limits, everyone, right=True) == owners).all()):
        raise IndexError("an order names a row that its rank does not hold")
    return found


def _each_row(node: fx.Node, ranked: dict[fx.Node, Ranked]) -> Any:
    """An operator on each element, where ranks hold different numbers of rows."""
    lengths = [len(x) for x in next(iter(ranked.values()))]
    whole = {x: torch.cat(held) for x, held in ranked.items()}
    args, kwargs = fx.map_arg((node.args, node.kwargs), whole.__getitem__)
    return _packed(Ranked(node.target(*args, **kwargs).split(lengths)))


def _same_rows(ranked: dict[fx.Node, Ranked]) -> bool:
    """Whether all operands have one shape on each rank, and a row at least of dimensions."""
    first, *others = ranked.values()
    return all(isinstance(x, Tensor) and x.dim() for x in first) and all(
        isinstance(y, Tensor) and x.shape == y.shape for held in others for x, y in zip(first, held, strict=True)
    )


def _exchanged(mesh: FoldedMesh, known: Operator, node: fx.Node, calls: list[Any], field: Field | None) -> Ranked:
    """A collective. One that has a transpose is linear: it moves and adds, and needs no mode, which is slow, for either."""
    results = Ranked([None] * mesh.world_size)
    axes = known.arguments(node.args, dict(node.kwargs))["axes"]
    with _disable_current_modes() if known.transpose is not None else nullcontext():
        for group in mesh.groups(tuple(axes.split(","))):
            found = known.simulate([calls[r][0] for r in group])  # type: ignore[misc]
            if field is not None and known.types.startswith("P"):
                sums = {id(x): field.reduced(x) for x in found}
                found = [sums[id(x)] for x in found]
            elif field is not None and known.transpose is not None and known.types in ("V -> V", "V -> R", "V -> dst"):
                _known(field, known, [calls[r][0] for r in group], found)
            for r, value in zip(group, found, strict=True):
                results[r] = value
    return results


def _known(field: Field, known: Operator, given: list[Any], found: list[Tensor]) -> None:
    """What is known of values is known where a collective moves them to."""
    for function in FUNCTIONS:
        there = [field.recall(function, x[0]) for x in given]
        if all(x is not None for x in there):
            moved = known.simulate([(y, *x[1:]) for x, y in zip(given, there, strict=True)])  # type: ignore[misc]
            for x, y in zip(found, moved, strict=True):
                field.remember(function, x, y)


def _on_rank(node: fx.Node, ranked: dict[fx.Node, Ranked], rank: int) -> Any:
    return fx.map_arg((node.args, node.kwargs), lambda n: ranked[n][rank])


def _on_stack(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    stacks = [x for x in node.all_input_nodes if isinstance(values[x], Stack)]
    others = {x: values[x] for x in node.all_input_nodes if not isinstance(values[x], Stack)}

    def call(*tensors: Tensor) -> Any:
        there = {**others, **dict(zip(stacks, tensors, strict=True))}
        args, kwargs = fx.map_arg((node.args, node.kwargs), there.__getitem__)
        return node.target(*args, **kwargs)

    result = torch.vmap(call)(*(values[x].tensor for x in stacks))
    return pytree.tree_map_only(Tensor, Stack, tuple(result) if isinstance(result, list) else result)


def _name(target: Any) -> str:
    return str(target._schema.name.split("::")[1]) if hasattr(target, "_schema") else ""


def leaves(x: Any) -> list[Any]:
    """The values in nested tuples and lists, in order."""
    nested = isinstance(x, (tuple, list)) and not isinstance(x, Ranked)
    return [leaf for item in x for leaf in leaves(item)] if nested else [x]
