"""The folded mesh: the same ranks, arranged once for attention and once for the experts.

    attention   pp  dp_replicate  dp  cp  tp
    moe         pp  edp           ep  etp       outermost first; each but pp multiply to the ranks of one pipeline stage

Rank numbers are row-major in both views. Because `pp` is outermost in both, its groups agree by construction
(MoE Parallel Folding, arXiv 2504.14960, puts `dp` outermost, where they agree only if cp * tp = ep * etp).
This is arithmetic on rank numbers; process groups appear only in `FoldedMesh.attention` and `FoldedMesh.moe`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Literal

from foldcc.errors import FoldError, divisors, listed, require

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

View = Literal["attention", "moe"]
Axes = str | tuple[str, ...]
Groups = tuple[tuple[int, ...], ...]

ATTENTION = ("pp", "dp_replicate", "dp", "cp", "tp")
MOE = ("pp", "edp", "ep", "etp")
SAMPLES = ("dp_replicate", "dp")  # the axes that take samples
STORE: dict[View, tuple[str, ...]] = {"attention": ("dp", "cp"), "moe": ("edp",)}  # the axes that ZeRO divides parameters over
VIRTUAL = "virtual"
DEVICE_TYPES = (VIRTUAL, "cpu", "cuda")

_VIEWS: dict[View, tuple[str, ...]] = {"attention": ATTENTION, "moe": MOE}
_ALL = ATTENTION + MOE[1:]
# Axes of other tools, and what there is here.
_ELSEWHERE = {
    "fsdp": "dp, and parallelize(zero=3), which stores weights divided over it",
    "efsdp": "edp, which is derived, and parallelize(zero=3), which stores expert weights divided over it",
    "dp_shard": "dp, and parallelize(zero=3), which stores weights divided over it and not over dp_replicate",
    "sp": "tp, which divides the sequence between its products",
}


@dataclass(frozen=True, repr=False)
class FoldedMesh:
    """Ranks with two sets of axes, one for attention and one for the experts. Make one with `init_folded_mesh`.

    `sizes` holds the size of every axis, in the order `pp dp_replicate dp cp tp edp ep etp`. Meshes are values: equal if their
    sizes and device types are equal, and usable as keys.
    """

    device_type: str
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.device_type not in DEVICE_TYPES:
            raise FoldError(f"unknown device type {self.device_type!r}.", valid=listed(DEVICE_TYPES))
        if len(self.sizes) != len(_ALL):
            raise FoldError(f"a folded mesh has {len(_ALL)} sizes, not {len(self.sizes)}.", valid=listed(_ALL))
        for axis, size in zip(_ALL, self.sizes, strict=True):
            _check_size(axis, size)
        if self._stage("moe") != self._stage("attention"):
            raise FoldError(
                f"attention {_product(self._sizes_of('attention'))} ranks, but moe {_product(self._sizes_of('moe'))}; "
                "both cover the ranks of one pipeline stage."
            )

    # -- axes --------------------------------------------------------------------------------------

    def axes(self, view: View) -> tuple[str, ...]:
        """The axis names of a view, outermost first."""
        if view not in _VIEWS:
            raise FoldError(f"unknown view {view!r}.", valid=listed(_VIEWS))
        return _VIEWS[view]

    def view(self, axis: str) -> View:
        """The view that an axis belongs to. `pp` belongs to both and counts as attention's."""
        _check_axis(axis, _ALL)
        return "attention" if axis in ATTENTION else "moe"

    def size(self, axis: str) -> int:
        """The number of ranks along an axis."""
        _check_axis(axis, _ALL)
        return self.sizes[_ALL.index(axis)]

    @cached_property
    def world_size(self) -> int:
        return self.size("pp") * self._stage("attention")

    @property
    def samples(self) -> tuple[str, ...]:
        """The axes over which samples are divided; the last of those that could be, where none is."""
        return tuple(axis for axis in SAMPLES if self.size(axis) > 1) or SAMPLES[-1:]

    @property
    def data_parallel(self) -> int:
        """Into how many parts samples are divided. The part of a rank is `index(rank, mesh.samples)`."""
        return prod(map(self.size, SAMPLES))

    @property
    def passed(self) -> int:
        """How many of these parts a call is given: all of them on a virtual mesh, else this rank's own."""
        return self.data_parallel if self.is_virtual else 1

    @cached_property
    def stage(self) -> FoldedMesh:
        """The ranks of one pipeline stage as a mesh, on which its layers are laid out; the mesh itself with `pp=1`.

        There are as many of them side by side as there are stages: a process stands on its own stage's.
        """
        return self if self.size("pp") == 1 else FoldedMesh(self.device_type, (1, *self.sizes[1:]))

    @cached_property
    def virtual(self) -> FoldedMesh:
        """The same ranks without a device: what is remembered for it holds no process groups."""
        return self if self.is_virtual else FoldedMesh(VIRTUAL, self.sizes)

    @property
    def is_virtual(self) -> bool:
        """Whether all ranks live in this process."""
        return self.device_type == VIRTUAL

    # -- ranks -------------------------------------------------------------------------------------

    def coordinate(self, rank: int, axis: str) -> int:
        """Where a rank stands on an axis."""
        self._check_rank(rank)
        return rank // self._stride(axis) % self.size(axis)

    def index(self, rank: int, axes: Axes) -> int:
        """The position of a rank in its group over `axes`: `group_of(rank, axes)[index(rank, axes)] == rank`."""
        position = 0
        for axis in self._one_view(axes):
            position = position * self.size(axis) + self.coordinate(rank, axis)
        return position

    def groups(self, axes: Axes) -> Groups:
        """The groups of ranks that differ only in `axes`, which belong to one view.

        Within a group, ranks are ordered by their coordinates on `axes` as given, the first axis slowest: those over
        `("dp", "tp")` and over `("tp", "dp")` differ in their order only. Groups are ordered by their lowest rank.
        Over no axes, every rank is a group.
        """
        return _groups(self.virtual, self._one_view(axes))

    def group_of(self, rank: int, axes: Axes) -> tuple[int, ...]:
        """The group of `groups(axes)` that a rank is in."""
        axes = self._one_view(axes)
        first = rank - sum(self.coordinate(rank, axis) * self._stride(axis) for axis in axes)
        return tuple(first + offset for offset in self._offsets(axes))

    # -- process groups ----------------------------------------------------------------------------

    @property
    def here(self) -> int:
        """The rank on this mesh that this process is."""
        import torch.distributed as dist

        return dist.get_rank() % self.world_size

    @cached_property
    def attention(self) -> DeviceMesh:
        """The attention view as a `DeviceMesh` with dims `pp dp_replicate dp cp tp`. The first access is collective."""
        return self._device_mesh("attention")

    @cached_property
    def moe(self) -> DeviceMesh:
        """The MoE view as a `DeviceMesh` with dims `pp edp ep etp`. The first access is collective."""
        return self._device_mesh("moe")

    def dividing(self, view: View) -> tuple[str, ...]:
        """The axes of a view that have several ranks; the innermost, where none has."""
        return tuple(axis for axis in self.axes(view) if self.size(axis) > 1) or self.axes(view)[-1:]

    @cached_property
    def of_tensors(self) -> dict[View, DeviceMesh]:
        """The part of each view's `DeviceMesh` that DTensors are on: its dims of several ranks.

        How many ways to run an operator DTensor weighs is exponential in the dims of its mesh.
        """
        return {"attention": self.attention[self.dividing("attention")], "moe": self.moe[self.dividing("moe")]}

    @classmethod
    def from_device_mesh(cls, device_mesh: DeviceMesh, *, ep: int = 1, etp: int = 1) -> FoldedMesh:
        """Fold the experts over a plain `DeviceMesh`, whose named dims are among `pp dp_replicate dp cp tp`, in that order."""
        names = device_mesh.mesh_dim_names
        if not names:
            raise FoldError("the DeviceMesh has no mesh_dim_names.", valid=listed(ATTENTION))
        for name in names:
            _check_axis(name, ATTENTION)
        in_order = tuple(axis for axis in ATTENTION if axis in names)
        if tuple(names) != in_order:
            raise FoldError(
                f"the dims of the DeviceMesh are {listed(names)}; the outermost comes first.", valid=listed(in_order)
            )
        ranks = device_mesh.mesh.flatten().tolist()
        if ranks != list(range(len(ranks))):
            raise FoldError(
                f"the DeviceMesh holds ranks {ranks}; a folded mesh counts ranks row-major from 0.",
                valid=f"ranks 0 to {len(ranks) - 1} in order",
            )
        attention = dict(zip(names, device_mesh.mesh.shape, strict=True))
        return init_folded_mesh(device_mesh.device_type, attention=attention, moe={"ep": ep, "etp": etp})

    # -- text --------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """`dp=2,cp=2,tp=2|ep=8`: axes of size 1 and the derived `edp` are left out, `pp` stands on the left."""
        left, right = (
            ",".join(f"{axis}={self.size(axis)}" for axis in axes if self.size(axis) > 1) for axes in (ATTENTION, ("ep", "etp"))
        )
        return f"{left or 'dp=1'}|{right}" if right else left or "dp=1"

    def __repr__(self) -> str:
        return f"FoldedMesh.parse({str(self)!r}, device_type={self.device_type!r})"

    @classmethod
    def parse(cls, text: str, device_type: str = VIRTUAL) -> FoldedMesh:
        """Read what `str(mesh)` prints: attention's axes, then, after a `|`, the experts'."""
        require("A mesh", text, str, f"text such as {_EXAMPLE}")
        sides = text.split("|")
        if len(sides) > 2:
            raise FoldError(f"{text!r} has {len(sides) - 1} '|', and a folded mesh has two sides.", valid=_EXAMPLE)
        attention, moe = (_parse_side(side, text) for side in (*sides, "ep=1")[:2])
        return init_folded_mesh(device_type, attention=attention, moe=moe)

    def __reduce__(self) -> tuple[type[FoldedMesh], tuple[str, tuple[int, ...]]]:
        return FoldedMesh, (self.device_type, self.sizes)  # process groups do not travel

    def __deepcopy__(self, memo: object) -> FoldedMesh:
        return self  # a value; copies of a folded model share its process groups

    # -- inside ------------------------------------------------------------------------------------

    def _sizes_of(self, view: View) -> dict[str, int]:
        return {axis: self.size(axis) for axis in _VIEWS[view][1:]}

    def _stage(self, view: View) -> int:
        return prod(self._sizes_of(view).values())

    def _stride(self, axis: str) -> int:
        axes = _VIEWS[self.view(axis)]
        return prod(map(self.size, axes[axes.index(axis) + 1 :]))

    def _offsets(self, axes: tuple[str, ...]) -> list[int]:
        """What to add to the rank at the origin of `axes` to reach each member of its group."""
        steps = [range(0, self.size(axis) * self._stride(axis), self._stride(axis)) for axis in axes]
        return [sum(step) for step in product(*steps)]

    def _one_view(self, axes: Axes) -> tuple[str, ...]:
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        for axis in axes:
            _check_axis(axis, _ALL)
        if len(set(axes)) < len(axes):
            raise FoldError(f"({listed(axes)}) names an axis twice.", mesh=self)
        if not any(set(axes) <= set(view) for view in _VIEWS.values()):
            raise FoldError(
                f"({listed(axes)}) mixes axes of attention and moe; a group lies in one view.",
                mesh=self,
                valid=f"axes of ({listed(ATTENTION)}) or of ({listed(MOE)})",
            )
        return axes

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise FoldError(f"rank {rank} is not on the mesh.", mesh=self, valid=f"0 to {self.world_size - 1}")

    def _device_mesh(self, view: View) -> DeviceMesh:
        if self.is_virtual:
            raise FoldError("a virtual mesh has no process groups: all its ranks live in this process.", mesh=self)
        import torch
        from torch.distributed.device_mesh import DeviceMesh

        axes, sizes = self.axes(view), [self.size(axis) for axis in self.axes(view)]
        ranks = torch.arange(torch.distributed.get_world_size())
        if len(ranks) == self.world_size:
            return DeviceMesh(self.device_type, ranks.view(sizes), mesh_dim_names=axes)
        return DeviceMesh(self.device_type, ranks.view(-1, *sizes), mesh_dim_names=("stages", *axes))[axes]


def init_folded_mesh(device_type: str, *, attention: Mapping[str, int], moe: Mapping[str, int] | None = None) -> FoldedMesh:
    """Lay out attention and experts, each in its own way, over the same ranks. It mirrors `init_device_mesh`.

    Args:
        device_type: `"virtual"` (all ranks in this process), `"cpu"` or `"cuda"`.
        attention: sizes of `pp`, `dp_replicate`, `dp`, `cp`, `tp`. An axis left out has size 1.
        moe: sizes of `pp`, `ep`, `etp`. `pp` is equal on both sides and may be given on either; `edp` is derived.

    On a real device, the world has as many ranks as the mesh. Under torchrun, torch.distributed is initialised if it
    was not yet.

    Raises:
        FoldError: an unknown axis or device type, a size that is not a positive integer, `ep * etp` that does not
            divide the ranks of a pipeline stage, an `edp` or a `pp` that disagrees, no torch.distributed, or a world
            of another size.
    """
    moe = {} if moe is None else moe
    for side, sizes, valid in (("attention", attention, ATTENTION), ("moe", moe, MOE)):
        require(side, sizes, Mapping, "a dict of axes and their sizes")
        for axis, size in sizes.items():
            _check_axis(axis, valid)
            _check_size(axis, size)
    pp = attention.get("pp", moe.get("pp", 1))
    if moe.get("pp", pp) != pp:
        raise FoldError(
            f"attention pp={pp}, but moe pp={moe['pp']}: a pipeline stage holds the attention and the experts "
            "of the same layers, so pp is equal on both sides."
        )
    dense = {axis: attention.get(axis, 1) for axis in ATTENTION[1:]}
    ep, etp = moe.get("ep", 1), moe.get("etp", 1)
    edp = _derive_edp(dense, ep, etp)
    if moe.get("edp", edp) != edp:
        raise FoldError(
            f"edp={moe['edp']} was given, but attention {_product(dense)} ranks over moe {_product({'ep': ep, 'etp': etp})} "
            f"leave {edp}; edp is derived and may be left out."
        )
    mesh = FoldedMesh(device_type, (pp, *dense.values(), edp, ep, etp))
    if not mesh.is_virtual:
        _check_world(mesh)
    return mesh


