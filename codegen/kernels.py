"""The kernels of a program: what each computes, what it moves, its source, and how much of the program they cover."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from sympy import Expr, Integer
from torch import Tensor, fx

from foldcc.codegen.index import product, sizes, value_sizes
from foldcc.codegen.regions import Region, is_free
from foldcc.errors import FoldError
from foldcc.ir.node import name_of
from foldcc.ir.program import where
from foldcc.ops import record

_PRODUCTS = ("aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.mv", "aten.dot", "aten.linear")
_GROUPED = ("foldcc.grouped_linear", "foldcc.grouped_outer")


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel of a program.

    Attributes:
        name: of its launcher.
        key: what it is, by which programs of one call know a kernel again.
        kind: "chain", "column_sum", or the name of a skeleton.
        block, direction: where it stands.
        nodes: names of the nodes that it computes.
        modules: the modules that these came from.
        source: the kernel and its launcher.
        path: the file that holds them.
        moved: bytes that it reads and writes; an expression, where sizes are data. flops: of its arithmetic.
        covered: bytes that its nodes would move one by one.
    """

    name: str
    key: str
    kind: str
    block: str
    direction: str
    nodes: tuple[str, ...]
    modules: tuple[str, ...]
    source: str
    moved: Expr
    flops: Expr
    covered: Expr
    path: Path


class Kernels(Mapping[str, Kernel]):
    """The kernels of a program by name; printing them gives a table.

    Attributes:
        notes: why the program runs as ATen, where that was not asked for.
    """

    def __init__(self, kernels: Sequence[Kernel], left: Mapping[str, Expr], notes: Sequence[str] = ()):
        self._kernels = {k.name: k for k in kernels}
        self._left = dict(left)
        self.notes = tuple(notes)

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._kernels:
            raise FoldError(f"There is no kernel {name!r}.", valid=", ".join(self._kernels) or "none: the program runs as ATen")
        return self._kernels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kernels)

    def __len__(self) -> int:
        return len(self._kernels)

    def coverage(self, rows: int = 1024) -> Coverage:
        """How many of the bytes that operators other than matrix products move are inside kernels.

        Args:
            rows: what a size that is data, such as the rows that arrive at a rank, is taken to be.
        """
        inside = sum(_number(k.covered, rows) for k in self.values())
        left = {name: _number(n, rows) for name, n in self._left.items()}
        return Coverage(inside, dict(sorted(left.items(), key=lambda item: -item[1])))

    def __str__(self) -> str:
        from foldcc.tables import table

        rows = [[k.name, k.kind, k.direction, str(len(k.nodes)), str(k.moved), ", ".join(k.modules)] for k in self.values()]
        shown = table(["kernel", "kind", "direction", "nodes", "bytes", "modules"], rows)
        return "\n".join([*self.notes, shown])


@dataclass(frozen=True)
class Coverage:
    """Bytes of operators other than matrix products, attention and collectives, of one call of each block.

    Attributes:
        inside: of those that kernels compute.
        left: of the others, by operator, the most first.
    """

    inside: float
    left: dict[str, float]

    @property
    def share(self) -> float:
        total = self.inside + sum(self.left.values())
        return self.inside / total if total else 1.0

    def __str__(self) -> str:
        from foldcc.ir.sizes import human

        lines = [f"{self.share:.1%} of {human(self.inside + sum(self.left.values()))} that operators move are inside kernels"]
        return "\n".join([*lines, *(f"  left  {human(n):>12}  {name}" for name, n in self.left.items())])


def moved(node: fx.Node) -> Expr:
    """Bytes that an operator reads and writes by itself: of each operand and each result, whole."""
    total: Expr = Integer(0)
    for x in [*dict.fromkeys(node.all_input_nodes), node]:
        total += _bytes(x.meta.get("val"))
    return total


def _bytes(value: Any) -> Expr:
    if isinstance(value, (tuple, list)):
        return sum((_bytes(v) for v in value), Integer(0))
    return product(sizes(value.shape)) * value.element_size() if isinstance(value, Tensor) else Integer(0)


def counted(node: fx.Node) -> bool:
    """Whether an operator's traffic counts: it is no matrix product, no attention, no collective, and no view."""
    if node.op != "call_function" or is_free(node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    known, name = record(node.target), name_of(node.target)
    if name in _PRODUCTS or name in _GROUPED or "scaled_dot_product" in name or name.startswith("aten.sym_"):
        return False
    return known is None or known.simulate is None


def flops(node: fx.Node) -> Expr:
    """Operations of one node: two for each product and sum of a matrix product, one for each element otherwise."""
    name = name_of(node.target)
    if is_free(node):
        return Integer(0)
    if name == "foldcc.grouped_outer":
        x, grad = node.args[:2]
        return 2 * product(value_sizes(x)) * value_sizes(grad)[1]
    first: Any = node.args[0]
    count: Expr = product(value_sizes(node)) if isinstance(node.meta.get("val"), Tensor) else Integer(0)
    if name == "foldcc.grouped_linear":
        return 2 * count * value_sizes(first)[1]
    source = value_sizes(first) if isinstance(first, fx.Node) and isinstance(first.meta.get("val"), Tensor) else ()
    return sympy.Max(count, product(source)) if count.is_Integer and product(source).is_Integer else count


def described(name: str, found: Region, block: str, direction: str) -> tuple[str, Expr, Expr]:
    """The comment above a kernel; the bytes that it moves, and the operations that it makes."""
    computed = [n for n in found.nodes if not is_free(n)]
    read = sum((_bytes(n.meta.get("val")) for n in found.inputs), Integer(0))
    written = sum((_bytes(n.meta.get("val")) for n in found.outputs), Integer(0))
    count = sum((flops(n) for n in computed), Integer(0))
    sources = dict.fromkeys(s for n in computed if (s := " ".join(filter(None, (where(n), n.meta.get("source"))))))
    lines = [
        f"# {name}: {found.kind}, {len(computed)} nodes of {block}, {direction}",
        f"#   nodes   {', '.join(n.name for n in computed)}",
        *(f"#   at      {s}" for s in sources),
        *(f"#   reads   {n.name} {_shaped(n)}" for n in found.inputs),
        *(f"#   writes  {n.name} {_shaped(n)}" for n in found.outputs),
        f"#   moves   {read + written} bytes, {count} FLOPs",
    ]
    return "\n".join(lines), read + written, count


def _shaped(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]" if isinstance(value, Tensor) else ""


def _number(x: Any, rows: int) -> float:
    x = sympy.sympify(x)
    return float(x.subs(dict.fromkeys(x.free_symbols, rows)))


def modules(found: Region) -> tuple[str, ...]:
    """The modules that a region's nodes came from, in order."""
    return tuple(dict.fromkeys(m for n in found.nodes if not is_free(n) and (m := where(n))))
