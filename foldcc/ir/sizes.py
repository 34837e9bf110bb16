"""Sizes on one rank, where a size that is data is replaced by its expectation: routing that is balanced.

Under balanced routing every rank receives as many rows as it sends, so an uneven exchange leaves the number of rows as
it is, a gather over n ranks multiplies it by n and a reduce-scatter divides it by n.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import fx

from foldcc import ops
from foldcc.mesh import FoldedMesh
from foldcc.ops import Operator, record

_ROWS = {
    ops.leading.overload: lambda rows, ranks: rows,
    ops.all_to_all_v.overload: lambda rows, ranks: rows,
    ops.all_gather_v.overload: lambda rows, ranks: rows * ranks,
    ops.reduce_scatter_v.overload: lambda rows, ranks: rows / ranks,
}


class Sizes:
    """Expected sizes of the values of one block; feed it the nodes forward, then backward."""

    def __init__(self, mesh: FoldedMesh):
        self.mesh = mesh
        self._expected: dict[sympy.Symbol, float] = {}

    def learn(self, node: fx.Node) -> None:
        """Takes note of the row counts that a collective makes."""
        if node.target not in _ROWS:
            return
        made = _expression(node.meta["val"].shape[0])
        x: fx.Node = node.args[0]
        if isinstance(made, sympy.Symbol) and made not in self._expected:
            rows = self.number(x.meta["val"].shape[0])
            self._expected[made] = _ROWS[node.target](rows, ranks(node, self.mesh) if communicates(node) else 1)

    def number(self, size: Any) -> float:
        """A size as a number; a whole one is an int."""
        found = _expression(size)
        if isinstance(found, int):
            return found
        found = found.subs(self._expected)
        return int(found) if found.is_Integer else float(found)

    def elements(self, value: torch.Tensor) -> float:
        """Elements of a tensor on one rank."""
        return math.prod(self.number(n) for n in value.shape)

    def sent(self, node: fx.Node) -> tuple[float, bool]:
        """Bytes that one rank sends in a collective, and whether that is an expectation."""
        known = record(node.target)
        assert known is not None and known.sent is not None
        x: torch.Tensor = node.args[0].meta["val"]
        y: torch.Tensor = node.meta["val"]
        count = known.sent(self.elements(x), self.elements(y), ranks(node, self.mesh))
        return count * x.element_size(), node.target in _ROWS


def communicates(node: fx.Node) -> bool:
    """Whether ranks send something to one another in this node."""
    known = record(node.target)
    return known is not None and known.communicates


def axes_of(node: fx.Node) -> tuple[str, ...]:
    """The mesh axes of one of foldcc's collectives."""
    known = record(node.target)
    assert isinstance(known, Operator)
    return tuple(known.arguments(node.args, dict(node.kwargs))["axes"].split(","))


def ranks(node: fx.Node, mesh: FoldedMesh) -> int:
    """Ranks in each group of a collective."""
    return math.prod(mesh.size(a) for a in axes_of(node))


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def human(count: float) -> str:
    """Bytes as a person reads them, such as `1.00 MiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"