_EXAMPLE = "axis=size,axis=size|axis=size, as in dp=2,cp=2,tp=2|ep=8"


@lru_cache(maxsize=1024)
def _groups(mesh: FoldedMesh, axes: tuple[str, ...]) -> Groups:
    view = ATTENTION if set(axes) <= set(ATTENTION) else MOE
    first_ranks = mesh._offsets(tuple(axis for axis in view if axis not in axes))
    offsets = mesh._offsets(axes)
    return tuple(tuple(first + offset for offset in offsets) for first in first_ranks)


def _derive_edp(dense: Mapping[str, int], ep: int, etp: int) -> int:
    stage = prod(dense.values())
    edp, rest = divmod(stage, ep * etp)
    if not rest:
        return edp
    valid = f"ep: {listed(divisors(stage // etp))}" if stage % etp == 0 else f"etp: {listed(divisors(stage))}"
    raise FoldError(
        f"attention {_product(dense)} ranks, but moe {_product({'ep': ep, 'etp': etp})} does not divide {stage}; valid {valid}"
    )


def _product(sizes: Mapping[str, int]) -> str:
    """`dp(2)*cp(2)*tp(2)=8`, of the axes of several ranks."""
    told = "*".join(f"{axis}({size})" for axis, size in sizes.items() if size > 1)
    return f"{told}={prod(sizes.values())}" if told else "1"


