"""The folded mesh: the 16-rank table, the property that defines groups, the text form, and every error."""

import copy
import os
import pickle
import re
from itertools import chain, combinations
from math import prod

import pytest
import torch.distributed as dist
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from foldcc.errors import FoldError, divisors
from foldcc.inspect.ranks import rank_table
from foldcc.mesh import ATTENTION, MOE, FoldedMesh, init_folded_mesh


@st.composite
def meshes(draw):
    """Legal meshes of up to 4 * 36 ranks."""
    attention = {axis: draw(st.integers(1, 4)) for axis in ATTENTION}
    assume(prod(attention.values()) <= 4 * 36)
    stage = prod(attention[axis] for axis in ATTENTION[1:])
    ep = draw(st.sampled_from(divisors(stage)))
    etp = draw(st.sampled_from(divisors(stage // ep)))
    return init_folded_mesh("virtual", attention=attention, moe={"ep": ep, "etp": etp})


@st.composite
def meshes_with_axes(draw):
    axes = draw(st.permutations(draw(st.sampled_from([ATTENTION, MOE]))))
    return draw(meshes()), tuple(axes[: draw(st.integers(0, 4))])


@pytest.fixture
def world():
    """Makes this process rank 0 of a world whose other ranks do not exist."""

    def make(size: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


# -- groups ----------------------------------------------------------------------------------------


def test_the_16_rank_table():
    """TP 8, EP 4, ETP 2 over 16 ranks, from pytorch#158244."""
    mesh = init_folded_mesh("virtual", attention={"dp": 2, "tp": 8}, moe={"ep": 4, "etp": 2})
    assert mesh.world_size == 16 and mesh.size("edp") == 2
    assert mesh.groups("tp") == (tuple(range(8)), tuple(range(8, 16)))
    assert mesh.groups("dp") == tuple((rank, rank + 8) for rank in range(8))
    assert mesh.groups("etp") == tuple((rank, rank + 1) for rank in range(0, 16, 2))
    assert mesh.groups("ep") == ((0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15))
    assert mesh.groups("edp") == mesh.groups("dp")


def test_a_group_is_ordered_by_the_axes_as_given():
    mesh = FoldedMesh.parse("dp=2,tp=3")
    assert mesh.groups(("dp", "tp")) == ((0, 1, 2, 3, 4, 5),)
    assert mesh.groups(("tp", "dp")) == ((0, 3, 1, 4, 2, 5),)
    assert mesh.groups(()) == ((0,), (1,), (2,), (3,), (4,), (5,))


@given(meshes_with_axes())
def test_groups_partition_the_ranks_by_the_other_coordinates(mesh_axes):
    mesh, axes = mesh_axes
    groups = mesh.groups(axes)
    assert sorted(chain(*groups)) == list(range(mesh.world_size))
    assert list(groups) == sorted(groups, key=min)
    view = ATTENTION if set(axes) <= set(ATTENTION) else MOE
    for group in groups:
        assert len(group) == prod(map(mesh.size, axes))
        coordinates = [tuple(mesh.coordinate(rank, axis) for axis in axes) for rank in group]
        assert coordinates == sorted(set(coordinates))
        assert len({tuple(mesh.coordinate(rank, axis) for axis in view if axis not in axes) for rank in group}) == 1


@given(meshes_with_axes())
def test_a_rank_finds_itself_in_its_group(mesh_axes):
    mesh, axes = mesh_axes
    groups = mesh.groups(axes)
    for rank in range(mesh.world_size):
        group = mesh.group_of(rank, axes)
        assert group in groups and group[mesh.index(rank, axes)] == rank


@given(meshes(), st.data())
def test_a_group_over_two_axes_joins_the_groups_over_each(mesh, data):
    first, second = data.draw(st.sampled_from([*combinations(ATTENTION, 2), *combinations(MOE, 2)]))
    for group in mesh.groups((first, second)):
        assert group == tuple(chain(*(mesh.group_of(rank, second) for rank in mesh.group_of(group[0], first))))


@given(meshes())
def test_pipeline_groups_agree(mesh):
    """The groups over pp are the complement of a stage, and both views have the same stages."""
    assert mesh.groups(ATTENTION[1:]) == mesh.groups(MOE[1:])
    stage = mesh.world_size // mesh.size("pp")
    assert mesh.groups("pp") == tuple(tuple(range(first, mesh.world_size, stage)) for first in range(stage))


@given(meshes())
def test_coordinates_name_a_rank(mesh):
    for axes in (ATTENTION, MOE):
        assert [mesh.index(rank, axes) for rank in range(mesh.world_size)] == list(range(mesh.world_size))
        assert mesh.groups(axes) == (tuple(range(mesh.world_size)),)


def test_pp_belongs_to_both_views():
    mesh = FoldedMesh.parse("tp=2")
    assert mesh.axes("attention") == ATTENTION and mesh.axes("moe") == MOE
    assert [mesh.view(axis) for axis in ("pp", "cp", "edp", "etp")] == ["attention", "attention", "moe", "moe"]
    assert mesh.groups(("pp", "tp")) == mesh.groups(("pp", "edp")) == ((0, 1),)


def test_the_rank_table_shows_both_views():
    assert rank_table(FoldedMesh.parse("dp=2,tp=2|ep=2")).splitlines() == [
        "rank   dp tp | edp ep",
        "   0    0  0 |   0  0",
        "   1    0  1 |   0  1",
        "   2    1  0 |   1  0",
        "   3    1  1 |   1  1",
    ]


# -- values and text -------------------------------------------------------------------------------


@given(meshes())
def test_a_mesh_reads_what_it_prints(mesh):
    assert FoldedMesh.parse(str(mesh)) == mesh
    assert eval(repr(mesh)) == mesh
    assert hash(pickle.loads(pickle.dumps(mesh))) == hash(mesh) and copy.deepcopy(mesh) == mesh


def test_one_stage_is_a_mesh_of_its_own() -> None:
    mesh = FoldedMesh.parse("pp=2,dp=2,tp=4|ep=4,etp=2")
    assert mesh.stage == mesh.stage.stage == FoldedMesh.parse("dp=2,tp=4|ep=4,etp=2")
    for rank in range(mesh.world_size):
        for axes in ("dp", ("dp", "tp"), ("ep", "etp")):
            place = rank % mesh.stage.world_size
            assert mesh.index(rank, axes) == mesh.stage.index(place, axes)
            assert mesh.group_of(rank, axes) == tuple(rank - place + r for r in mesh.stage.group_of(place, axes))


@pytest.mark.parametrize(
    "text", ["dp=1", "tp=2", "dp=2,cp=2,tp=2|ep=8", "pp=2,dp=2,tp=4|ep=4,etp=2", "dp_replicate=2,dp=3", "tp=4|etp=2"]
)
def test_text_prints_as_it_was_read(text):
    assert str(FoldedMesh.parse(text)) == text


def test_derived_and_repeated_sizes_are_accepted_if_they_agree():
    mesh = init_folded_mesh("virtual", attention={"dp": 4, "tp": 2}, moe={"pp": 3, "edp": 2, "ep": 4})
    assert str(mesh) == "pp=3,dp=4,tp=2|ep=4"
    assert FoldedMesh.parse(" dp = 2 , tp = 2 | edp = 2 , ep = 2 ") == FoldedMesh.parse("dp=2,tp=2|ep=2")


# -- process groups --------------------------------------------------------------------------------


def test_views_are_device_meshes_of_all_four_axes(world):
    world(16)
    mesh = init_folded_mesh("cpu", attention={"pp": 2, "dp": 2, "tp": 4}, moe={"ep": 4, "etp": 2})
    assert not mesh.is_virtual
    for view, axes in ((mesh.attention, ATTENTION), (mesh.moe, MOE)):
        assert isinstance(view, DeviceMesh) and view.mesh_dim_names == axes
        assert tuple(view.mesh.shape) == tuple(map(mesh.size, axes))
        for axis in axes:
            assert tuple(dist.get_process_group_ranks(view.get_group(axis))) == mesh.group_of(0, axis)
    assert mesh.attention is mesh.attention and copy.deepcopy(mesh).moe is mesh.moe
    assert mesh.of_tensors["attention"].mesh_dim_names == ("pp", "dp", "tp")
    assert mesh.of_tensors["moe"].mesh_dim_names == ("pp", "ep", "etp")


def test_tensors_of_one_rank_are_on_a_mesh_too(world):
    world(1)
    mesh = FoldedMesh.parse("dp=1", device_type="cpu")
    assert [mesh.of_tensors[view].mesh_dim_names for view in ("attention", "moe")] == [("tp",), ("etp",)]


def test_a_device_mesh_is_folded(world):
    world(8)
    plain = dist.init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
    assert FoldedMesh.from_device_mesh(plain, ep=4, etp=2) == FoldedMesh.parse("dp=2,tp=4|ep=4,etp=2", device_type="cpu")


def test_torchrun_is_enough(world, monkeypatch, tmp_path):
    """As init_device_mesh does, a mesh initialises torch.distributed from torchrun's environment."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    init_folded_mesh("cpu", attention={})
    assert dist.is_initialized() and dist.get_world_size() == 1


# -- errors ----------------------------------------------------------------------------------------


def virtual(attention, moe=None):
    return lambda: init_folded_mesh("virtual", attention=attention, moe=moe)


def on(text, method, *arguments):
    return lambda: getattr(FoldedMesh.parse(text), method)(*arguments)


def parse(text):
    return lambda: FoldedMesh.parse(text)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            virtual({"dp": 2, "cp": 2, "tp": 2}, {"ep": 6}),
            "attention dp(2)*cp(2)*tp(2)=8 ranks, but moe ep(6)=6 does not divide 8; valid ep: 1, 2, 4, 8",
        ),
        (
            virtual({"pp": 2, "dp": 3, "tp": 2}, {"ep": 4, "etp": 2}),
            "attention dp(3)*tp(2)=6 ranks, but moe ep(4)*etp(2)=8 does not divide 6; valid ep: 1, 3",
        ),
        (
            virtual({"tp": 4}, {"etp": 3}),
            "attention tp(4)=4 ranks, but moe etp(3)=3 does not divide 4; valid etp: 1, 2, 4",
        ),
        (
            virtual({"pp": 2, "tp": 4}, {"pp": 4}),
            "attention pp=2, but moe pp=4: a pipeline stage holds",
        ),
        (
            virtual({"dp": 4, "tp": 2}, {"edp": 3, "ep": 2}),
            "edp=3 was given, but attention dp(4)*tp(2)=8 ranks over moe ep(2)=2 leave 4; edp is derived",
        ),
        (virtual({"ep": 2}), "unknown axis 'ep'.\n  valid   pp, dp_replicate, dp, cp, tp"),
        (virtual({"tp": 2}, {"tp": 2}), "unknown axis 'tp'.\n  valid   pp, edp, ep, etp"),
        (virtual({"tp": 0}), "the size of tp is 0.\n  valid   integers from 1"),
        (virtual({"tp": 2.0}), "the size of tp is 2.0.\n"),
        (virtual({"tp": True}), "the size of tp is True.\n"),
        (
            lambda: init_folded_mesh("cuda:0", attention={"tp": 2}),
            "unknown device type 'cuda:0'.\n  valid   virtual, cpu, cuda",
        ),
        (lambda: FoldedMesh("virtual", (1, 2)), "a folded mesh has 8 sizes, not 2."),
        (
            lambda: FoldedMesh("virtual", (1, 1, 2, 1, 1, 1, 1, 1)),
            "attention dp(2)=2 ranks, but moe 1; both cover",
        ),
        (parse("dp=2|ep=2|tp=2"), "'dp=2|ep=2|tp=2' has 2 '|', and a folded mesh has two sides."),
        (parse("dp=2,xp=2"), "unknown axis 'xp'."),
        (parse("dp=2,dp=4"), "'dp=2,dp=4' gives dp twice: 2 and 4."),
        (parse("dp=two"), "the size of dp in 'dp=two' is 'two', which is not a number."),
        (parse("dp"), "'dp' in 'dp' is not of the form axis=size."),
        (parse("dp=2|"), "'' in 'dp=2|' is not of the form axis=size."),
        (parse("dp=-1"), "the size of dp is -1."),
        (on("tp=2", "groups", "xp"), "unknown axis 'xp'.\n  valid   pp, dp_replicate, dp, cp, tp, edp, ep, etp"),
        (on("tp=2", "size", "xp"), "unknown axis 'xp'."),
        (on("tp=2", "groups", ("tp", "tp")), "(tp, tp) names an axis twice."),
        (on("tp=2", "groups", ("tp", "ep")), "(tp, ep) mixes axes of attention and moe"),
        (on("tp=2", "axes", "dense"), "unknown view 'dense'.\n  valid   attention, moe"),
        (on("tp=2", "coordinate", 2, "tp"), "rank 2 is not on the mesh.\n  mesh    tp=2\n  valid   0 to 1"),
        (lambda: FoldedMesh.parse("tp=2").attention, "a virtual mesh has no process groups"),
        (lambda: FoldedMesh.parse("tp=2").moe, "a virtual mesh has no process groups"),
    ],
)
def test_a_mesh_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(FoldError, match=re.escape(message)):
        make()


def test_a_real_mesh_without_a_launcher_is_refused(monkeypatch):
    monkeypatch.delitem(os.environ, "RANK", raising=False)
    with pytest.raises(
        FoldError, match="not initialised.\n  mesh    dp=2,tp=2\n  valid   launch with `torchrun --nproc-per-node 4`"
    ):
        init_folded_mesh("cpu", attention={"dp": 2, "tp": 2})


def test_a_mesh_larger_than_the_world_is_refused(world):
    world(8)
    with pytest.raises(FoldError, match="mesh needs 16 ranks, the world has 8."):
        init_folded_mesh("cpu", attention={"dp": 2, "tp": 8})


@pytest.mark.parametrize(
    "names, ranks, message",
    [
        (None, [[0, 1], [2, 3]], "the DeviceMesh has no mesh_dim_names."),
        (("data", "tp"), [[0, 1], [2, 3]], "unknown axis 'data'."),
        (("tp", "dp"), [[0, 1], [2, 3]], "the dims of the DeviceMesh are tp, dp; the outermost comes first."),
        (
            ("dp", "tp"),
            [[0, 2], [1, 3]],
            "the DeviceMesh holds ranks [0, 2, 1, 3]; a folded mesh counts ranks row-major",
        ),
    ],
)
def test_a_device_mesh_that_is_not_attentions_is_refused(world, names, ranks, message):
    world(4)
    with pytest.raises(FoldError, match=re.escape(message)):
        FoldedMesh.from_device_mesh(DeviceMesh("cpu", ranks, mesh_dim_names=names))
