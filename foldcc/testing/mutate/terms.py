"""Terms: what every rank computes, as expressions that are compared without knowing what operators mean.

An element of a value is the number of a term. Operators that only move elements move these numbers; numbers that depend on no
data, such as a rank's coordinate, are computed; every other operator makes new terms, named by the operator and the terms
that it reads. Equal terms are equal numbers whatever the data is, and a sum over ranks is the same in any order.
So two programs with equal terms are equivalent; two with different terms may be equivalent or not.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from foldcc import ops
from foldcc.ir.node import name_of
from foldcc.layout import INVARIANT, REPLICATED, Layout
from foldcc.mesh import FoldedMesh
from foldcc.ops import record
from foldcc.ops.operator import Operator
from foldcc.rules.kinds import is_view, named

aten = torch.ops.aten
_MOVING = {ops.all_gather, ops.shard, ops.pad, ops.once, ops.all_to_all}  # collectives that only move elements, or put zeros
_ADDING = {ops.all_reduce, ops.reduce_scatter}
ZERO = 0  # the term of the number zero


def _on_rank(node: fx.Node, values: Mapping[fx.Node, list[Any]], rank: int) -> tuple[Any, Any]:
    found: tuple[Any, Any] = fx.map_arg((node.args, node.kwargs), lambda n: values[n][rank])
    return found


def _moves(target: Any) -> bool:
    return target is operator.getitem or is_view(target) or name_of(target) in named("cat clone roll")


@dataclass(frozen=True)
class Terms:
    """Elements of a tensor, by the numbers of their terms."""

    ids: Tensor


@dataclass(frozen=True)
class Whole:
    """A tensor of which the elements are not told apart, because its size is data."""

    name: int


@dataclass
class Algebra:
    """Terms by number, for programs that are compared with each other."""

    mesh: FoldedMesh
    names: dict[Any, int] = field(default_factory=lambda: {("number", 0.0): ZERO})
    count: int = 1

    def outputs(self, graph: fx.Graph) -> list[Any]:
        """The terms of what a block returns, on every rank, for any values of its arguments."""
        values: dict[fx.Node, list[Any]] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = [self._argument(node, r) for r in range(self.mesh.world_size)]
            elif node.op == "output":
                leaves = [x for x in pytree.tree_leaves(node.args) if isinstance(x, fx.Node)]
                return [[self._key(values[x][r]) for x in leaves] for r in range(self.mesh.world_size)]
            else:
                values[node] = self._called(node, values)
        raise AssertionError("a graph ends with its output")

    def _argument(self, node: fx.Node, rank: int) -> Any:
        """A symbol for each element. Ranks that hold the same, by the value's layout, share it."""
        layout = node.meta.get("layout")
        same: tuple[str, ...] = layout.axes(REPLICATED, INVARIANT) if isinstance(layout, Layout) else ()
        return self._new(("argument", node.name, self.mesh.group_of(rank, same)[0]), node.meta.get("val"))

    def _called(self, node: fx.Node, values: dict[fx.Node, list[Any]]) -> list[Any]:
        calls = [_on_rank(node, values, r) for r in range(self.mesh.world_size)]
        known = record(node.target)
        if known is None or known.simulate is None:
            return [self._local(node, args, kwargs) for args, kwargs in calls]
        axes = known.arguments(node.args, dict(node.kwargs))["axes"]
        found: list[Any] = [None] * self.mesh.world_size
        for group in self.mesh.groups(tuple(axes.split(","))):
            for r, value in zip(group, self._collective(known, node, [calls[r][0] for r in group]), strict=True):
                found[r] = value
        return found

    def _local(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(x, (Terms, Whole)) for x in leaves):
            return node.target(*args, **kwargs)
        if _moves(node.target) and not any(isinstance(x, Whole) for x in leaves):
            # Strides are not told apart, so a view of terms may need a copy.
            target: Any = aten.reshape.default if node.target is aten.view.default else node.target
            moved = target(*pytree.tree_map_only((Terms, Tensor), self._ids, args), **kwargs)
            return pytree.tree_map_only(Tensor, Terms, moved)
        return self._new((str(node.target), self._key((args, kwargs))), node.meta.get("val"))

    def _collective(self, known: Operator, node: fx.Node, calls: list[Any]) -> list[Any]:
        assert known.simulate is not None
        if not any(isinstance(x, (Terms, Whole)) for args in calls for x in args):
            return known.simulate(calls)
        first = [args[0] for args in calls]
        told = [x for x in calls[0][1:] if isinstance(x, int)]
        if known in _MOVING and not any(isinstance(x, Whole) for x in first):
            return [Terms(x) for x in known.simulate([(self._ids(args[0]), *args[1:]) for args in calls])]
        if known in _ADDING:
            terms = [x for x in first if isinstance(x, Whole) or self._ids(x).any()]
            if not terms:
                total: Any = Terms(self._ids(first[0]))
            else:
                total = self._new(("sum", tuple(sorted(self._key(x) for x in terms))), node.args[0].meta.get("val"))
            if known is ops.all_reduce:
                return [total] * len(calls)
            return self._collective(ops.shard, node, [(total, *args[1:], "I") for args in calls])
        read = tuple(self._key([x for x in args if isinstance(x, (Terms, Whole, Tensor))]) for args in calls)
        if known is ops.all_reduce_max:
            read = tuple(sorted(set(read)))
            return [self._new((known.name, read), node.meta.get("val"))] * len(calls)
        return [self._new((known.name, tuple(told), read, i), node.meta.get("val")) for i in range(len(calls))]

    # --- names ---

    def _named(self, name: Any) -> int:
        if name not in self.names:
            self.names[name] = self.count
            self.count += 1
        return self.names[name]

    def _new(self, name: Any, value: Any) -> Any:
        """A value that is made of nothing known, with a term for each element."""
        if isinstance(value, (tuple, list)):
            return tuple(self._new((name, i), v) for i, v in enumerate(value))
        shape = list(value.shape) if isinstance(value, Tensor) else [None]
        if not all(isinstance(n, int) for n in shape):
            return Whole(self._named(name))
        numel = value.numel()
        start = self.names.setdefault((name, tuple(shape)), self.count)
        if start == self.count:
            self.count += max(1, numel)
        return Terms(torch.arange(start, start + numel).view(shape))

    def _ids(self, x: Terms | Tensor) -> Tensor:
        """The terms of a value; those of numbers are the numbers'."""
        if isinstance(x, Terms):
            return x.ids
        numbers = [self._named(("number", float(v))) for v in x.flatten().tolist()]
        return torch.tensor(numbers, dtype=torch.int64).view(x.shape)

    def _key(self, x: Any) -> Any:
        """What a value is called in the names of others."""
        if isinstance(x, Whole):
            return self._named(("whole", x.name))
        if isinstance(x, (Terms, Tensor)):
            ids = self._ids(x)
            return self._named((tuple(ids.shape), ids.contiguous().numpy().tobytes()))
        leaves, spec = pytree.tree_flatten(x)
        if len(leaves) == 1 and leaves[0] is x:
            return str(x)
        return (str(spec), tuple(self._key(leaf) for leaf in leaves))