def _check_axis(axis: str, valid: tuple[str, ...]) -> None:
    if axis not in valid:
        raise FoldError(f"unknown axis {axis!r}.", instead=_ELSEWHERE.get(axis), valid=listed(valid))


def _check_size(axis: str, size: object) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise FoldError(f"the size of {axis} is {size!r}.", valid="integers from 1")


def _parse_side(side: str, text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in side.split(","):
        axis, equals, size = map(str.strip, part.partition("="))
        if not equals:
            raise FoldError(f"{part!r} in {text!r} is not of the form axis=size.", valid=_EXAMPLE)
        if axis in sizes:
            raise FoldError(f"{text!r} gives {axis} twice: {sizes[axis]} and {size}.")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise FoldError(f"the size of {axis} in {text!r} is {size!r}, which is not a number.", valid=_EXAMPLE) from None
    return sizes


def _check_world(mesh: FoldedMesh) -> None:
    import torch.distributed as dist

    needs = mesh.world_size
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if dist.is_available() and dist.is_initialized():
        world = dist.get_world_size()
    elif dist.is_available() and launched:
        world = int(os.environ["WORLD_SIZE"])
    else:
        raise FoldError(
            f"a {mesh.device_type!r} mesh needs torch.distributed, which is not initialised.",
            mesh=mesh,
            valid=f'launch with `torchrun --nproc-per-node {needs}`, or use the device type "virtual"',
        )
    if world != needs:
        raise FoldError(f"mesh needs {needs} ranks, the world has {world}.", mesh=mesh)
    if not dist.is_initialized():
        dist.init_process_group()  # as init_device_mesh does
