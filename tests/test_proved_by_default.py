"""What parallelize returns is proved: in one round, on few ranks, once for each program; where it cannot be, that is said."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import foldcc
from foldcc.errors import FoldError
from foldcc.ir.program import Program
from foldcc.mesh import FoldedMesh
from foldcc.passes import PIPELINE, Pass
from foldcc.testing import run_distributed
from foldcc.verification import compiled
from foldcc.verification.fewer_ranks import fewer_ranks
from tests.test_verify import edit_first


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a user has it, with nothing remembered."""
    monkeypatch.delenv("FOLDCC_VERIFY")
    monkeypatch.setenv("FOLDCC_CACHE", str(tmp_path))


@dataclass(frozen=True, kw_only=True)
class Confuse(Pass):
    """A pass that takes a sum for a product, once."""

    requires = frozenset({"outlined"})

    def run(self, program: Program) -> Program:
        edit_first(torch.ops.aten.mul.Tensor, lambda n: setattr(n, "target", torch.ops.aten.add.Tensor))(program)
        return program


class Small(nn.Module):
    def __init__(self, offset: float = 0.5) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("offset", torch.full((8,), offset))

    def forward(self, x: Tensor) -> Tensor:
        return (self.down(self.up(x).relu()) * x + self.offset).square().mean()


def small(mesh: str = "dp=2,tp=2", offset: float = 0.5, **options: bool) -> foldcc.FoldedModule:
    samples = 2 * FoldedMesh.parse(mesh).size("dp")
    return foldcc.parallelize(Small(offset), mesh, example_inputs=(torch.randn(samples, 8),), **options)


def test_what_parallelize_returns_is_proved() -> None:
    model = small()
    assert model.proof.ok and model.proof.rounds == 1
    assert "the gradients of 4 parameters, on each of 4 ranks" in str(model.proof)


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_proof_can_be_skipped(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "prove", None)
    if how == "environment":
        monkeypatch.setenv("FOLDCC_VERIFY", "0")
    model = small() if how == "environment" else small(verify=False)
    with pytest.raises(FoldError, match="compiled without a proof"):
        _ = model.proof


def test_a_pass_that_changes_the_program_is_an_error_and_leaves_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldcc.api.PIPELINE", (*PIPELINE[:2], Confuse(), *PIPELINE[2:]))
    for _ in range(2):  # what fails is not remembered
        with pytest.raises(FoldError, match="at stage confuse"):
            small()


def test_a_proof_is_made_once_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    first = small().proof
    monkeypatch.setattr(compiled, "prove", None)
    assert small().proof == first


