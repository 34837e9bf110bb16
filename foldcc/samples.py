"""Which dimension of each input, and output, is samples: as it was said, or the first, and refused where that is ambiguous."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from foldcc.errors import FoldError, listed
from foldcc.ir.node import argument
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


def samples_of_output(program: Program, i: int, node: fx.Node) -> int | None:
    """Which dimension of an output is samples; None for what all of them have together, such as a loss.

    Raises:
        FoldError: it is neither.
    """
    dims: Any = node.meta["layout"].dims
    value = node.meta["val"]
    if i >= program.own or (not dims and value.is_floating_point()):
        return None
    for slot, entering in zip(program.slots, program.placeholders, strict=True):
        dim = program.batch_dim(entering) if slot.kind == "input" else None
        if dim is None:
            continue
        batch, *rest = entering.meta["layout"].dims[dim:]
        # One sample has no factor: it stands alone in a dimension, or in front of what comes behind it in the input.
        starts = [batch] if batch else [(), *(product[:1] for product in rest[:1])]
        for start in starts:
            alike = [d for d, product in enumerate(dims) if (product[: len(start)] == start if start else not product)]
            if alike:
                return dim if dim in alike else alike[0]
    if value.is_floating_point():
        return None
    raise FoldError(
        f"{program.told_output(i)} has no dimension of samples, and whole numbers of micro-batches have no mean.",
        shape=list(value.shape),
        valid="a model that does not return it; micro_batches=1 and pp=1",
    )
