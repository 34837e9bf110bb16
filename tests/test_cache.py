"""Compiled programs on disk: what is read is what compiling gives, and whatever decides it is in the key."""

from __future__ import annotations

import copy
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_model, token_batch
from torch import Tensor, nn

import foldcc
from foldcc import Precision
from foldcc.cache import files, key
from foldcc.ir.program import Program
from foldcc.passes import Pass
from foldcc.passes.annotate import UnknownOperator
from foldcc.testing import run_distributed
from foldcc.testing.equivalence import relative_error


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FOLDCC_CACHE", str(tmp_path))
    files._announce.cache_clear()
    yield tmp_path / "programs"


class Scaled(nn.Module):
    """A layer, and a table that is no buffer."""

    def __init__(self, table: float = 2.0):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.table = nn.Linear(16, 32), nn.Linear(32, 16), torch.tensor([table] * 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x))) * self.table
        return y


def folded(model: nn.Module, mesh: Any = "dp=2,tp=2", **options: Any) -> Any:
    options = {"example_inputs": {"x": torch.zeros(4, 8, 16)}, **options}
    return foldcc.parallelize(model, mesh, cache=True, verify=False, **options)


def was_read(model: Any) -> bool:
    return bool(model.stages.told.startswith("read from disk"))


@pytest.mark.parametrize(
    ("family", "mesh", "options"),
    [
        ("mixtral", "dp=2,tp=2|ep=4", {"zero": 3}),
        pytest.param("gpt_oss", "cp=2,tp=2|ep=4", {"recompute": "blocks"}, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "dp=2,tp=2|ep=2,etp=2", {"recompute": 0.9}, marks=pytest.mark.slow),
        pytest.param(
            "qwen3",
            "pp=2,dp=2",
            {"micro_batches": 2, "schedule": "zero-bubble", "precision": Precision(compute="bfloat16")},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_read_is_what_was_compiled(family: str, mesh: str, options: dict[str, Any]) -> None:
    model, call = tiny_model(family), token_batch(8)
    first, second = (folded(model, mesh, example_inputs=call, **options) for _ in range(2))
    assert not was_read(first) and was_read(second)
    for mine, theirs in zip(first.stages, second.stages, strict=True):
        assert str(mine).splitlines()[1:] == str(theirs).splitlines()[1:], mine.name
    assert str(first.plan) == str(second.plan)
    assert str(first.summary()) == str(second.summary())
    assert foldcc.verify(second).ok
    for m in (first, second):
        m(**call).loss.backward()
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_a_program_from_disk_trains_as_the_original() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    folded(model, example_inputs=token_batch(4))
    read = folded(model, example_inputs=token_batch(4))
    assert was_read(read)
    for length in (16, 24):
        for m in (model, read):
            m.zero_grad()
            m(**token_batch(4, length)).loss.backward()
        theirs = dict(read.named_parameters())
        for name, p in model.named_parameters():
            assert relative_error(theirs[name].grad, p.grad) < 1e-5, name


def test_weights_do_not_decide_a_program_and_all_else_does() -> None:
    model = Scaled()
    folded(model)
    with torch.no_grad():
        model.up.weight.mul_(2)
    again = folded(model)
    assert was_read(again)
    x = torch.randn(4, 8, 16)
    torch.testing.assert_close(again(x), model(x))
    others: list[tuple[nn.Module, dict[str, Any]]] = [
        (model, {"mesh": "dp=4"}),
        (model, {"example_inputs": {"x": torch.zeros(4, 12, 16)}}),
        (model, {"zero": 3}),
        (model, {"recompute": "blocks"}),
        (model, {"precision": Precision(compute="bfloat16")}),
        (copy.deepcopy(model).double(), {"example_inputs": {"x": torch.zeros(4, 8, 16, dtype=torch.float64)}}),
        (copy.deepcopy(model).requires_grad_(False), {}),
        (Scaled(table=3.0), {}),
        (nn.Sequential(nn.Linear(16, 16)), {"example_inputs": {"input": torch.zeros(4, 8, 16)}}),
    ]
    for other, options in others:
        assert not was_read(folded(other, **options)), options
        assert was_read(folded(other, **options)), options


def test_a_field_that_is_left_out_of_the_key_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key, "_elements", lambda x: "")
    with pytest.raises(AssertionError):
        test_weights_do_not_decide_a_program_and_all_else_does()


@pytest.mark.parametrize(
    "harm", [lambda b: b[:-7], lambda b: b[:90] + b"x" + b[91:], lambda b: b"", lambda b: b"foldcc program 0\n" + b]
)
def test_a_file_that_is_not_what_was_written_is_said_and_written_anew(folder: Path, harm: Any) -> None:
    model = Scaled()
    folded(model)
    (path,) = folder.iterdir()
    path.write_bytes(harm(path.read_bytes()))
    with pytest.warns(UserWarning, match="cannot be read, and is compiled again"):
        assert not was_read(folded(model))
    assert was_read(folded(model))


def test_bytes_that_name_code_are_not_run(folder: Path) -> None:
    import pickle

    from foldcc.cache.packed import unpack

    program = folded(Scaled()).stages[0].program
    for evil in (print, foldcc.parallelize, torch.load):
        with pytest.raises(pickle.UnpicklingError, match="nothing that a program is made of"):
            unpack(pickle.dumps(evil), program)


def test_a_directory_that_cannot_be_written_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOLDCC_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept on disk|cannot be read"):
        folded(Scaled())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert folded(Scaled()).stages.told == "not kept on disk, which cannot be written."


@dataclass(frozen=True, kw_only=True)
class Mine(Pass):
    """A pass of a user's own, whose code may change."""

    def run(self, program: Program) -> Program:
        return program


def test_a_pass_of_a_users_own_is_run_each_time() -> None:
    for _ in range(2):
        model = folded(Scaled(), dynamic=()).with_passes(Mine())
        model(torch.zeros(4, 16, 16))
        assert "defined outside of foldcc" in model.stages.told


def test_without_a_cache_nothing_is_written(folder: Path) -> None:
    foldcc.parallelize(Scaled(), "dp=2", example_inputs={"x": torch.zeros(4, 8, 16)}, cache=False)
    assert not folder.exists()


def test_the_oldest_leave(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folded(Scaled())
    (first,) = folder.iterdir()
    monkeypatch.setattr(files, "BYTES", first.stat().st_size + 10)
    folded(Scaled(), "dp=4")
    assert first not in list(folder.iterdir()) and len(list(folder.iterdir())) == 1


def on_processes(folder: str) -> None:
    os.environ["FOLDCC_CACHE"] = folder  # each test sets it anew
    model, mesh = Scaled(), foldcc.init_folded_mesh("cpu", attention={"dp": 2})
    for i in range(2):
        x = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(i))
        mine = folded(model, mesh, example_inputs={"x": x[:2]}, zero=3)
        dist.barrier()  # both have written
        assert was_read(mine) == bool(i)
        (mine(x.chunk(2)[dist.get_rank()]).square().sum() / 2).backward()
        model.zero_grad()
        (model(x).square().sum() / 2).backward()
        theirs = dict(mine.named_parameters())
        for name, p in model.named_parameters():
            assert relative_error(theirs[name].grad.full_tensor(), p.grad) < 1e-5, name


def test_ranks_read_what_they_wrote(tmp_path: Path) -> None:
    run_distributed(on_processes, 2, str(tmp_path))


def _in_a_process(_: int) -> bool:
    return was_read(folded(Scaled()))


@pytest.mark.slow
def test_another_process_reads_it_and_several_write_at_once(folder: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_in_a_process, range(2), chunksize=1)
        assert all(pool.map(_in_a_process, range(2), chunksize=1))


class Spread(nn.Module):
    """With an operator that no rule is known of."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) - self.up(x).std(0)


def test_a_warning_is_said_of_a_program_that_is_read_too() -> None:
    for _ in range(2):
        with pytest.warns(UnknownOperator, match="std"):
            made = folded(Spread(), "dp=2")
    assert was_read(made)


def test_code_that_was_edited_since_it_was_imported_keeps_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(foldcc.__file__)
    monkeypatch.setattr(foldcc, "IMPORTED", file.stat().st_ctime - 1)
    key.code.cache_clear()
    for _ in range(2):
        made = foldcc.parallelize(Scaled(), "dp=2", example_inputs={"x": torch.zeros(4, 8, 16)}, cache=True, verify=True)
        assert "is newer than this process" in made.stages.told
        assert made.proof is not None and made.proof.ok
    assert not folder.exists() and not (folder.parent / "proofs").exists()


def test_the_key_is_of_the_package_and_not_of_what_else_is_in_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, read = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (seen.append(path), read(path))[1])
    key.code.cache_clear()
    key.code()
    assert seen and not [path for path in seen if {"tests", "benchmarks", "examples"} & set(path.parts)]
    assert {"shard.py", "emit.py", "key.py"} <= {path.name for path in seen}
