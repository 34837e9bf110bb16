"""Training is resumed on any fold, from the last checkpoint that is complete."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model, token_batch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import foldcc
from foldcc.checkpoints.training import LATEST
from foldcc.testing import run_distributed


class Network(nn.Module):
    """Gate and up in one weight, cut in blocks; dropout; a buffer that counts; weights that are tied or frozen."""

    seen: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.up, self.down = nn.Embedding(32, 16), nn.Linear(16, 64), nn.Linear(32, 16, bias=False)
        self.drop, self.head = nn.Dropout(0.25), nn.Linear(16, 32, bias=False)
        self.head.weight, self.scale = self.embed.weight, nn.Parameter(torch.rand(16), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Tensor) -> Tensor:
        self.seen += ids.numel()
        gate, up = self.up(self.embed(ids)).chunk(2, -1)
        return self.head(self.down(self.drop(torch.sigmoid(gate) * up)) * self.scale).square().mean()


def batch(step: int) -> Tensor:
    return torch.randint(32, (8, 4), generator=torch.Generator().manual_seed(step))


def network(text: str, device: str, seed: int = 0, **options: Any) -> foldcc.FoldedModule:
    mesh = foldcc.FoldedMesh.parse(text, device)
    plain, hooked = Network(seed), options.pop("hooked", False)
    if hooked:
        plain.down.register_full_backward_hook(lambda module, grads, given: None)
    return foldcc.parallelize(plain, mesh, example_inputs=(own(batch(0), mesh),), **options)


def own(x: Tensor, mesh: foldcc.FoldedMesh) -> Tensor:
    if mesh.is_virtual:
        return x
    place = mesh.coordinate(mesh.here, "dp_replicate") * mesh.size("dp") + mesh.coordinate(mesh.here, "dp")
    return x.chunk(mesh.size("dp_replicate") * mesh.size("dp"))[place]


def optimizers(model: nn.Module, name: str) -> list[torch.optim.Optimizer]:
    matrices, others = [model.up.weight, model.down.weight], [model.embed.weight, model.up.bias]
    if name == "muon":
        return [torch.optim.Muon(matrices, lr=0.005), torch.optim.AdamW([{"params": others, "lr": 0.02}], amsgrad=True)]
    if name == "adafactor":
        return [torch.optim.Adafactor(model.parameters(), lr=0.01)]
    return [torch.optim.AdamW([{"params": matrices, "lr": 0.02}, {"params": others, "weight_decay": 0.0}], lr=0.01)]


def train(model: foldcc.FoldedModule, these: list[torch.optim.Optimizer], steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = model(own(batch(step), model.mesh))
        loss.backward()
        for optimizer in these:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def everything(model: foldcc.FoldedModule, these: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """All values by name, whole."""
    found = {name: whole(x).clone() for name, x in model.state_dict().items()}
    for i, optimizer in enumerate(these):
        for name, p in model.named_parameters():
            for key, x in optimizer.state.get(p, {}).items():
                found[f"{i} {name} {key}"] = whole(x).clone() if isinstance(x, Tensor) else x
    return found


def first_half(folder: str, text: str, device: str, name: str, options: dict[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """What is stored after two steps, and the losses of the next three."""
    torch.manual_seed(7)
    model = network(text, device, **options)
    these = optimizers(model, name)
    train(model, these, range(2))
    before = everything(model, these)
    foldcc.save(folder, model, these, step=2, position={"sample": 16})
    return before, train(model, these, range(2, 5))


def second_half(folder: str, text: str, device: str, name: str, options: dict[str, Any]) -> tuple[dict[str, Any], list[float]]:
    model = network(text, device, seed=1, **options)
    these = optimizers(model, name)
    torch.manual_seed(8)
    if name == "adamw":
        train(model, these, range(1))  # an optimizer that has a state of its own
    told = foldcc.load(folder, model, these)
    assert told == {"step": 2, "position": {"sample": 16}}
    if name == "adamw":
        assert [g["lr"] for g in these[0].param_groups] == [0.02, 0.01] and these[0].param_groups[1]["weight_decay"] == 0.0
    return everything(model, these), train(model, these, range(2, 5))


FOLDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one": ("dp=1", "virtual", {}),
    "virtual": ("dp=2,tp=2", "virtual", {"zero": 3}),
    "tp=2": ("tp=2", "cpu", {}),
    "dp=2 zero=3": ("dp=2", "cpu", {"zero": 3}),
    "dp=2,tp=2 zero=1": ("dp=2,tp=2", "cpu", {"zero": 1}),
    "cp=2,tp=2": ("cp=2,tp=2", "cpu", {"zero": 3}),
    "hybrid": ("dp_replicate=2,dp=2", "cpu", {"zero": 3, "recompute": "blocks"}),
    "dp=4 zero=2": ("dp=4", "cpu", {"zero": 2, "hooked": True}),
    "ahead": ("dp=2,cp=2", "cpu", {"zero": 3, "ahead": 1, "recompute": 0.5}),
    "bfloat16": ("dp=2,tp=2", "cpu", {"zero": 3, "precision": foldcc.Precision(compute="bfloat16", reduce="float32")}),
}


def run(fn: Any, fold: str, folder: Path, name: str) -> tuple[dict[str, Any], list[float]]:
    text, device, options = FOLDS[fold]
    if device == "virtual":
        return fn(str(folder), text, device, name, options)  # type: ignore[no-any-return]
    return run_distributed(fn, foldcc.FoldedMesh.parse(text).world_size, str(folder), text, device, name, options)[0]  # type: ignore[no-any-return]


NAMES = list(FOLDS)
PAIRS = [("tp=2", "virtual", "adamw"), ("virtual", "dp=2 zero=3", "muon"), ("ahead", "hybrid", "adamw")]
MORE = [(a, b, name) for name in ("adamw", "muon", "adafactor") for a in NAMES for b in NAMES if (a, b, name) not in PAIRS]


@pytest.mark.parametrize(
    ("before", "after", "name"), [*PAIRS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)], ids=str
)
def test_any_fold_resumes_what_any_fold_stored(before: str, after: str, name: str, tmp_path: Path) -> None:
    stored, losses = run(first_half, before, tmp_path, name)
    loaded, later = run(second_half, after, tmp_path, name)
    assert stored.keys() == loaded.keys()
    for key, x in stored.items():
        assert torch.equal(x, loaded[key]) if isinstance(x, Tensor) else x == loaded[key], key
    if before == after:
        assert losses == later
    if (before == "bfloat16") == (after == "bfloat16"):  # else they compute in other dtypes
        torch.testing.assert_close(losses, later, rtol=0, atol=1e-4 if name == "muon" else 1e-7)  # Muon iterates in bfloat16


def tied_in_stages(folder: str) -> bool:
    """Whether stages read what one process stored, of a weight that two stages hold, and store it for one process."""
    mesh, tied = foldcc.init_folded_mesh("cpu", attention={"pp": 2}), {"tie_word_embeddings": True}
    model = foldcc.parallelize(tiny_model("llama", seed=1, **tied), mesh, example_inputs=token_batch(2))
    optimizer = torch.optim.AdamW(model.parameters())
    told = foldcc.load(folder, model, optimizer)
    same = all(float(s["step"]) == 1 for s in optimizer.state.values())
    foldcc.save(folder, model, optimizer, step=told["step"] + 1)
    return same


def test_pipeline_stages_resume_and_are_resumed(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    plain = tiny_model("llama", **tied)
    model = foldcc.parallelize(plain, "dp=2", example_inputs=token_batch(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(**token_batch(2)).loss.backward()
    optimizer.step()
    foldcc.save(tmp_path, model, optimizer, step=1)
    assert all(run_distributed(tied_in_stages, 2, str(tmp_path)))
    other = foldcc.parallelize(tiny_model("llama", seed=2, **tied), "tp=2", example_inputs=token_batch(2))
    its = torch.optim.AdamW(other.parameters())
    assert foldcc.load(tmp_path, other, its)["step"] == 2
    found = everything(other, [its])
    for key, x in everything(model, [optimizer]).items():
        assert torch.equal(x, found[key]), key


# --- interrupted, and while training goes on ---------------------------------------------------------------------------


def little(value: float = 0.0, size: int = 32) -> foldcc.FoldedModule:
    model = foldcc.parallelize(nn.Linear(size, size), "dp=2", example_inputs=(torch.zeros(2, size),))
    filled(model, value)
    return model


def filled(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


def forever(folder: str, first: int, model: foldcc.FoldedModule, ready: Any) -> None:
    for step in range(first, 1_000_000):
        filled(model, float(step))
        foldcc.save(folder, model, step=step, wait=bool(step % 3))
        ready.set()


def killed(folder: Path, first: int, model: foldcc.FoldedModule, after: float) -> None:
    """Stores checkpoints in another process, which is killed some time after the first of them."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=forever, args=(str(folder), first, model, ready))
    process.start()
    assert process.pid is not None and ready.wait(60)
    time.sleep(after)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_after_a_kill_at_any_moment_the_last_complete_checkpoint_is_loaded(kills: int, tmp_path: Path) -> None:
    model, step, draw = little(size=256), 0, random.Random(0)
    for _ in range(kills):
        killed(tmp_path, step + 1, model, draw.random() / 10)
        found = foldcc.load(tmp_path, model)["step"]
        assert found >= step and all(bool((p == found).all()) for p in model.parameters())
        step = found
    foldcc.save(tmp_path, model, step=step + 1)
    assert not list(tmp_path.glob("*.incomplete"))


