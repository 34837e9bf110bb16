"""Launchers: what a kernel is given by the function that launches it, and where that function has it from.

def norm(x, weight):                                                  inputs
    u0 = x.shape[0]                                                   a size that data decide
    norm_out = torch.empty((u0, 32,), dtype=torch.float32, device=x.device)
    norm_kernel[grid](x, weight, norm_out, x.stride(0), x.stride(1), weight.stride(0), u0, BR=4)
    return norm_out
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor, fx

from foldcc.codegen.index import sizes, value_sizes
from foldcc.codegen.names import Names, NoText


def read_of(inputs: Sequence[fx.Node], loads: Collection[fx.Node]) -> list[fx.Node]:
    """The inputs that a kernel loads, in their order.

    Raises:
        NoText: it loads something else.
    """
    other = next((n for n in loads if n not in inputs), None)
    if other is not None:
        raise NoText(f"{other.name} is read and not given")
    return [n for n in inputs if n in loads]


def parameters(read: Sequence[fx.Node], made: Iterable[str]) -> list[str]:
    """What a kernel takes: the tensors that it reads, those that it fills, and the strides of the former."""
    return [*(f"{n.name}_ptr" for n in read), *made, *(f"{n.name}_s{d}" for n in read for d in range(len(value_sizes(n))))]


def arguments(read: Sequence[fx.Node], made: Iterable[str]) -> list[str]:
    """What a launcher gives for `parameters`."""
    return [*(n.name for n in read), *made, *(f"{n.name}.stride({d})" for n in read for d in range(len(value_sizes(n))))]


def results(outputs: Iterable[fx.Node]) -> list[str]:
    """What the tensors are called that a kernel fills."""
    return [f"{n.name}_out" for n in outputs]


def allocated(node: fx.Node, beside: fx.Node) -> str:
    """The line that makes room for a result."""
    shape = " ".join(f"{Names().text(x)}," for x in value_sizes(node))
    return f"{node.name}_out = torch.empty(({shape}), dtype={node.meta['val'].dtype}, device={beside.name}.device)"


def decided(nodes: Iterable[fx.Node]) -> set[str]:
    """The sizes of nodes that data decide."""
    return {s.name for n in nodes for size in value_sizes(n) for s in size.free_symbols}


def bound(symbol: str, inputs: Sequence[fx.Node]) -> str:
    """Where a launcher reads a size that data decide.

    Raises:
        NoText: no input has it as a dimension.
    """
    for n in inputs:
        if isinstance(n.meta.get("val"), Tensor):
            for d, size in enumerate(sizes(n.meta["val"].shape)):
                if size.is_Symbol and size.name == symbol:
                    return f"{n.name}.shape[{d}]"
    raise NoText(f"no input has a dimension of {symbol}")
