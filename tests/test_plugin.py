"""The kit for tests as others get it: what importing it costs and needs, and its pytest plugin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis.strategies import SearchStrategy

import foldcc.testing

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent


def python(program: str) -> str:
    """What a fresh Python prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_only_the_strategies_need_hypothesis() -> None:
    program = """if True:
        import sys
        sys.modules["hypothesis"] = None
        import foldcc, foldcc.testing
        foldcc.testing.check_equivalence, foldcc.testing.run_distributed, foldcc.testing.Decoder
        try:
            foldcc.testing.models
        except foldcc.FoldError as error:
            print(error)
    """
    assert "pip install 'foldcc[testing]'" in python(program)


def test_every_public_name_is_there() -> None:
    assert all(hasattr(foldcc.testing, name) for name in foldcc.testing.__all__)
    assert isinstance(foldcc.testing.models(), SearchStrategy)
    with pytest.raises(AttributeError, match="no attribute 'modles'"):
        foldcc.testing.modles  # noqa: B018


def test_the_plugin_imports_nothing_that_takes_long() -> None:
    loaded = python("import foldcc.testing.plugin, sys; print(*sys.modules)").split()
    assert "foldcc.testing.plugin" in loaded
    assert not {"torch", "hypothesis", "transformers", "sympy", "numpy"} & set(loaded)


def test_pytest_finds_the_plugin_by_its_entry_point() -> None:
    table = re.search(r"^\[project.entry-points.pytest11\]\n(.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert table is not None and table[1] == 'foldcc = "foldcc.testing.plugin"'


def run_pytest(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, **sources: str) -> dict[str, int]:
    """The outcomes of files of tests, in a process that has the plugin and no other."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pytester.makepyfile(**sources)
    result = pytester.runpytest_subprocess("-p", "foldcc.testing.plugin", "--strict-markers", "-W", "ignore")
    return result.parseoutcomes()


FIXTURES = """
    import pytest, torch
    import torch.distributed as dist
    from foldcc.testing import Decoder, DecoderConfig, decoder_batch, folded_meshes

    seen = []

    def test_every_mesh_of_4(folded_mesh):
        assert folded_mesh.is_virtual and folded_mesh.world_size == 4
        seen.append(str(folded_mesh))

    def test_they_were_all_there():
        assert len(seen) == len(set(seen)) == len(folded_meshes(4))

    @pytest.mark.folded(world=1)
    def test_the_only_mesh_of_1(folded_mesh, check_equivalence):
        assert str(folded_mesh) == "dp=1"
        model = Decoder(DecoderConfig(layers=1))
        check_equivalence(model, folded_mesh, kwargs=decoder_batch(model, folded_mesh, valid=[3]))

    def test_a_mesh_by_its_text(virtual_mesh):
        assert virtual_mesh("dp=2,tp=2|ep=4").size("ep") == 4

    def test_casts_are_lifted(float64):
        assert torch.ones(1, dtype=torch.float64).float().dtype == torch.float64

    def test_casts_are_not_lifted_elsewhere():
        assert torch.ones(1, dtype=torch.float64).float().dtype == torch.float32

    def test_processes(run_distributed):
        assert run_distributed(dist.get_rank, 2) == [0, 1]
"""


def test_the_plugin_brings_its_fixtures_and_the_page_about_testing_is_a_file_of_tests(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "testing.md").read_text(), re.MULTILINE | re.DOTALL)
    tests = sum(block.count("def test_") for block in blocks)
    outcomes = run_pytest(pytester, monkeypatch, test_fixtures=FIXTURES, test_page="\n".join(blocks))
    passed = len(foldcc.testing.folded_meshes(4)) + 6
    assert outcomes.keys() == {"passed"} and outcomes["passed"] >= passed + tests > passed
