"""`python -m foldcc` shows what it promises, and says in a sentence what it cannot do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from foldcc.tools.demo import main

WIDTH = 100
ROW = re.compile(r"│ +(\d+) │ +([\d.]+) │ +([\d.]+) │ +([-+.e\d]+) │")


def test_both_models_train_alike(tmp_path: Path) -> None:
    options = ["--mesh", "pp=2,dp=2|ep=2", "--steps", "2", "--batch", "4", "--length", "16", "--out", "stages"]
    environment = {**os.environ, "COLUMNS": str(WIDTH), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "foldcc", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    rows = [row.groups() for row in ROW.finditer(done.stdout)]
    assert [int(step) for step, *_ in rows] == [1, 2]
    assert all(float(alone) == pytest.approx(float(folded), abs=1e-4) for _, alone, folded, _ in rows)

    files = sorted((tmp_path / "stages").iterdir())
    assert str(tmp_path / "stages") in done.stdout
    assert {"capture", "shard", "dispatch", "differentiate", "lower"} <= {file.stem.split("_", 1)[1] for file in files}
    assert all(file.read_text().startswith("program ") for file in files)

    assert "\x1b" not in done.stdout and "\r" not in done.stdout  # nothing moves where there is no terminal
    assert all(len(line) <= WIDTH for line in done.stdout.splitlines() if str(tmp_path) not in line)


def refusal(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What `python -m foldcc` with these arguments says as it exits with code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--mesh", "dp=4,sp=2"], "unknown axis 'sp'."),
        (["--mesh", "eight"], "'eight' in 'eight' is not of the form axis=size."),
        (["--batch", "7"], "7 samples of a batch do not divide over dp * micro_batches=2 (7 = 3 * 2 + 1)."),
        # this one is found by the ranks
        (["--mesh", "tp=3"], "8 attention heads, 2 to each of 4 key/value heads, do not divide over tp=3."),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(
    arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    first, *facts = refusal(arguments, capfd).splitlines()
    assert first == f"python -m foldcc: {sentence}"
    assert facts and all(fact.startswith("  ") for fact in facts)


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert not stopped.value.code and "--mesh" in capsys.readouterr().out