def dies(folder: str, after: float) -> None:
    mesh = foldcc.init_folded_mesh("cpu", attention={"dp": 2})
    model = foldcc.parallelize(nn.Linear(256, 256), mesh, example_inputs=(torch.zeros(1, 256),), zero=3)
    filled(model, 1.0)
    foldcc.save(folder, model, step=1)
    if mesh.here == 1:
        threading.Timer(after, os._exit, (1,)).start()
    for step in range(2, 1_000_000):
        filled(model, float(step))
        foldcc.save(folder, model, step=step)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.01, 0.05, 0.1, 0.3])
def test_a_rank_that_dies_in_a_save_leaves_the_last_complete_checkpoint(after: float, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_distributed(dies, 2, str(tmp_path), after, timeout=60)
    model = little(size=256)
    step = foldcc.load(tmp_path, model)["step"]
    assert step >= 1 and all(bool((p == step).all()) for p in model.parameters())


def meanwhile(folder: str) -> list[float]:
    """Trains while threads write; each checkpoint is of the moment in which it was asked for."""
    model = network("dp=2", "cpu", zero=3)
    these = optimizers(model, "adamw")
    wanted, saving = [], None
    for step in range(3):
        train(model, these, range(step, step + 1))
        wanted.append(everything(model, these))
        saving = foldcc.save(folder, model, these, step=step, wait=False)
    assert saving is not None
    train(model, these, range(3, 5))
    assert saving.wait().name == "step-2" and (Path(folder) / LATEST).read_text() == "step-2"
    differ = []
    for step, before in enumerate(wanted):
        foldcc.load(folder, model, these, step=step)
        found = everything(model, these)
        differ += [key for key, x in before.items() if not torch.equal(x, found[key])]
    return differ


def test_what_is_stored_while_training_goes_on_is_of_the_moment_in_which_it_was_asked_for(tmp_path: Path) -> None:
    assert run_distributed(meanwhile, 2, str(tmp_path)) == [[], []]


def test_the_same_step_twice_is_two_checkpoints_and_the_later_one_is_the_last(tmp_path: Path) -> None:
    model = little(1.0)
    first = foldcc.save(tmp_path, model, step=5).wait()
    filled(model, 2.0)
    assert foldcc.save(tmp_path, model, step=5).wait().name == "step-5-2" and first.name == "step-5"
    for step in (None, 5):
        filled(model, 0.0)
        assert foldcc.load(tmp_path, model, step=step) == {"step": 5} and bool((model.weight == 2).all())


# --- what is refused ---------------------------------------------------------------------------------------------------


def remove(folder: Path) -> None:
    next(folder.glob("step-2/*.distcp")).unlink()


def cut(folder: Path) -> None:
    file = next(folder.glob("step-2/*.distcp"))
    os.truncate(file, file.stat().st_size - 1)


def cut_metadata(folder: Path) -> None:
    os.truncate(folder / "step-2" / ".metadata", 100)


def remove_metadata(folder: Path) -> None:
    (folder / "step-2" / ".metadata").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, r"(?s)step-2/__0_0.distcp is missing.*step=, for another checkpoint: step-1"),
        (cut, r"(?s)step-2/__0_0.distcp is cut off: \d+ bytes of \d+"),
        (cut_metadata, r"(?s)step-2/.metadata is cut off.*step-1"),
        (remove_metadata, r"(?s)There is no checkpoint called step-2, which latest names.*there *step-1"),
    ],
)
def test_a_file_that_is_missing_or_cut_off_is_named_before_anything_is_loaded(spoil: Any, message: str, tmp_path: Path) -> None:
    model = little(1.0)
    for step in (1, 2):
        foldcc.save(tmp_path, model, step=step)
    spoil(tmp_path)
    filled(model, 3.0)
    with pytest.raises(foldcc.FoldError, match=message):
        foldcc.load(tmp_path, model)
    assert bool((model.weight == 3).all())
    foldcc.load(tmp_path, model, step=1)
    assert bool((model.weight == 1).all())


