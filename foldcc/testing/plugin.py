"""The pytest plugin: fixtures for tests of folded models. It is loaded in every run, so it imports on first use.

def test_my_model_on_every_mesh_of_4(folded_mesh, check_equivalence):
    check_equivalence(MyModel(), folded_mesh, kwargs=batch)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from foldcc.mesh import FoldedMesh

_WORLD = 4


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"folded(world): how many ranks `folded_mesh` has, {_WORLD} without this")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "folded_mesh" in metafunc.fixturenames:
        from foldcc.testing.folds import folded_meshes

        marker = metafunc.definition.get_closest_marker("folded")
        world = _world(*marker.args, **marker.kwargs) if marker is not None else _WORLD
        metafunc.parametrize("folded_mesh", folded_meshes(world), ids=str)


def _world(world: int = _WORLD) -> int:
    """Reads the arguments of the marker."""
    return world


@pytest.fixture
def folded_mesh(request: pytest.FixtureRequest) -> FoldedMesh:
    """Each virtual folded mesh of 4 ranks, or of `@pytest.mark.folded(world)`: the test runs once for every one."""
    mesh: FoldedMesh = request.param
    return mesh


@pytest.fixture
def virtual_mesh() -> Callable[[str], FoldedMesh]:
    """Makes a virtual mesh of its text: `virtual_mesh("dp=2,tp=2|ep=4")`."""
    from foldcc.mesh import FoldedMesh

    return FoldedMesh.parse


@pytest.fixture
def float64() -> Iterator[None]:
    """The test runs in `foldcc.testing.in_float64()`: what casts to a lower float type casts to float64."""
    from foldcc.testing.float64 import in_float64

    with in_float64():
        yield


@pytest.fixture(scope="session")
def check_equivalence() -> Callable[..., Any]:
    """`foldcc.testing.check_equivalence`."""
    from foldcc.testing.equivalence import check_equivalence

    return check_equivalence


@pytest.fixture(scope="session")
def run_distributed() -> Iterator[Callable[..., list[Any]]]:
    """`foldcc.testing.run_distributed`; its processes end with the test session."""
    from foldcc.testing.processes import end_processes, run_distributed

    yield run_distributed
    end_processes()