@pytest.mark.parametrize("other", [{"mesh": "dp=2"}, {"offset": 0.25}])
def test_another_program_is_proved_anew(other: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    small()
    monkeypatch.setattr(compiled, "prove", None)
    with pytest.warns(UserWarning, match="NoneType"):
        small(**other)


def test_another_shape_is_proved_as_well() -> None:
    model = small()
    model(torch.randn(8, 8))
    assert len(model.programs) == 2 and model.proof.ok


def test_a_proof_that_was_written_in_part_is_made_again(tmp_path: Path) -> None:
    small()
    (path,) = (tmp_path / "proofs").iterdir()
    path.write_text(path.read_text()[:40])
    assert small().proof.ok


def test_a_cache_that_cannot_be_read_or_written_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOLDCC_CACHE", str(tmp_path / "file"))
    assert small().proof.ok


MESHES = [
    ("dp=64,tp=2|ep=8", "dp=4,tp=2|ep=4"),
    ("dp=8,tp=4|ep=32", "dp=2,tp=2|ep=4"),
    ("dp=2,tp=2|ep=4", "dp=2,tp=2|ep=4"),
    ("dp=12,tp=4|ep=2,etp=2", "dp=2,tp=4|ep=2,etp=2"),
    ("dp=9", "dp=3"),
    ("dp=2,tp=3|etp=2", "dp=2,tp=3|etp=2"),  # the views do not nest
]


@pytest.mark.parametrize("mesh, fewer", MESHES)
def test_fewer_ranks_have_the_same_axes_that_cross_at_the_same_places(mesh: str, fewer: str) -> None:
    assert str(fewer_ranks(FoldedMesh.parse(mesh))) == fewer


def test_a_large_program_is_proved_on_fewer_ranks_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_CALLS", 0)
    proof = small("dp=4,tp=4").proof
    assert "proved on the mesh dp=2,tp=2, whose axes cross as those of dp=4,tp=4 do" in str(proof)
    monkeypatch.setattr("foldcc.api.PIPELINE", (*PIPELINE[:2], Confuse(), *PIPELINE[2:]))
    with pytest.raises(FoldError, match="differs on rank"):
        small("dp=4,tp=4")


@pytest.mark.filterwarnings("ignore::foldcc.passes.annotate.UnknownOperator")
class Large(nn.Module):
    """A head that is too large to travel with the norm before it, and would not be in a smaller program."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.RMSNorm(64), nn.Linear(64, 65_536, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x) * x).square().mean()


def test_what_is_too_large_to_be_gathered_together_is_proved() -> None:
    with torch.device("meta"):
        model, x = Large(), torch.empty(16, 64)
    folded = foldcc.parallelize(model, "dp=2,tp=2", example_inputs=(x,), zero=1)
    assert folded.plan.together["unshard0_forward"] == ()
    assert folded.proof is not None and folded.proof.ok and "smaller sizes" in " ".join(folded.proof.assumed)


def test_a_mistake_in_a_large_program_is_found_at_the_stage_that_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    after = [p.name for p in PIPELINE].index("shard") + 1
    monkeypatch.setattr("foldcc.api.PIPELINE", (*PIPELINE[:after], Confuse(), *PIPELINE[after:]))
    with torch.device("meta"):
        model, x = Large(), torch.empty(16, 64)
    with pytest.raises(FoldError, match="stage confuse"):
        foldcc.parallelize(model, "dp=4", example_inputs=(x,), precision=foldcc.Precision())


def test_a_program_that_cannot_be_proved_says_why_and_runs() -> None:
    class Odd(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(x).logcumsumexp(-1).sum()

    with pytest.warns(UserWarning, match="was not proved equal .*logcumsumexp.* has no meaning over a field"):
        model = foldcc.parallelize(Odd(), "dp=2", example_inputs=(torch.randn(4, 8),))
    assert not model.proof.ok and "logcumsumexp" in model.proof.impossible
    assert model(torch.randn(4, 8)).isfinite()


def test_a_proof_that_fails_is_no_mistake_of_the_program_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "prove", None)
    with pytest.warns(UserWarning, match="was not proved equal to the captured program: TypeError"):
        assert not small().proof.ok


class Classifier(Small):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.down(self.up(x)), labels)


def test_labels_of_one_dimension_are_drawn() -> None:
    given = (torch.randn(4, 8), torch.zeros(4, dtype=torch.long))
    assert foldcc.parallelize(Classifier(), "dp=2,tp=2", example_inputs=given).proof.ok


def proved_on_rank_0(directory: str, broken: bool) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDCC_CACHE", directory)
        if dist.get_rank() != 0:
            patch.setattr(compiled, "prove", None)
        if broken:
            patch.setattr("foldcc.api.PIPELINE", (*PIPELINE[:2], Confuse(), *PIPELINE[2:]))
        torch.manual_seed(0)
        mesh = foldcc.init_folded_mesh("cpu", attention={"dp": 2})
        try:
            return str(foldcc.parallelize(Small(), mesh, example_inputs=(torch.randn(2, 8),), verify=True).proof)
        except FoldError as error:
            return str(error)


def test_one_rank_proves_for_all(tmp_path: Path) -> None:
    first, second = run_distributed(proved_on_rank_0, 2, str(tmp_path), False)
    assert first == second and "on each of 2 ranks" in first
    first, second = run_distributed(proved_on_rank_0, 2, str(tmp_path), True)
    assert first == second and "at stage confuse" in first


def test_a_model_whose_code_came_through_a_pipe_is_proved() -> None:
    lines = [
        "import torch, foldcc",
        "class Model(torch.nn.Module):",
        "    def __init__(self): super().__init__(); self.linear = torch.nn.Linear(8, 8)",
        "    def forward(self, x): return self.linear(x).square().mean()",
        "print(foldcc.parallelize(Model(), 'dp=2', example_inputs=(torch.ones(2, 8),), verify=True).proof)",
    ]
    done = subprocess.run([sys.executable, "-"], input="\n".join(lines), text=True, capture_output=True, check=False)
    assert "is equal to the captured program" in done.stdout, done.stderr