def test_what_does_not_fit_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    model = little(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    foldcc.save(tmp_path, model, optimizer, step=3)
    filled(model, 2.0)
    other = foldcc.parallelize(nn.Linear(32, 16, bias=False), "dp=1")
    one_more = nn.Sequential(nn.Linear(32, 32))
    cases: list[tuple[Any, str]] = [
        (lambda: foldcc.load(tmp_path / "none", model), "(?s)There is no checkpoint.*no complete one"),
        (lambda: foldcc.load(tmp_path, model, step=4), "(?s)There is no checkpoint of step 4.*step-3"),
        (
            lambda: foldcc.load(tmp_path, other),
            r"(?s)1 are not the model's, 1 have.*bias.*\[32, 32\] for .* \[16, 32\]",
        ),
        (lambda: foldcc.load(tmp_path, foldcc.parallelize(one_more, "dp=1")), "2 tensors are missing, 2 are not the model's"),
        (lambda: foldcc.load(tmp_path, little().double()), "torch.float32 .* for torch.float64"),
        (lambda: foldcc.load(tmp_path, model, [optimizer, optimizer]), "holds 1 optimizers, and 2 are given"),
        (lambda: foldcc.load(tmp_path, model, torch.optim.SGD(one_more.parameters())), "holds 2 parameters that are not the"),
        (lambda: foldcc.load(tmp_path, one_more), "load takes a folded model, not Sequential"),  # type: ignore[arg-type]
        (lambda: foldcc.save(tmp_path, one_more), "save takes a folded model, not Sequential"),  # type: ignore[arg-type]
    ]
    for call, message in cases:
        with pytest.raises(foldcc.FoldError, match=message):
            call()
    assert bool((model.weight == 2).all())
    foldcc.save(tmp_path, model, torch.optim.SGD([model.weight], lr=0.5), step=4)
    with pytest.raises(foldcc.FoldError, match="(?s)does not hold 1 parameters that SGD holds.*bias"):
        foldcc.load(tmp_path, model, optimizer)
    foldcc.save(tmp_path, model, torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.5), step=5)
    with pytest.raises(foldcc.FoldError, match="Parameters of one group of SGD were in 2 groups"):
        foldcc.load(tmp_path, model, optimizer)
    with torch.device("meta"):
        on_meta = foldcc.parallelize(nn.Linear(32, 32), "dp=1")
    with pytest.raises(foldcc.FoldError, match="(?s)weight is on meta.*to_empty"):
        foldcc.load(tmp_path, on_meta)


def full(folder: str, model: foldcc.FoldedModule, told: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    for wait in (True, False):
        try:
            foldcc.save(folder, model, step=2, wait=wait).wait()
        except foldcc.FoldError as error:
            told.send(str(error))


def test_a_disk_that_fills_or_a_folder_that_cannot_be_written_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    model = little(1.0)
    foldcc.save(tmp_path, model, step=1)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=full, args=(str(tmp_path), model, theirs))
    process.start()
    for _ in range(2):
        assert ours.poll(60)
        said = ours.recv()
        assert "step-2 was not written" in said and "File too large" in said
    process.join()
    assert foldcc.load(tmp_path, model) == {"step": 1}
    (tmp_path / "file").touch()
    with pytest.raises(foldcc.FoldError, match="file cannot be written: File exists"):
        foldcc.save(tmp_path / "file", model)
