"""Every way to fold a world of ranks."""

from __future__ import annotations

from foldcc.errors import divisors
from foldcc.mesh import FoldedMesh, init_folded_mesh

_AXES = ("dp", "tp", "ep", "etp")


def folded_meshes(world: int) -> list[FoldedMesh]:
    """All virtual meshes of `world` ranks over `dp`, `tp` | `ep`, `etp`, those with the fewest axes first.

    `cp` is left at 1, for not every model has a sequence that it divides, and `pp`, for it comes with micro-batches.
    """
    found = [
        init_folded_mesh("virtual", attention={"dp": world // tp, "tp": tp}, moe={"ep": ep, "etp": etp})
        for tp in divisors(world)
        for ep in divisors(world)
        for etp in divisors(world // ep)
    ]
    return sorted(found, key=lambda mesh: sum(mesh.size(axis) > 1 for axis in _AXES))
