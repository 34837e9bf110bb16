"""The table of tiles is read as it is written, and the tuner puts the fastest candidate into it, never one that fails."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foldcc.codegen import tiles
from foldcc.codegen.tiles import CLASSES, PATH, Table, Tile
from foldcc.errors import FoldError
from foldcc.mesh import FoldedMesh
from foldcc.tools import candidates, moe_layer, timing, tune

A, B, C = Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 4)
PLACES = ("Qwen3", "Mixtral", "OLMoE")
# The command line with one tile that spills and one that does not.
TWO = """
import sys
from foldcc.tools import tune
from foldcc.codegen.tiles import Tile

small, large = Tile(64, 64, 32, 4, 3), Tile(256, 256, 32, 4, 2)
tune.candidates = lambda *_: {"many": [small, large], "few": [small], "outer": [small]}
sys.exit(tune.main(["--dry-run", "--compile", "--shapes", "OLMoE", "--jobs", "1"]))
"""


def at(*seconds: float) -> dict[str, float]:
    return dict(zip(PLACES, seconds, strict=True))


# --- the choice ---


def test_the_tile_with_the_lowest_geometric_mean_is_chosen() -> None:
    assert candidates.chosen({A: at(1, 1, 1), B: at(0.9, 0.9, 0.9), C: at(1.2, 0.8, 1)}, A) == B


def test_a_tile_that_is_fast_on_one_shape_and_slow_on_the_others_is_not_chosen() -> None:
    assert candidates.chosen({A: at(10, 1, 1), B: at(5, 2, 2), C: at(9, 1, 1)}, A) == C  # B has the lowest sum


def test_a_tile_that_fails_somewhere_is_not_chosen() -> None:
    assert candidates.chosen({A: at(1, 1, 1), B: at(0.1, 0.1, math.inf), C: {"Qwen3": math.inf}}, A) == A


@pytest.mark.parametrize("present", [A, B])
def test_the_present_tile_stays_where_none_is_faster(present: Tile) -> None:
    assert candidates.chosen({A: at(1, 2, 3), B: at(1, 2, 3)}, present) == present


def test_tiles_that_all_fail_are_an_error() -> None:
    with pytest.raises(FoldError, match="None of 2 candidates runs everywhere"):
        candidates.chosen({A: at(1, math.inf, 1), B: at(math.inf, 1, 1)}, A)


def test_a_class_that_was_not_measured_is_an_error() -> None:
    seconds = {"many": {A: at(1, 1, 1)}, "few": {A: {}}}
    with pytest.raises(FoldError, match="Nothing of the class 'few' was measured"):
        candidates.tuned(tiles.table(), "sm_90", 2, seconds, "made up")


def test_only_what_was_measured_changes() -> None:
    before = tiles.table()
    after = candidates.tuned(before, "sm_90", 2, {"many": {A: at(2, 2, 2), B: at(1, 1, 1)}}, "made up")
    assert after.tiles == {**before.tiles, ("sm_90", 2, "many"): B}
    assert after.origins == {**before.origins, ("sm_90", 2): "made up"}


def test_what_changes_is_told_for_each_shape() -> None:
    seconds = {"few": {tiles.table().tiles["sm_90", 2, "few"]: at(2, 2, 2), B: at(1, 1.5, 1)}}
    after = candidates.tuned(tiles.table(), "sm_90", 2, seconds, "made up")
    lines = tune.compared(tiles.table(), after, "sm_90", 2, seconds).splitlines()[2:]
    assert [(line.split()[1], line.split()[-1]) for line in lines] == [
        ("Qwen3", "0.50"),
        ("Mixtral", "0.75"),
        ("OLMoE", "0.50"),
    ]


def test_a_chip_that_is_new_starts_with_the_tiles_of_others() -> None:
    before = tiles.table()
    with_chip = before.with_chip("sm_89")
    assert before.with_chip("sm_90") == before
    assert all(with_chip.tiles["sm_89", e, c] == before.tiles["other", e, c] for e in (2, 4, 8) for c in CLASSES)
    after = candidates.tuned(with_chip, "sm_89", 2, {"few": {C: at(1, 1, 1)}}, "made up")
    assert after.tiles["sm_89", 2, "few"] == C and list(after.origins)[-3:] == [("sm_89", e) for e in (2, 4, 8)]


# --- candidates ---


@pytest.mark.parametrize("element", [2, 4, 8])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_candidates_fit_and_the_present_tile_is_the_first(chip: str, element: int) -> None:
    table = tiles.table().with_chip(chip)
    found = candidates.candidates(table, chip, element)
    assert list(found) == list(CLASSES)
    for name, tried in found.items():
        assert tried[0] == table.tiles[chip, element, name] and len(set(tried)) == len(tried) > 1
        for t in tried:
            assert t.stages * (t.rows + t.columns) * t.step * element <= tiles.SHARED[chip]
            assert all(n >= 16 and n & (n - 1) == 0 for n in (t.rows, t.columns, t.step))
        assert all(t.rows * t.columns * max(4, element) <= t.warps * 32 * 200 * 4 for t in tried)


def test_standard_shapes_have_many_rows_and_few() -> None:
    for name in moe_layer.SHAPES:
        assert [timing.classes_of(name, n)["grouped_linear"] for n in moe_layer.TOKENS] == ["many", "few"]


# --- the table ---


def test_a_table_that_is_written_again_is_the_same_file(tmp_path: Path) -> None:
    table = Table.read()
    assert str(table) == PATH.read_text()
    changed = candidates.tuned(table.with_chip("sm_89"), "sm_89", 2, {"outer": {C: at(1, 1, 1)}}, 'timed on a "GPU"')
    (tmp_path / "tiles.json").write_text(str(changed))
    assert Table.read(tmp_path / "tiles.json") == changed


def test_a_change_of_a_tile_changes_two_lines() -> None:
    before, after = tiles.table(), candidates.tuned(tiles.table(), "sm_90", 2, {"few": {B: at(1, 1, 1)}}, "made up")
    pairs = zip(str(before).splitlines(), str(after).splitlines(), strict=True)
    assert [new for old, new in pairs if old != new] == [
        '      "from": "made up",',
        '      "few": {"rows": 128, "columns": 128, "step": 64, "warps": 8, "stages": 3},',
    ]


def removed(*path: str) -> Callable[[Any], None]:
    def change(chips: Any) -> None:
        for part in path[:-1]:
            chips = chips[part]
        del chips[path[-1]]

    return change


def put(value: Any, *path: str) -> Callable[[Any], None]:
    def change(chips: Any) -> None:
        for part in path[:-1]:
            chips = chips[part]
        chips[path[-1]] = value

    return change


WRONG = {
    "chips in the table of tiles are sm_90, sm_100, interpreter": removed("other"),
    "bytes of sm_90 in the table of tiles are 2, 8": removed("sm_90", "4"),
    "bytes of sm_90 in the table of tiles are 7": put(7, "sm_90"),
    "classes of sm_90, 2 bytes, in the table of tiles are from, many, few": removed("sm_90", "2", "outer"),
    "classes of other, 8 bytes, in the table of tiles are from, many, few, outer, one": put({}, "other", "8", "one"),
    "tile 'few' of sm_100, 4 bytes, is 64": put(64, "sm_100", "4", "few"),
    "tile 'many' of sm_90, 2 bytes, is .*: 8.5": put(8.5, "sm_90", "2", "many", "warps"),
    "tile 'outer' of other, 2 bytes, has rows=96": put(96, "other", "2", "outer", "rows"),
    "tile 'many' of sm_90, 2 bytes, has columns=8": put(8, "sm_90", "2", "many", "columns"),
    "tile 'many' of sm_90, 2 bytes, has step=0": put(0, "sm_90", "2", "many", "step"),
    "tile 'many' of sm_90, 2 bytes, has warps=6": put(6, "sm_90", "2", "many", "warps"),
    "tile 'many' of sm_90, 2 bytes, has stages=0": put(0, "sm_90", "2", "many", "stages"),
    r"tile 'many' of sm_90, 2 bytes, takes 245,760 bytes of shared memory \(5 \* \(128 \+ 256\) \* 64 \* 2\)": put(
        5, "sm_90", "2", "many", "stages"
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_table_is_an_error(message: str, tmp_path: Path) -> None:
    chips, path = json.loads(PATH.read_text()), tmp_path / "tiles.json"
    WRONG[message](chips)
    path.write_text(json.dumps(chips))
    with pytest.raises(FoldError, match=message) as error:
        Table.read(path)
    assert error.value.facts["at"] == str(path) and "valid" in error.value.facts


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_table_that_is_not_there_or_no_json_is_an_error(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FoldError, match="table of tiles"):
        Table.read(path)


def test_other_tiles_hold_for_their_chip_and_width_inside_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "chip", lambda: "sm_90")
    before = tiles.tiles(torch.bfloat16), tiles.outer(torch.bfloat16), tiles.outer(torch.float32)
    with tiles.using("sm_90", 2, few=A, outer=B), tiles.using("sm_100", 2, few=C), tiles.using("sm_90", 2, outer=C):
        assert tiles.tiles(torch.float16) == (before[0][0], A) and tiles.outer(torch.bfloat16) == C
        assert tiles.outer(torch.float32) == before[2]
    assert (tiles.tiles(torch.bfloat16), tiles.outer(torch.bfloat16), tiles.outer(torch.float32)) == before


# --- timing ---


@dataclass(frozen=True)
class Kernel:
    """Gives a result, raises it, or, if it is a number, gives ones and spills so many registers."""

    result: Any

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, out: torch.Tensor) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        spilled = self.result if isinstance(self.result, int) else 0
        out.copy_(torch.ones(4) if spilled else self.result)
        return SimpleNamespace(n_spills=spilled)


def kernels(*results: Any) -> list[Any]:
    """A launcher for each of these kernels."""
    found = []
    for result in results:
        names: dict[str, Any] = {"product_kernel": Kernel(result), "torch": torch}
        exec("def product(x):\n    out = torch.empty(4)\n    product_kernel[(1,)](out)\n    return out", names)
        found.append(names["product"])
    return found


def test_launchers_that_fail_or_spill_or_compute_something_else_are_none() -> None:
    right, nan = torch.ones(4), torch.tensor([1, 1, 1, math.nan])
    names = "right", "near", "registers in memory", "raises", "wrong", "unwritten"
    results = right, right + 1e-3, 9, RuntimeError("out of resource\n"), 2 * right, nan
    launchers = dict(zip(names, kernels(*results), strict=True))
    whys = {name: timing.failure(launcher, (right,), right) for name, launcher in launchers.items()}
    assert whys == {
        "right": "",
        "near": "",
        "registers in memory": "it spills 36 bytes",
        "raises": "RuntimeError: out of resource",
        "wrong": "its result is 1.0e+00 of the norm away from the first tile's",
        "unwritten": "its result is nan of the norm away from the first tile's",
    }
    with pytest.raises(torch.OutOfMemoryError):
        timing.failure(kernels(torch.OutOfMemoryError())[0], (right,), right)


def test_a_launcher_is_timed_for_each_candidate_with_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_device(fn: Callable[[], Any], turns: int) -> float:
        fn()
        return float(turns)

    monkeypatch.setattr(timing, "on_device", on_device)
    right, seconds, out = torch.ones(4), {A: 1.0, B: 0.0, C: math.inf}, {}
    rivals = dict(zip((A, B, C), kernels(right, RuntimeError(), right), strict=True))
    assert timing.timing(rivals, seconds, out, turns=3)(right).equal(right)
    assert seconds == {A: 4.0, B: math.inf, C: math.inf} and out == {B: "RuntimeError: "}


def test_every_product_of_a_layer_is_computed_with_every_candidate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted without a GPU")
    monkeypatch.setenv("FOLDCC_CACHE", str(tmp_path))
    monkeypatch.setitem(moe_layer.SHAPES, "tiny", (32, 16, 4, 2))
    monkeypatch.setattr(timing, "TOKENS", (140, 8))
    monkeypatch.setattr(timing, "on_device", lambda fn, turns: 1.0)
    present, broken = Tile(32, 32, 32, 1, 1), Tile(48, 32, 16, 1, 1)
    tried = {"many": [present, broken], "few": [present, Tile(16, 32, 16, 1, 1)], "outer": [present]}
    seconds = timing.all_measured(["tiny"], torch.float32, FoldedMesh.parse("dp=1"), tried, turns=1)
    many, few = "tiny, 140 tokens", "tiny, 8 tokens"
    assert seconds == {
        "many": {present: {many: 4.0}, broken: {many: math.inf}},  # up and down, forward and backward
        "few": dict.fromkeys(tried["few"], {few: 4.0}),
        "outer": {present: {many: 2.0, few: 2.0}},
    }
    told = capsys.readouterr().out
    assert f"{many}: 2 many, 1 outer" in told and f"{broken}: InterpreterError" in told


def test_a_shape_that_memory_does_not_suffice_for_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(name: str, *_: Any) -> Any:
        if name == "OLMoE":
            return {"many": {A: 1.0}}, {}
        raise torch.OutOfMemoryError

    monkeypatch.setattr(timing, "measured", measured)
    tried: Any = {"many": [A], "few": [], "outer": []}
    seconds = timing.all_measured(["DeepSeek-V3", "OLMoE"], torch.bfloat16, FoldedMesh.parse("dp=1"), tried, turns=1)
    assert list(seconds["many"][A]) == ["OLMoE, 8192 tokens", "OLMoE, 256 tokens"]
    assert "is left out: memory does not suffice" in capsys.readouterr().out


# --- the command line ---


def test_a_dry_run_shows_the_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--dry-run", "--target", "sm_90"]) == 0
    told = capsys.readouterr().out
    found = candidates.candidates(tiles.table(), "sm_90", 2)
    lines = [line.split()[0] for line in told.splitlines()[4:]]
    assert {name: lines.count(name) for name in CLASSES} == {name: len(tried) for name, tried in found.items()}
    assert "many    128      256    64      8       4           128  196,608" in told and "232,448" in told


def test_no_gpu_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = command("-m", "foldcc", "tune")
    assert done.returncode == 2 and "no CUDA device" in done.stderr and "--dry-run" in done.stderr


def test_a_table_that_cannot_be_written_is_an_error_before_anything_is_timed(tmp_path: Path) -> None:
    with pytest.raises(FoldError, match="The table cannot be written"):
        tune.tune(tmp_path / "none" / "tiles.json", "sm_90", ["OLMoE"], torch.bfloat16, 1)


@pytest.mark.slow
def test_a_dry_run_that_compiles_says_what_spills(tmp_path: Path) -> None:
    done = command("-c", TWO, FOLDCC_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    spilling = [line for line in done.stdout.splitlines() if "spills" in line]
    assert len(spilling) == 1 and spilling[0].split()[:3] == ["many", "256", "256"]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    given.pop("TRITON_INTERPRET", None)
    root = Path(__file__).parent.parent
    return subprocess.run([sys.executable, *arguments], cwd=root, env=given, capture_output=True, text=True)
