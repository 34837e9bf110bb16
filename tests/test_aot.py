"""Kernels are compiled without a GPU: all of them, for the machine that they are meant for, and what does not fit is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import foldcc
from foldcc.codegen import source
from foldcc.errors import FoldError
from foldcc.mesh import FoldedMesh
from foldcc.tools import aot
from foldcc.tools.aot import main, report
from foldcc.tools.launches import Launch, launched
from foldcc.tools.machine_code import SPILLED, Compiled
from foldcc.tools.standard_models import MODELS, standard_model
from tests.models import token_batch

SIZES = {"vocab_size": 128, "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 1, "num_local_experts": 4}
CONFIG = {"model_type": "mixtral", "num_attention_heads": 4, "num_key_value_heads": 2, **SIZES}
# The command line with other tiles: the one for many rows is too large, the one for few is no power of two.
ENLARGED = """
import sys
from foldcc.codegen import emit, experts, tiles
from foldcc.tools.aot import main
from foldcc.codegen.tiles import Tile

emit.SKELETONS = (experts.find,)
with tiles.using("sm_90", 2, many=Tile(128, 256, 128, 8, 4), few=Tile(96, 128, 64, 4, 3)):
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def compiled(config: Path, *options: str, program: tuple[str, ...] = ("-m", "foldcc", "kernels")) -> Any:
    """What the command line does for a configuration: its exit status and what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FOLDCC_CACHE": str(config.parent / "kernels")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *program, "--model", str(config), "--target", "sm_90", "--jobs", "1", "--batch", "2", *options]
    return subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_kernel_of_a_program_is_compiled(config: Path) -> None:
    told = config.parent / "kernels.json"
    done = compiled(config, "--seq", "64", "--json", str(told))
    assert done.returncode == 0, done.stdout + done.stderr

    model = standard_model(str(config))
    folded = foldcc.parallelize(model, FoldedMesh.parse("dp=1"), example_inputs=token_batch(2, 64), kernels="triton")
    rows = json.loads(told.read_text())
    assert {row["kernel"] for row in rows} == set(folded.kernels)
    assert all(0 < row["registers"] <= 255 and row["spilled"] <= SPILLED for row in rows)
    assert all(f"\n{name} " in done.stdout for name in folded.kernels)


def test_a_tile_that_does_not_fit_is_told(config: Path) -> None:
    options = "--mesh", "dp=2|ep=2", "--seq", "64", "--only", "grouped_linear"
    done = compiled(config, *options, program=("-c", ENLARGED))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "grouped_linear_kernel exceeds the shared memory of sm_90" in done.stdout
    assert "grouped_linear_kernel does not compile" in done.stdout and "power of 2" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_kernels_of_a_standard_model_fit(model: str, tmp_path: Path) -> None:
    done = compiled(tmp_path / "none", "--model", model)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_report_says_what_is_wrong() -> None:
    launch = Launch("norm", "norm_kernel", Path("norm.py"), (), (("BR", 8),), (), (("num_warps", 8),))
    found = [
        Compiled(launch, 0.5, registers=255, spilled=40),
        Compiled(launch, 0.5, shared=232_449),
        Compiled(launch, 0.5, error="CompilationError: no"),
    ]
    text = report(found, "sm_90")
    assert "norm_kernel spills 40 bytes" in text and "norm_kernel does not compile: CompilationError: no" in text
    assert "norm_kernel exceeds the shared memory of sm_90: 232,449 of 232,448 bytes" in text


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_a_target_that_is_unknown_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, "--target", "sm_91")
    assert "There is no target 'sm_91'." in told and "sm_90, sm_100" in told


def test_a_model_that_is_unknown_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, "--model", "Qwen9")
    assert "There is no model 'Qwen9'." in told and "Mixtral-8x7B" in told and "configuration file" in told


def test_triton_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton is not installed" in refusal(capsys, "--model", "llama", "--layers", "1")


def test_triton_that_interprets_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    source.require_triton()
    monkeypatch.setattr("triton.knobs.runtime.interpret", True)
    with pytest.raises(FoldError, match="Triton interprets its kernels in this process"), source.only_compiled_for("sm_90"):
        pass


def test_kernels_that_are_not_there_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    monkeypatch.setattr(aot, "launches", lambda program: [])
    monkeypatch.setattr(foldcc, "parallelize", lambda *_, **__: SimpleNamespace(program=None, kernels=["norm"]))
    with pytest.raises(FoldError, match=r"The program has no kernel 'rms'.\n  valid +norm"):
        aot.compile_model(torch.nn.Linear(2, 2), FoldedMesh.parse("dp=1"), "sm_90", 2, 16, only="rms")


def test_a_launcher_that_needs_data_is_an_error() -> None:
    def launcher(x: Tensor) -> float:
        return x.item()

    kernel = SimpleNamespace(name="norm", path="norm.py")
    node: Any = SimpleNamespace(meta={"kernel": kernel}, target=launcher, args=(torch.zeros(1, device="meta"),))
    with pytest.raises(FoldError, match="The launcher norm needs data"):
        launched(node, 1)


def test_the_benchmark_of_kernels_wants_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "benchmarks/kernels.py"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr
