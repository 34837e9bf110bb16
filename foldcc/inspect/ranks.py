"""Who is where: the coordinates of every rank in both views of a folded mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from foldcc.mesh import FoldedMesh, View

_VIEWS: tuple[View, ...] = ("attention", "moe")


def rank_table(mesh: FoldedMesh) -> str:
    """The coordinates of every rank in both views, side by side, on the axes of several ranks."""
    views = {view: [axis for axis in mesh.axes(view) if mesh.size(axis) > 1] for view in _VIEWS}

    def row(rank: object, cells: Mapping[View, Sequence[object]]) -> str:
        left, right = (
            " ".join(f"{cell:>{width(axis)}}" for axis, cell in zip(axes, cells[view], strict=True))
            for view, axes in views.items()
        )
        return f"{rank:>4}   {left} | {right}"

    def width(axis: str) -> int:
        return max(len(axis), len(str(mesh.size(axis) - 1)))

    def coordinates(rank: int) -> dict[View, list[object]]:
        return {view: [mesh.coordinate(rank, axis) for axis in axes] for view, axes in views.items()}

    return "\n".join([row("rank", views), *(row(rank, coordinates(rank)) for rank in range(mesh.world_size))])
