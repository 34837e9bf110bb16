"""Comparing what ranks hold with what the captured program computed, and reading a difference."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from math import prod

import torch
from torch import Tensor

from foldcc.layout import PARTIAL, REPLICATED, Layout
from foldcc.mesh import FoldedMesh
from foldcc.runtime.placement import parts
from foldcc.verification.field import Field


def summed(values: Sequence[Tensor], mesh: FoldedMesh, axes: Sequence[str], field: Field) -> list[Tensor]:
    """The sum over the groups of some axes, on every rank."""
    found = list(values)
    if axes:
        for group in mesh.groups(tuple(axes)):
            total = field.reduced(torch.stack([values[r] for r in group]).sum(0))
            for r in group:
                found[r] = total
    return found


def wrong_rank(
    values: Sequence[Tensor | None] | Tensor, wanted: Tensor, layout: Layout | None, mesh: FoldedMesh, field: Field
) -> int | None:
    """The first rank whose value is not what the layout says it holds; None when all are right.

    A value that is a tensor is whole, and has no layout.
    """
    if isinstance(values, Tensor) or layout is None:
        return None if isinstance(values, Tensor) and torch.equal(values.detach(), wanted) else 0
    held = [x.detach() for x in values if x is not None]
    if len(held) < len(values):
        return next(r for r, x in enumerate(values) if x is None)
    if layout.axes(PARTIAL) and len({x.shape for x in held}) == 1:
        held = summed(held, mesh, layout.axes(PARTIAL), field)
    expected = _expected(wanted, layout, mesh)
    if {x.shape for x in held} == {x.shape for x in expected} == {held[0].shape}:
        wrong = (torch.stack(held) != torch.stack(expected)).unsqueeze(-1).flatten(1).any(1).nonzero()
        return int(wrong[0]) if len(wrong) else None
    return next((r for r, (x, y) in enumerate(zip(held, expected, strict=True)) if not torch.equal(x, y)), None)


def _expected(wanted: Tensor, layout: Layout, mesh: FoldedMesh) -> list[Tensor]:
    """What each rank holds of a value, once what is partial is summed."""
    for axis in layout.axes(PARTIAL):
        layout = layout.with_state(axis, REPLICATED)
    return parts(wanted, layout, mesh)


def reading(
    values: Sequence[Tensor | None] | Tensor, wanted: Tensor, layout: Layout | None, mesh: FoldedMesh, field: Field
) -> str:
    """What wrong values would be right as: a multiple, or a term of a sum over an axis."""
    if isinstance(values, Tensor) or layout is None:
        return "" if isinstance(values, Tensor) else "missing"
    held = [x for x in values if x is not None]
    if len(held) < len(values):
        return "missing"
    factor = _factor(held, wanted, layout, mesh, field)
    if factor is not None:
        return f"{factor} times what it should be"
    for view in ("attention", "moe") if len({x.shape for x in held}) == 1 else ():
        whole = [a for a in mesh.axes(view) if mesh.size(a) > 1 and layout.states.get(a, "I") in ("I", "R")]
        for axes in (c for n in range(1, len(whole) + 1) for c in combinations(whole, n)):
            if wrong_rank(summed(held, mesh, axes, field), wanted, layout, mesh, field) is None:
                return f"a term of the sum over {','.join(axes)}, which was not taken"
    return ""


def _factor(values: Sequence[Tensor], wanted: Tensor, layout: Layout, mesh: FoldedMesh, field: Field) -> Fraction | None:
    """The quotient of mesh sizes that all values are too large by."""
    expected = _expected(wanted, layout, mesh)
    if any(x.shape != e.shape for x, e in zip(values, expected, strict=True)):
        return None
    ratios = [field.times(x, field.inverse(e))[e != 0] for x, e in zip(values, expected, strict=True)]
    found = torch.cat([r.flatten() for r in ratios])
    sizes = {mesh.size(a) for view in ("attention", "moe") for a in mesh.axes(view)}
    numbers = {a * b for a in sizes for b in sizes} | {prod(sizes)}
    for factor in sorted({Fraction(a, b) for a in numbers for b in numbers} - {Fraction(1)}):
        if found.numel() and bool((found == field.number(factor)).all()):
            return factor
    return None
