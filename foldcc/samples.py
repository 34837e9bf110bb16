"""Which dimension of each input is samples: as it was said, or the first, and refused where that is ambiguous."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from foldcc.errors import FoldError, listed
from foldcc.ir.node import argument, argument_or
from foldcc.ir.program import Program
from foldcc.ops.captured import captured_record


def sample_dims(
    leaves: Sequence[Any], names: Sequence[str], said: Mapping[str, int | None], *, divided: bool
) -> dict[str, int | None]:
    """By the path of each tensor among the inputs, its dimension that is samples, or None.

    Args:
        leaves, names: the inputs, and their paths, such as `["input_ids"]`.
        said: by argument name or path, what a user says.
        divided: several data-parallel ranks share the samples.
    """
    tensors = {n: x for n, x in zip(names, leaves, strict=True) if isinstance(x, Tensor)}
    unknown = [key for key in said if key not in tensors and f"['{key}']" not in tensors]
    if unknown:
        raise FoldError(f"batch_dims names {listed(unknown)}, which is no tensor of the call.", valid=listed(tensors))
    told = {n: said[key] for n in tensors for key in (n, n[2:-2]) if key in said}
    found: dict[str, int | None] = {}
    for name, dim in told.items():
        x = tensors[name]
        if dim is not None and not -x.dim() <= dim < x.dim():
            raise FoldError(f"batch_dims says {dim} for {name}, which has {x.dim()} dimensions.")
        found[name] = dim if dim is None else dim % x.dim()
    sizes = {n: tensors[n].shape[d] for n, d in found.items() if d is not None}
    if len(set(sizes.values())) > 1:
        raise FoldError("The inputs hold different numbers of samples.", samples=listed(f"{n}: {s}" for n, s in sizes.items()))
    rest = {n: x for n, x in tensors.items() if n not in found}
    size = next(iter(sizes.values()), None)
    if size is None:
        size = next((x.shape[0] for x in rest.values() if x.dim()), None)
    for name, x in rest.items():
        found[name] = 0 if x.dim() and x.shape[0] == size else None
        # Where the samples are said, an input that holds their number elsewhere has to be said as well.
        if divided and found[name] is None and size is not None and size != 1 and size in x.shape:
            raise FoldError(
                f"Which dimension of {name} is samples is ambiguous: {size} samples, and its shape is {list(x.shape)}.",
                valid=f"parallelize(..., batch_dims={{{name[2:-2]!r}: {list(x.shape).index(size)}}}), or None for no samples",
            )
    return {n: found[n] for n in tensors}


def refuse_numbers(leaves: Sequence[Any], names: Sequence[str], numbers: Collection[str]) -> None:
    """A number that is computed with, such as one of items, may be of the whole call or of each micro-batch.

    Args:
        numbers: the Python numbers among the inputs that the model only computes with.
    """
    for name, x in zip(names, leaves, strict=True):
        if name in numbers or (isinstance(x, Tensor) and not x.dim()):
            raise FoldError(
                f"Whether the number {name} is that of a whole call or of each of its micro-batches is not known.",
                valid="a call without it; micro_batches=1",
            )


def refuse_sums_over_samples(program: Program) -> None:
    """A loss of micro-batches is their mean, so that one which is a sum over samples, and no mean, would be another one."""
    samples = _samples(program)
    calls = {item: call for call in program.calls for item in call.users}
    for output in program.outputs:
        left: list[tuple[Node, Node]] = [] if output.meta["val"].dim() else _inside(program, calls, output)
        seen: set[tuple[Node, Node]] = set()
        while left:
            call, node = left.pop()
            if (call, node) in seen or node.target in _MEANS or _is_mean(node):
                continue
            seen.add((call, node))
            if node.op == "placeholder":
                formals = list(program.blocks[str(call.target)].graph.find_nodes(op="placeholder"))
                left += _inside(program, calls, call.args[formals.index(node)])
            elif not samples & _factors(node):
                if any(samples & _factors(x) for x in node.all_input_nodes) and node.target is not operator.getitem:
                    raise FoldError(
                        "A loss is a sum over samples, and in micro-batches it would be the mean of their sums.",
                        at=node.meta.get("source"),
                        node=node.format_node(),
                        valid="a loss that divides by how many there are; micro_batches=1",
                    )
                left += [(call, x) for x in node.all_input_nodes]


_MEANS = {torch.ops.aten.div.Tensor, torch.ops.aten.mean.dim, torch.ops.aten.mean.default}


def _is_mean(node: Node) -> bool:
    """Whether an operator that reduces takes the mean, as PyTorch's losses do by default."""
    return isinstance(node.target, torch._ops.OpOverload) and argument_or(node, "reduction") == 1


def _inside(program: Program, calls: Mapping[Node, Node], value: Any) -> list[tuple[Node, Node]]:
    """What leaves a block as this value of the main graph, with the call of the block."""
    if value not in calls:
        return []
    call = calls[value]
    left: Any = program.blocks[str(call.target)].graph.output_node().args[0]
    return [(call, left[value.args[1]])]


def _factors(node: Node) -> set[Any]:
    return {f for dim in node.meta.get("dims", ()) for f in dim}


def _samples(program: Program) -> set[Any]:
    """The factors of samples."""
    return {
        f
        for n in program.placeholders
        if program.slot(n.name).kind == "input" and (d := program.batch_dim(n)) is not None
        for f in n.meta["dims"][d]
    }


def refuse_attention_over_samples(program: Program) -> None:
    """Samples that attend to each other are a sequence: the model is sequence-first."""
    samples = _samples(program)
    for _, node in program.nodes():
        if positions := captured_record(node.target).positions:
            sequence = argument(node, positions.queries).meta["dims"][positions.dim]
            if sequence and set(sequence) <= samples:
                raise FoldError(
                    "The first dimension of the inputs, which is taken for samples, is the sequence of an attention.",
                    at=node.meta.get("source"),
                    valid='parallelize(..., batch_dims={"name of an input": its dimension of samples})',
                )
