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
