"""The ranks as both views of the mesh cut them: atoms, of which the axes of either view are products.

    dp=2,tp=4|ep=4,etp=2      dp = a, tp = b c    ep = a b, etp = c      every atom is part of an axis of each view
    dp=3,tp=2|ep=3            dp = a, tp = b      edp = c, ep = d        no common cuts: each view has its own atoms

A value has a type on each atom. On an atom of both views crossing the fold is free; between atoms of one view each it is
free where all of them agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from foldcc.mesh import FoldedMesh, View

_VIEWS: tuple[View, View] = ("attention", "moe")
Span = tuple[int, int]  # from one rank to this many, counted from the innermost axis


@dataclass(frozen=True)
class Atoms:
    """
    Attributes:
        of: the atoms of each axis that has more than one rank.
        across: every atom, with the atoms of the other view over the same ranks, none for an atom of both views.
    """

    of: Mapping[str, tuple[str, ...]]
    across: Mapping[str, tuple[str, ...]]

    def axes(self, atom: str) -> str:
        """The axes that an atom is part of."""
        return " = ".join(axis for axis, atoms in self.of.items() if atom in atoms)


@lru_cache
def atoms_of(mesh: FoldedMesh) -> Atoms:
    """Cuts the ranks of a pipeline stage."""
    axes = {v: [a for a in reversed(mesh.axes(v)) if a != "pp"] for v in _VIEWS}
    cuts = {v: list(accumulate((mesh.size(a) for a in axes[v]), lambda x, y: x * y, initial=1)) for v in _VIEWS}
    spans: dict[View, dict[str, Span]] = {v: {} for v in _VIEWS}
    across: dict[str, tuple[str, ...]] = {}
    for low, high in pairwise(sorted(set(cuts["attention"]) & set(cuts["moe"]))):
        inside = {v: sorted({c for c in cuts[v] if low <= c <= high}) for v in _VIEWS}
        both = sorted({*inside["attention"], *inside["moe"]})
        shared = all(b % a == 0 for a, b in pairwise(both))
        own = {v: {f"{a}:{b}{'' if shared else v}": (a, b) for a, b in pairwise(both if shared else inside[v])} for v in _VIEWS}
        for view, other in (_VIEWS, _VIEWS[::-1]):
            spans[view] |= own[view]
            across |= dict.fromkeys(own[view], () if shared else tuple(own[other]))
    of: dict[str, tuple[str, ...]] = {}
    for view in _VIEWS:
        for axis, (start, stop) in reversed(list(zip(axes[view], pairwise(cuts[view]), strict=True))):
            found = tuple(name for name, (a, b) in spans[view].items() if start <= a and b <= stop)
            of |= {axis: found} if found else {}
    return Atoms(of, across)
