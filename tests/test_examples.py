"""The examples run as they say, on processes, and go on from what they have stored on another fold."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_model
from test_trainers import forget, launched
from versions import joins_blocks

from foldcc.testing import run_distributed

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TESTED = {"quickstart.py", "pretrain_moe.py", "finetune_hf.py", "your_own_model.py"}


def run(name: str, arguments: list[str]) -> Any:
    """What the example's `main` returns, here or on each process."""
    if dist.is_initialized():
        launched()
    return runpy.run_path(str(EXAMPLES / name), run_name="example")["main"](arguments)


def test_every_example_is_tested_and_short() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == TESTED
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 120, path


def test_the_quickstart_runs() -> None:
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")


@pytest.mark.parametrize(
    "arguments",
    [["--mesh=dp=2,tp=2", "--eager"], ["--mesh=dp=2,tp=2|ep=4", "--experts=4"]],
)
def test_a_model_of_ones_own_trains_as_in_one_process(arguments: list[str]) -> None:
    folded, alone = run("your_own_model.py", arguments)
    assert len(folded) == 4 and folded == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_a_model_of_ones_own_trains_on_processes() -> None:
    for folded, alone in run_distributed(run, 4, "your_own_model.py", ["--mesh=dp=2,tp=2|ep=4", "--experts=4"], timeout=200):
        assert folded == pytest.approx(alone, rel=1e-5)


@joins_blocks
def test_pretraining_is_stopped_and_goes_on_on_another_mesh(tmp_path: Path) -> None:
    (tmp_path / "text.py").write_text(Path(__file__).read_text())
    sizes = "--steps=4 --every=2 --batch=4 --accumulate=2 --length=16 --layers=1 --hidden=32"
    common = [*sizes.split(), f"--data={tmp_path}", f"--out={tmp_path / 'run'}"]
    ranks = run_distributed(run, 4, "pretrain_moe.py", [*common, "--mesh=dp=2,tp=2|ep=4", "--zero=1"], timeout=400)
    assert len(ranks[0]) == 4 and all(rank == ranks[0] for rank in ranks)
    (tmp_path / "run" / "latest").write_text("step-2")
    assert run("pretrain_moe.py", [*common, "--mesh=tp=2|ep=2"]) == pytest.approx(ranks[0][2:], rel=1e-4)


def words(folder: Path) -> Path:
    """A small model and a tokenizer of its words, as on the Hub, and a text beside them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<eos>", *(f"w{i}" for i in range(126))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    tiny_model("mixtral", num_hidden_layers=1).save_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in torch.randint(126, (16 * 40,), generator=random).tolist()))
    return text


@pytest.mark.slow
@joins_blocks
def test_a_model_is_fine_tuned_with_an_adapter_that_its_library_loads(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    text, out = words(tmp_path), tmp_path / "out"
    common = [f"--model={tmp_path}", f"--data={text}", f"--out={out}", "--length=16", "--every=2", "--lora=4", "--accumulate=2"]
    ranks = run_distributed(run, 4, "finetune_hf.py", [*common, "--mesh=dp=2,tp=2|ep=4", "--batch=2"], timeout=400)
    wanted = [entry for entry in ranks[0] if "eval_loss" in entry]
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    adapted = peft.PeftModel.from_pretrained(base, out)
    forget()
    data = runpy.run_path(str(EXAMPLES / "finetune_hf.py"))["Pieces"]
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(text.read_text(), return_tensors="pt")["input_ids"][0]
    pieces = torch.stack([piece["input_ids"] for piece in data(ids[len(ids) * 9 // 10 :], 16)])
    with torch.no_grad():
        assert adapted(input_ids=pieces, labels=pieces).loss.item() == pytest.approx(wanted[-1]["eval_loss"], rel=1e-4)
