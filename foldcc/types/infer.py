"""The types of one node of a differentiated graph, on every atom of the mesh, from those of its operands.

Of a collective the operand must have one type on its axes, and the result has another there and the same elsewhere. Any
other operator is judged on each atom by its rule (`foldcc/types/axis.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from foldcc import ops
from foldcc.ir.node import name_of, operands
from foldcc.ir.text import type_text
from foldcc.layout import PARTIAL, REPLICATED, VARYING, Layout, Shard, State
from foldcc.mesh import FoldedMesh
from foldcc.ops import Operator, record
from foldcc.rules.joint import CREATORS, is_zero, joint_rule, shape_of
from foldcc.rules.notation import Rule
from foldcc.types.atoms import atoms_of
from foldcc.types.axis import EITHER, MIXED, SAME, TERM, UNKNOWN, ZERO, Illegal, Type, fits, of_state, read_across, through
from foldcc.types.text import illegal

aten = torch.ops.aten
_UNKNOWN = Rule((), (), {})
_BUCKETS = {ops.all_reduce, ops.all_gather, ops.reduce_scatter}  # may be of several values at once
# Results of operators on the host that are the same on every rank of an axis, because every rank of it is told the same.
_TOLD = {ops.splits.overload: {2: "etp", 3: "etp"}}


@dataclass(frozen=True)
class Value:
    """The types of a value by atom; of a bucket, also the values that were joined to it, each with its elements."""

    types: Mapping[str, Type]
    pieces: tuple[tuple[Value, int], ...] = ()


class Typing:
    """Types on one mesh."""

    def __init__(self, mesh: FoldedMesh):
        self.mesh = mesh
        self.atoms = atoms_of(mesh.virtual)
        views = {mesh.view(axis): self._beside(axis) for axis in self.atoms.of}
        self._views = [views[view] for view in sorted(views)] or [[]]

    def of(self, layout: Layout) -> Value:
        """The types of a layout, on its own view and, where they agree, on the other."""
        types = {a: of_state(s, layout.used_up(s)) for a, s in layout.states.items()}
        return Value(self._crossed({b: t for a, t in types.items() for b in self.atoms.of[a]}))

    def fits(self, value: Value, axis: str, state: State) -> bool:
        """Whether a value may stand where a layout has a state on an axis."""
        return all(fits(value.types[b], state) for b in self.atoms.of[axis])

    def on(self, value: Value, axis: str) -> Type:
        """What all atoms of an axis have in common."""
        return read_across([value.types[b] for b in self.atoms.of[axis]])

    def node(self, node: fx.Node, values: Mapping[fx.Node, Any], part: str) -> Any:
        """A Value, a tuple of them for several results, or None for a size.

        Raises:
            FoldError: the operator is not legal for its operands' types.
        """
        made = node.meta.get("val")
        if node.target is operator.getitem:
            return values[node.args[0]][node.args[1]]
        if isinstance(made, (int, float, torch.SymInt)):
            return None
        given = {i: values[x] for i, x in enumerate(operands(node)) if x is not None}
        known = record(node.target)
        if known is not None and "->" in known.types:
            return self._collective(node, known, given.get(0), values, part)
        if node.target is aten.split_with_sizes.default and _cuts(node, given[0]):
            return tuple(piece for piece, _ in given[0].pieces)
        if is_zero(node):
            return Value(dict.fromkeys(self.atoms.across, Type(ZERO)))
        rule = (joint_rule(node) if made is not None else None) or _UNKNOWN
        results = len(made) if isinstance(made, (tuple, list)) else 1
        found = self.apply(node, rule, {} if name_of(node.target) in CREATORS else given, results, values, part)
        for i, axis in _TOLD.get(node.target, {}).items():
            found[i] = Value(self._set(found[i].types, {axis: SAME} if axis in self.atoms.of else {}))
        if node.target is aten.cat.default:
            elements = [_elements(x) for x in operands(node) if x is not None]
            return Value(found[0].types, tuple(zip(given.values(), elements, strict=True)))
        if node.target is aten.reshape.default and given[0].pieces:
            pieces = ((self.apply(node, rule, {0: x}, 1, values, part)[0], n) for x, n in given[0].pieces)
            return Value(found[0].types, tuple(pieces))
        return tuple(found) if isinstance(made, (tuple, list)) else found[0]

    def apply(
        self, node: fx.Node, rule: Rule, given: Mapping[int, Value], results: int, values: Mapping[fx.Node, Any], part: str
    ) -> list[Value]:
        """The results of an operator that acts on each rank by itself."""
        tensors = operands(node)
        counts = frozenset(i for i in given if not _is_number(tensors[i]))
        made = node.meta.get("val")
        shapes = [shape_of(v) or () for v in (made if isinstance(made, (tuple, list)) else [made])]
        found: list[dict[str, Type]] = [{} for _ in range(results)]
        for atom in self.atoms.across:
            types = {i: v.types[atom] for i, v in given.items()}
            try:
                left = _each(rule, types, counts, results)
            except Illegal as why:
                raise illegal(node, f"{why} over {self.atoms.axes(atom)}", part, self.told(node, values)) from None
            for result, type_, shape in zip(found, left, shapes, strict=True):
                # Over a dimension of size 1 along which all is equal, differentiation writes no sum.
                one = type_.letter == REPLICATED and any(shape[d] == 1 for d in type_.dims if d < len(shape))
                result[atom] = type_._replace(loose=True) if one else type_
        return [Value(self._crossed(types)) for types in found]

    def _collective(self, node: fx.Node, known: Operator, x: Value | None, values: Mapping[fx.Node, Any], part: str) -> Value:
        """Changes the type on the collective's axes as its record says, and nowhere else."""
        arguments = known.arguments(node.args, dict(node.kwargs))
        source, _, target = known.types.partition("->")
        before, after = (arguments.get(t.strip(), t.strip()) for t in (source, target))
        dim, on = arguments.get("dim", 0), [a for a in arguments["axes"].split(",") if a in self.atoms.of]
        axes = arguments["axes"].split(",")
        cut, joined = (dict(zip(axes, arguments.get(x, [dim] * len(axes)), strict=True)) for x in ("dims", "into"))
        now = Value(dict.fromkeys(self.atoms.across, SAME)) if x is None else x
        if not _fits_ranks(node, known, dim, prod(self.mesh.size(a) for a in on)):
            why = f"has not the sizes of dimension {dim} over {', '.join(on)}"
            raise illegal(node, why, part, self.told(node, values))
        for axis in on:
            if before and not all(_takes(known, before, cut[axis], now.types[b]) for b in self.atoms.of[axis]):
                why = f"needs {before} on {axis}, and its operand is {self.on(now, axis).letter}"
                raise illegal(node, why, part, self.told(node, values, self._beside(axis)))
        left = {a: _after(known, after, joined[a], node, arguments) for a in on}
        types = self._set(now.types, {a: left[a] if self.on(now, a).letter != ZERO else Type(ZERO) for a in on})
        if known.transpose is None and PARTIAL in {t.letter for t in types.values()}:
            raise illegal(node, "is not linear in terms of a sum", part, self.told(node, values))
        pieces = now.pieces if known in _BUCKETS else ()
        longer, shorter = (_elements(node), _elements(node.all_input_nodes[0])) if pieces else (1, 1)
        found = ((self._collective(node, known, x, values, part), n * longer // shorter) for x, n in pieces)
        if known is ops.reduce_scatter:  # rows do not show which dimension of a piece is divided
            found = ((Value(self._set(x.types, dict.fromkeys(on, UNKNOWN))), n) for x, n in found)
        return Value(types, tuple(found))

    def _set(self, types: Mapping[str, Type], changed: Mapping[str, Type]) -> dict[str, Type]:
        """Other types on some axes; atoms of the other view over the same ranks follow."""
        new = {b: t for a, t in changed.items() for b in self.atoms.of[a]}
        stale = {c: Type(MIXED) for b in new for c in self.atoms.across[b]}
        return self._crossed({**types, **stale, **new})

    def _crossed(self, types: Mapping[str, Type]) -> dict[str, Type]:
        """Atoms of one view that have no type, or whose operands do not agree, read off those of the other."""
        known = {b: t for b, t in types.items() if t.letter != MIXED}
        return {b: known[b] if b in known else read_across([types[c] for c in over]) for b, over in self.atoms.across.items()}

    # --- what is shown ---------------------------------------------------------------------------

    def shown(self, value: Value) -> dict[str, Type]:
        """The types of a value by axis, on the view whose axes say more."""
        views = [{a: self.on(value, a) for a in axes} for axes in self._views]
        return min(views, key=lambda types: sum(t.letter == MIXED for t in types.values()))

    def _beside(self, axis: str) -> list[str]:
        return [a for a in self.atoms.of if self.mesh.view(a) == self.mesh.view(axis)]

    def text(self, node: fx.Node, value: Value, axes: list[str]) -> str:
        return type_text(node, {a: self.on(value, a) for a in axes})

    def told(self, node: fx.Node, values: Mapping[fx.Node, Any], axes: list[str] | None = None) -> list[str]:
        """Each operand with its types, on the view whose axes say more."""
        known = [x for x in node.all_input_nodes if isinstance(values.get(x), Value)]
        if axes is None:
            axes = min(self._views, key=lambda v: sum(self.on(values[x], a).letter == MIXED for x in known for a in v))
        return [f"{x.name} {self.text(x, values[x], axes)}" for x in known]


def _cuts(node: fx.Node, bucket: Value) -> bool:
    """Whether a bucket is cut into what was joined to it."""
    each = _elements(node.all_input_nodes[0]) // max(1, sum(node.args[1]))
    return bool(bucket.pieces) and [n for _, n in bucket.pieces] == [each * n for n in node.args[1]]


def _elements(node: fx.Node) -> int:
    return prod(shape_of(node.meta["val"]) or ())


def _each(rule: Rule, types: Mapping[int, Type], counts: frozenset[int], results: int) -> tuple[Type, ...]:
    """The types of the results, each by the operands that it depends on."""
    if not rule.reads:
        return through(rule, types, counts, results)
    pairs = zip(rule.results, rule.reads, strict=True)
    alone = [(replace(rule, results=(pattern,)), {i: t for i, t in types.items() if i in reads}) for pattern, reads in pairs]
    return tuple(through(own, read, counts, 1)[0] for own, read in alone)


def _is_number(node: fx.Node | None) -> bool:
    """Whether a value is no index and no mask."""
    value = None if node is None else node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()


def _takes(known: Operator, before: str, dim: int, found: Type) -> bool:
    """Whether a collective may be given a value of this type; what is joined or exchanged must be divided along `dim`."""
    if known is ops.all_reduce_max:  # over what is left when a divided dimension is gone
        return found.letter in (EITHER, ZERO)
    return fits(found, Shard(dim, 0, 0) if before == VARYING else before)


def _fits_ranks(node: fx.Node, known: Operator, dim: int, ranks: int) -> bool:
    """Whether a dimension that is joined is as many times longer as there are ranks, and shorter where it is cut."""
    if all(a.name != "outer" for a in known.overload._schema.arguments):
        return True  # it neither joins nor cuts
    ends = [shape_of(n.meta.get("val")) for n in (node, *node.all_input_nodes[:1])]
    longer, shorter = ends if known.types.startswith(VARYING) else ends[::-1]
    return longer is None or shorter is None or longer[dim] == shorter[dim] * ranks


def _after(known: Operator, after: str, dim: int, node: fx.Node, arguments: Mapping[str, Any]) -> Type:
    if known.types.startswith("->") or known.overlaps:  # made of nothing; or parts that overlap divide no dimension
        return UNKNOWN
    if after != VARYING:
        return TERM if after == PARTIAL else SAME
    shape = shape_of(node.meta.get("val")) or ()
    one = len(shape) > dim and shape[dim] == arguments.get("outer", 1)
    used_up = node.meta.get("used_up", frozenset()) & set(arguments["axes"].split(","))
    return Type(VARYING, frozenset({dim}), one or bool(used_up))
