"""Other people's training loops train a folded model as they train the same model in one process."""

from __future__ import annotations

import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from versions import joins_blocks

import foldcc
from foldcc.errors import FoldError
from foldcc.testing import run_distributed

accelerate = pytest.importorskip("accelerate")
SAMPLES = 40
TOLERANCE = 1e-4


class Sentences(Dataset[dict[str, Tensor]]):
    """Random tokens, of which samples have different numbers of labels, and a column that no model takes."""

    def __init__(self, samples: int = SAMPLES, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(128, (samples, 16), generator=random)
        self.unlabelled = torch.randint(1, 12, (samples,), generator=random)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = self.ids[i].clone()
        labels[: self.unlabelled[i]] = -100
        return {"input_ids": self.ids[i], "labels": labels, "length": self.unlabelled[i]}


class Words(nn.Module):
    """Predicts each label from its token alone, by one layer of experts."""

    accepts_loss_kwargs = True  # of Transformers: the loss is divided by the number that it is given

    def __init__(self, vocabulary: int = 128, hidden: int = 16, experts: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(vocabulary, hidden), nn.Linear(hidden, vocabulary, bias=False)
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up, self.down = (nn.Parameter(torch.randn(experts, hidden, hidden) / 4) for _ in range(2))

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids).flatten(0, 1)
        weights, chosen = self.router(x).softmax(-1).topk(2)
        logits = self.head(x + foldcc.ops.experts(x, chosen, weights, self.up, self.down, activation_fn=nn.functional.silu))
        valid = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        total = nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        return {"loss": total / valid, "logits": logits.unflatten(0, input_ids.shape)}


MODELS = {"words": Words, "mixtral": partial(tiny_model, "mixtral", num_hidden_layers=1)}


def launched() -> None:
    """What torchrun tells a process, and nothing of what Accelerate remembers of the process before."""
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")
    forget()


def forget() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# --- Transformers' Trainer


def counted(prediction: Any) -> dict[str, float]:
    """Of all samples, so that one which is counted twice or never changes it."""
    return {"size": float(abs(prediction.predictions).sum()), "labels": float((prediction.label_ids >= 0).sum())}


def train(trainer: type, subject: nn.Module, folder: Path, batch: int, resume: str | None = None) -> list[dict[str, float]]:
    """What a trainer logs in an epoch of five steps of two batches each; it evaluates and saves every second step."""
    from transformers import TrainingArguments

    forget() if not dist.is_initialized() else launched()
    arguments = TrainingArguments(
        str(folder), num_train_epochs=1, gradient_accumulation_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, per_device_train_batch_size=batch, per_device_eval_batch_size=batch,
        learning_rate=1e-3, max_grad_norm=0.5, report_to=[], disable_tqdm=True, use_cpu=True, log_level="error",
    )  # fmt: skip
    found = trainer(
        model=subject,
        args=arguments,
        train_dataset=Sentences(),
        eval_dataset=Sentences(16, seed=1),
        compute_metrics=counted,
    )
    found.train(resume_from_checkpoint=resume)
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_size", "eval_labels")
    logged = [{k: x for k, x in entry.items() if k in kept} for entry in found.state.log_history]
    return [entry for entry in logged if len(entry) > 1]


def assert_the_same(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=TOLERANCE)


def folded_train(kind: str, mesh: str, folder: Path, batch: int, options: dict[str, Any]) -> list[dict[str, float]]:
    from foldcc.trainers.transformers import Trainer

    return train(Trainer, foldcc.parallelize(MODELS[kind](), foldcc.FoldedMesh.parse(mesh, "cpu"), **options), folder, batch)


@joins_blocks
@pytest.mark.parametrize("kind", ["words", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_trainer_trains_evaluates_saves_and_resumes_on_another_fold_as_in_one_process(kind: str, tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM
    from transformers import Trainer as Transformers

    from foldcc.trainers.transformers import Trainer

    alone, here = MODELS[kind](), tmp_path / "folded"
    wanted = train(Transformers, alone, tmp_path / "alone", 4)
    assert [entry["step"] for entry in wanted if "eval_loss" in entry] == [2, 4, 5]
    for rank in run_distributed(folded_train, 4, kind, "dp=2,tp=2|ep=4", here, 2, {"zero": 1}, timeout=400):
        assert_the_same(rank, wanted)
    resumed = foldcc.parallelize(MODELS[kind](), "tp=2|ep=2")
    assert_the_same(train(Trainer, resumed, here, 4, str(here / "checkpoint-2")), wanted)
    if kind == "mixtral":
        saved = MixtralForCausalLM.from_pretrained(here / "checkpoint-5")
        for name, x in alone.state_dict().items():
            torch.testing.assert_close(saved.state_dict()[name], x, rtol=1e-3, atol=1e-5)


# --- Accelerate


def accelerated(accelerator: Any, subject: nn.Module, batch: int, folder: Path) -> dict[str, Any]:
    """A loop as Accelerate's documentation has it, whose state is loaded again when it is through."""
    optimizer = torch.optim.AdamW(subject.parameters(), lr=1e-2)
    # Accelerate counts the batches of all ranks.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda batches: 0.98 ** (batches * batch))
    loader = DataLoader(Sentences(), batch_size=batch)
    subject, optimizer, loader, schedule = accelerator.prepare(subject, optimizer, loader, schedule)
    norms, losses = [], []
    for data in loader:
        with accelerator.accumulate(subject):
            loss = subject(data["input_ids"], labels=data["labels"])["loss"]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(subject.parameters(), 0.1).item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    logits = accelerator.gather_for_metrics(subject(data["input_ids"], labels=data["labels"])["logits"].detach())
    items = accelerator.reduce((data["labels"] >= 0).sum())
    accelerator.save_state(str(folder))
    weights = accelerator.get_state_dict(subject)
    with torch.no_grad():
        for p in subject.parameters():
            p.zero_()
    accelerator.load_state(str(folder))
    again = subject(data["input_ids"], labels=data["labels"])["loss"].item()
    found = {"losses": losses, "norms": norms, "rate": schedule.get_last_lr(), "items": int(items), "again": again}
    return {**found, "logits": logits, "weights": {name: x.clone() for name, x in weights.items()}}


def folded_accelerated(mesh: str, batch: int, folder: Path) -> dict[str, Any]:
    from foldcc.trainers.accelerate import Accelerator

    launched()
    folded = foldcc.parallelize(Words(), here := foldcc.FoldedMesh.parse(mesh, "cpu"))
    with pytest.raises(FoldError, match="Accelerate would do so again.*\n.*foldcc.trainers.accelerate.Accelerator"):
        accelerate.Accelerator().prepare(folded)
    with pytest.raises(FoldError, match="DistributedDataParallel would do so again"):
        nn.parallel.DistributedDataParallel(folded)
    forget()
    return accelerated(Accelerator(here, gradient_accumulation_steps=2), folded, batch, folder)


def test_a_loop_of_accelerate_trains_as_in_one_process(tmp_path: Path) -> None:
    forget()
    wanted = accelerated(accelerate.Accelerator(gradient_accumulation_steps=2), Words(), 4, tmp_path / "alone")
    ranks = run_distributed(folded_accelerated, 4, "dp=2,tp=2|ep=4", 2, tmp_path / "folded", timeout=400)
    for rank in ranks:
        for name in ("losses", "norms", "rate", "items", "again"):
            assert rank[name] == pytest.approx(wanted[name], rel=TOLERANCE), name
        torch.testing.assert_close(rank["logits"], wanted["logits"], rtol=1e-3, atol=1e-4)
    for name, x in wanted["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], x, rtol=1e-3, atol=1e-4)


def test_what_a_trainer_cannot_train_is_refused_and_says_what_can(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from foldcc.trainers.accelerate import Accelerator
    from foldcc.trainers.transformers import Trainer

    forget()
    folded = foldcc.parallelize(Words(), "dp=2")
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(FoldError, match="Words is not folded"):
        Trainer(model=Words(), args=arguments, train_dataset=Sentences())
    with pytest.raises(FoldError, match="model_init makes the model anew"):
        Trainer(args=arguments, model_init=lambda: folded)
    with pytest.raises(FoldError, match="has one rank cut batches for all"):
        Accelerator(folded.mesh, dataloader_config=accelerate.DataLoaderConfiguration(dispatch_batches=True))
    with pytest.raises(FoldError, match="Accelerate has found 1 processes"):
        Accelerator(foldcc.FoldedMesh("cpu", foldcc.FoldedMesh.parse("dp=2").sizes))
    with pytest.raises(FoldError, match="is not told of which folder"):
        Accelerator(folded.mesh).load_state()


def test_a_trainer_knows_the_arguments_the_labels_and_the_library_s_names_of_a_folded_model() -> None:
    from inspect import signature

    from transformers.utils.generic import find_labels

    original = tiny_model("llama", num_hidden_layers=1)
    folded = foldcc.parallelize(original, "dp=2")
    assert signature(folded.forward) == signature(original.forward)
    assert find_labels(type(folded)) == find_labels(type(original)) == ["labels"]
    assert folded._get_name() == "LlamaForCausalLM" and folded.can_generate()
    assert folded.generation_config is original.generation_config and folded.config is original.config
    assert signature(pickle.loads(pickle.dumps(folded)).forward) == signature(original.forward)
    with pytest.raises(FoldError, match="generate is a method of LlamaForCausalLM"):
        folded.generate(torch.zeros(1, 4, dtype=torch.long))


# --- pipeline stages


def tied() -> nn.Module:
    return tiny_model("llama", tie_word_embeddings=True)


def in_stages(folder: Path, resume: str | None) -> dict[str, Any]:
    """Trains what is left behind a checkpoint, all of it in a loop of Accelerate, and an adapter, which is stored."""
    from foldcc.trainers.accelerate import Accelerator
    from foldcc.trainers.transformers import Trainer

    mesh, ids = foldcc.FoldedMesh.parse("pp=2", "cpu"), torch.zeros(4, 16, dtype=torch.int64)
    options: dict[str, Any] = {"example_inputs": {"input_ids": ids, "labels": ids}, "micro_batches": 2, "verify": False}
    found: dict[str, Any] = {"trained": train(Trainer, foldcc.parallelize(tied(), mesh, **options), folder / "again", 4)}
    resumed = foldcc.parallelize(tied(), mesh, **options)
    found["resumed"] = train(Trainer, resumed, folder / "again", 4, resume)
    launched()
    folded = foldcc.parallelize(tied(), mesh, schedule="1f1b", **options)
    found |= accelerated(Accelerator(mesh, gradient_accumulation_steps=2), folded, 4, folder / "accelerated")
    foldcc.parallelize(adapted(), mesh, **options).save_pretrained(folder / "adapter")
    return found


@pytest.mark.slow
def adapted() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_model("llama", num_hidden_layers=4), config)


def test_a_trainer_and_a_loop_of_accelerate_train_pipeline_stages_as_one_process(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM
    from transformers import Trainer as Transformers

    from foldcc.trainers.transformers import Trainer

    alone = tied()
    wanted = train(Transformers, alone, tmp_path / "alone", 4)
    forget()
    loop = accelerated(accelerate.Accelerator(gradient_accumulation_steps=2), tied(), 4, tmp_path / "loop")
    one = foldcc.parallelize(tied(), "dp=1", verify=False)
    assert_the_same(train(Trainer, one, tmp_path / "one", 4), wanted)
    ranks = run_distributed(in_stages, 2, tmp_path, str(tmp_path / "one" / "checkpoint-2"), timeout=400)
    for rank in ranks:
        assert_the_same(rank["trained"], wanted)
        assert_the_same(rank["resumed"], wanted)
        for name in ("losses", "norms", "rate", "items", "again"):
            assert rank[name] == pytest.approx(loop[name], rel=TOLERANCE), name
        torch.testing.assert_close(rank["logits"], loop["logits"], rtol=1e-3, atol=1e-4)
    assert ranks[0]["weights"].keys() == loop["weights"].keys() and not ranks[1]["weights"]
    for name, x in loop["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], x, rtol=1e-3, atol=1e-4)
    back = foldcc.parallelize(tied(), "dp=2", verify=False)
    assert_the_same(train(Trainer, back, tmp_path / "again", 4, str(tmp_path / "again" / "checkpoint-4")), wanted)
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "again" / "checkpoint-5").state_dict()
    for name, x in alone.state_dict().items():
        torch.testing.assert_close(saved[name], x, rtol=1e-3, atol=1e-5)
    peft, batch = pytest.importorskip("peft"), {n: x[None] for n, x in Sentences()[0].items() if n != "length"}
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=4), tmp_path / "adapter")
    torch.testing.assert_close(loaded(**batch).loss, adapted().eval()(**batch).loss)
