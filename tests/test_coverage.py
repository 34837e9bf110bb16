"""The coverage command: types of Transformers are made small by one rule, and whatever becomes of one is a row."""

from __future__ import annotations

import os
import time
import warnings
from datetime import date
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from foldcc.tools.coverage import main, outcomes, type_holds_experts, types
from foldcc.tools.small import SIZES, holds_experts, shrunk
from foldcc.tools.trial import Outcome, meshes_of, trial

EACH_DAY = 10


def in_many_ways(kind: str, mesh: str) -> Outcome:
    """What a trial may end in."""
    if kind == "dies":
        os._exit(3)
    if kind == "hangs":
        time.sleep(60)
    if kind == "grows":
        bytearray(2**33)
    return Outcome(kind=kind, mesh=mesh, reached="compared", error=0.0, proof="proved")


def test_a_small_configuration_keeps_ratios_and_kinds_of_layers() -> None:
    found = shrunk(CONFIG_MAPPING["gemma3_text"](), SIZES[0])
    assert (found.hidden_size, found.num_attention_heads, found.num_key_value_heads, found.vocab_size) == (32, 4, 2, 128)
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert found.layer_types == kinds and found.num_hidden_layers == 4
    experts = shrunk(CONFIG_MAPPING["deepseek_v3"](), SIZES[0])
    assert holds_experts(experts) and not holds_experts(found)
    assert (experts.n_routed_experts, experts.num_experts_per_tok, experts.first_k_dense_replace) == (8, 2, 1)
    assert experts.intermediate_size / experts.moe_intermediate_size == pytest.approx(9, abs=2)


def test_types_are_folded_compared_and_proved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "coverage.md"
    assert main(["--types", "llama,qwen3_moe", "--mesh", "dp=2,tp=2|ep=2", "--out", str(out), "--jobs", "1"]) == 0
    text = out.read_text()
    assert "| llama | dp=2,tp=2\\|ep=2 | yes | yes |" in text and "| qwen3_moe | dp=2,tp=2\\|ep=2 | yes | yes |" in text
    assert "1 types dense on `dp=2,tp=2|ep=2`: 1 captured, 1 folded, 1 equal, 1 proved" in text
    assert "100% folded, equal and proved" in capsys.readouterr().out


def test_a_crash_and_a_limit_are_rows() -> None:
    jobs = [(kind, "tp=2") for kind in ("dies", "hangs", "grows", "works")]
    found = {x.kind: x for x in outcomes(jobs, at_once=4, seconds=10, memory=2.0, run=in_many_ways)}
    assert found["works"].good
    assert found["dies"].reason == "The process died with exit code 3."
    assert found["hangs"].reason == "It took more than 10 s."
    assert "exit code" in found["grows"].reason
    assert not any(x.good or not x.runs for kind, x in found.items() if kind != "works")


def test_bad_options_say_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, told in (
        (["--types", "lama"], "no causal language model lama"),
        (["--mesh", "dp=2,ep=2"], "ep"),
        (["--types", "llama", "--out", str(tmp_path / "none" / "x.md")], "cannot be written"),
    ):
        assert main(options) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in range(1, EACH_DAY))])
def test_types_of_the_day_are_equal_where_they_fold(turn: int) -> None:
    """Other types each day: all in three weeks. `make coverage` has them all."""
    known = types()
    kind = known[(date.today().toordinal() * EACH_DAY + turn) % len(known)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = trial(kind, meshes_of(type_holds_experts(kind))[0])
    assert found.equal or not found.folded, f"{kind}: {found}"
