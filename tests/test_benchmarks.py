"""Benchmarks run: what they measure is nobody's test."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_what_compiling_takes_can_be_measured() -> None:
    pytest.importorskip("transformers")
    found = runpy.run_path(str(ROOT / "benchmarks" / "compile_time.py"))["measure"]("dp=2,tp=2|ep=4", 1)
    assert found["capture"] + found["beyond"] == pytest.approx(found["parallelize"]) and found["export"] > 0


PAPER = runpy.run_path(str(ROOT / "benchmarks" / "paper.py"))
SMALL = {  # as the paper's, with fewer and smaller layers on fewer ranks, none of whose axes are of one size
    "mixtral": (PAPER["Shape"](256, 96, 3, 8, 4, 128, 8, 2), "pp=3,dp=4,tp=2|ep=4"),
    "qwen2_moe": (PAPER["Shape"](256, 64, 2, 8, 4, 32, 8, 4, shared=48), "pp=2,dp=2,tp=4|ep=4"),
}


@pytest.mark.parametrize("name", [pytest.param("mixtral", marks=pytest.mark.slow), "qwen2_moe"])
def test_the_layouts_of_the_paper_hold_keep_and_send_what_closed_forms_say(name: str) -> None:
    pytest.importorskip("transformers")
    found = PAPER["measure"](*SMALL[name], 16, 64, verify=False)
    assert found["layers"] == [1] * len(found["places"])
