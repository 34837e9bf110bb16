"""Pipeline stages and micro-batches: the losses, gradients and steps of one process that accumulates over micro-batches."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.nn.functional as F
from models import tiny_model, token_batch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import foldcc
from foldcc.errors import FoldError
from foldcc.testing import in_float64, run_distributed
from foldcc.testing.equivalence import relative_error

Batch = dict[str, Tensor]


def micro_batches(batch: Batch, ranks: int, count: int) -> list[Batch]:
    """Of the samples of each data-parallel rank, as many parts; the first parts of all ranks together, and so on."""
    rows = [torch.cat([x.chunk(count)[i] for x in torch.arange(len(batch["labels"])).chunk(ranks)]) for i in range(count)]
    return [{name: x[at] for name, x in batch.items()} for at in rows]


def accumulated(model: nn.Module, batch: Batch, ranks: int, count: int) -> float:
    """One process that accumulates: the mean over all labels, and of router losses the mean over micro-batches."""
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    valid = int((batch["labels"][:, 1:] != -100).sum())
    total = 0.0
    for part in micro_batches(batch, ranks, count):
        out = model(**part)
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), part["labels"][:, 1:].flatten(), reduction="sum") / valid
        if getattr(out, "aux_loss", None) is not None:
            loss = loss + model.config.router_aux_loss_coef * out.aux_loss / count
        loss.backward()
        total += float(loss.detach())
    return total


def tiny(family: str, *, layers: int = 2, **changes: Any) -> nn.Module:
    return tiny_model(family, aux_loss=family == "mixtral", num_hidden_layers=layers, **changes).double()


def rows_of_routers(out: Any) -> tuple[Tensor, ...]:
    return getattr(out, "router_logits", None) or ()


CASES = [
    ("llama", "pp=3,dp=2", 4, "1f1b", {"tie_word_embeddings": True}, {"zero": 1}),
    ("mixtral", "pp=2,dp=2|ep=2", 2, "gpipe", {}, {"zero": 3}),
    ("llama", "pp=2,dp=2", 4, "1f1b", {"layers": 4, "tie_word_embeddings": True}, {"stages_per_rank": 2}),
    ("llama", "pp=3,dp=2", 4, "zero-bubble", {"tie_word_embeddings": True}, {"zero": 1}),
    ("mixtral", "pp=2,dp=2|ep=2", 4, "zbv", {"layers": 4}, {"stages_per_rank": 2, "zero": 3}),
    pytest.param(
        "llama",
        "pp=2",
        4,
        "dualpipev",
        {"layers": 4, "tie_word_embeddings": True},
        {"stages_per_rank": 2, "recompute": 0.5},
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "mixtral",
        "pp=2,dp=2|ep=2",
        4,
        "zero-bubble",
        {"layers": 4},
        {"stages_per_rank": 2, "zero": 3, "recompute": "blocks"},
        marks=pytest.mark.slow,
    ),
    pytest.param("deepseek_v3", "pp=2,dp=2|ep=2", 4, "zero-bubble", {"layers": 3}, {}, marks=pytest.mark.slow),
    pytest.param("llama", "pp=2,cp=2", 4, "zero-bubble", {"layers": 3}, {"kernels": "triton"}, marks=pytest.mark.slow),
    pytest.param("mixtral", "pp=2,dp=2|ep=2", 4, "gpipe", {"layers": 4}, {"stages_per_rank": 2}, marks=pytest.mark.slow),
    pytest.param(
        "mixtral", "pp=2,tp=2|ep=2", 4, "1f1b", {"layers": 6}, {"stages_per_rank": 3, "zero": 3}, marks=pytest.mark.slow
    ),
    pytest.param("llama", "dp=2", 2, "1f1b", {}, {"recompute": "blocks"}, marks=pytest.mark.slow),
    pytest.param("llama", "pp=2,cp=2", 4, "gpipe", {"layers": 3}, {"kernels": "triton"}, marks=pytest.mark.slow),
    pytest.param("mixtral", "pp=4,dp=2,tp=2|ep=4", 4, "1f1b", {"layers": 4}, {"zero": 3}, marks=pytest.mark.slow),
    pytest.param("mixtral", "pp=2,tp=2|etp=2", 8, "1f1b", {}, {"recompute": 0.5}, marks=pytest.mark.slow),
    pytest.param("deepseek_v3", "pp=2,dp=2|ep=2", 4, "1f1b", {"layers": 3}, {}, marks=pytest.mark.slow),
    pytest.param("gpt_oss", "pp=2,dp=2|ep=2", 2, "gpipe", {"layers": 4}, {"zero": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "mesh", "count", "schedule", "changes", "options"), CASES)
def test_a_step_is_that_of_one_process_that_accumulates(
    family: str, mesh: str, count: int, schedule: str, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    plain, batch = tiny(family, **changes), token_batch(8, 8)
    ranks = foldcc.FoldedMesh.parse(mesh).size("dp")
    with in_float64():
        model = foldcc.parallelize(
            copy.deepcopy(plain), mesh, example_inputs=batch, micro_batches=count, schedule=schedule, **options
        )
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (plain, model)]
        for _ in range(2):
            wanted = accumulated(plain, batch, ranks, count)
            for p in plain.parameters():
                p.grad *= 2
            out = model(**batch)
            (2 * out.loss).backward()
            assert abs(out.loss.item() - wanted) < 1e-10
            with torch.no_grad():
                whole_batch = plain(**batch)
            for x, y in zip(
                (out.logits, *rows_of_routers(out)), (whole_batch.logits, *rows_of_routers(whole_batch)), strict=True
            ):
                assert relative_error(x, y) < 1e-10
            for name, p in plain.named_parameters():
                assert relative_error(model.get_parameter(name).grad, p.grad) < 1e-10, name
            norms = [torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0), foldcc.clip_grad_norm_(model.parameters(), 1.0)]
            assert relative_error(norms[1], norms[0]) < 1e-10
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


def test_the_program_and_the_schedule_are_proved() -> None:
    model = foldcc.parallelize(
        tiny("llama").float(), "pp=2,dp=2", example_inputs=token_batch(8, 8), micro_batches=4, schedule="1f1b", verify=True
    )
    assert model.proof.ok and model.proof.proved[-1] == (
        "the schedule of 2 stages and 4 micro-batches, of which they hold at most 2, 1 at a time"
    )
    again = foldcc.parallelize(
        tiny("llama").float(), "pp=2,dp=2", example_inputs=token_batch(8, 8), micro_batches=4, plan=str(model.plan)
    )
    assert again.plan == model.plan and foldcc.verify(model, rounds=1, reduced=True).ok


def test_summary_counts_places_and_micro_batches() -> None:
    batch, cut = token_batch(8, 8), {"micro_batches": 4, "schedule": "1f1b", "verify": False}
    folded = [
        foldcc.parallelize(tiny("llama", layers=4).float(), mesh, example_inputs=batch, **options)
        for mesh, options in (("dp=2", {}), ("pp=2,dp=2", cut), ("pp=2,dp=2", {**cut, "stages_per_rank": 2}))
    ]
    whole, once, turns = (model.summary() for model in folded)
    assert whole.pipeline is None and [p.stages for p in turns.pipeline.places] == [(0, 2), (1, 3)]
    for found in (once, turns):
        places = found.pipeline.places
        assert sum(p.flops for p in places) == whole.flops_per_rank and max(p.flops for p in places) == found.flops_per_rank
        assert sum(p.parameters for p in places) == whole.parameters_per_rank  # nothing is tied
        assert found.flops_ratio == whole.flops_ratio and found.ranks == 4
        for text in ("4 micro-batches, 1f1b", f"ranks wait {found.pipeline.waits:.1%}", "the rank that holds most"):
            assert text in str(found)
    assert (once.pipeline.waits, turns.pipeline.waits) == (pytest.approx(1 / 5), pytest.approx(1 / 9))
    assert turns.memory.kept > once.memory.kept
    plain = tiny("llama", layers=4).float()
    halved, zero3 = (
        foldcc.parallelize(plain, "pp=2,dp=2", example_inputs=batch, zero=zero, **{**cut, "schedule": "zero-bubble"})
        for zero in (0, 3)
    )
    assert halved.memory()[3, "none"] == zero3.summary().memory
    both = halved.summary()
    assert both.pipeline.waits == pytest.approx(1 / 13) and both.memory.kept > once.memory.kept
    assert [p.flops for p in both.pipeline.places] == [p.flops for p in once.pipeline.places]  # nothing is computed twice


def test_other_shapes_evaluation_and_accumulation() -> None:
    plain, batch, longer = tiny("llama"), token_batch(4, 8), token_batch(4, 12, seed=1)
    with in_float64():
        model = foldcc.parallelize(copy.deepcopy(plain), "pp=2", example_inputs=batch, micro_batches=4, verify=False)
        for x in (batch, longer):
            accumulated(plain, x, 1, 4)
            loss = model(**x).loss
            loss.backward(retain_graph=True)
            accumulated(plain, x, 1, 4)
            loss.backward()
        for name, p in plain.named_parameters():
            assert relative_error(model.get_parameter(name).grad, p.grad) < 1e-10, name
        with torch.no_grad():
            found, wanted = model.eval()(**batch), plain.eval()(**batch)
        assert relative_error(found.loss, wanted.loss) < 1e-10 and relative_error(found.logits, wanted.logits) < 1e-10
    with in_float64():
        for m in (plain.train(), model.train()):
            m.zero_grad()
            m.get_input_embeddings().weight.requires_grad_(False)  # no two layers are alike then
        model(**batch).loss.backward()
        accumulated(plain, batch, 1, 4)
    for name, p in plain.named_parameters():
        gradient = model.get_parameter(name).grad
        assert (gradient is p.grad is None) or relative_error(gradient, p.grad) < 1e-10, name
    stages = [model.plan.stages[name] for name in ("model.embed_tokens.weight", "lm_head.weight")]
    assert stages == [(0,), (1,)]


def test_a_loss_of_ones_own() -> None:
    plain, batch = tiny("llama"), token_batch(4, 8)
    ids = {"input_ids": batch["input_ids"]}
    with in_float64():
        model = foldcc.parallelize(copy.deepcopy(plain), "pp=2", example_inputs=ids, micro_batches=2, verify=False)
        for m in (plain, model):
            m(**ids).logits.square().mean().backward()
    for name, p in plain.named_parameters():
        assert relative_error(model.get_parameter(name).grad, p.grad) < 1e-10, name


def test_dropout_draws_as_one_process_that_accumulates() -> None:
    """The first micro-batch draws first."""
    batch = token_batch(4, 8)
    losses = []
    for mesh in ("pp=2", "dp=1"):
        model = foldcc.parallelize(
            tiny("llama", attention_dropout=0.5), mesh, example_inputs=batch, micro_batches=2, verify=False
        )
        torch.manual_seed(3)
        losses.append(model(**batch).loss)
    assert torch.equal(*losses)


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).mean()


def test_in_16_bits_gradients_add_up_over_micro_batches_in_32() -> None:
    """In bfloat16 there is nothing between 16 and 16.125, to which each of 15 terms adds 0.0625."""
    x = torch.tensor([256.0] + [1.0] * 15, dtype=torch.bfloat16)
    model = foldcc.parallelize(Weighted().bfloat16(), "dp=1", example_inputs=(x,), micro_batches=16, verify=False)
    model(x).backward()
    assert model.weight.grad.dtype == torch.bfloat16 and model.weight.grad.item() == 17.0


# --- on processes ---


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def train(schedule: str, zero: int, each: int, count: int, folder: str) -> dict[str, Any]:
    """Two steps on real stages, and a checkpoint after them."""
    mesh = foldcc.FoldedMesh.parse("pp=2,dp=2|ep=2", "cpu")
    batch = {name: x.chunk(2)[mesh.coordinate(dist.get_rank(), "dp")] for name, x in token_batch(8, 8).items()}
    plain = tiny("mixtral", tie_word_embeddings=True, layers=2 * each)
    with in_float64():
        model = foldcc.parallelize(
            plain,
            mesh,
            example_inputs=batch,
            micro_batches=count,
            schedule=schedule,
            stages_per_rank=each,
            zero=zero,
            verify=False,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found: dict[str, Any] = {"losses": [], "norms": []}
        for _ in range(2):
            out = model(**batch)
            out.loss.backward()
            found["losses"].append(out.loss.item())
            found.setdefault("gradients", {n: whole(p.grad) for n, p in model.named_parameters()})
            found["norms"].append(foldcc.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            logits = model(**batch).logits
        found["logits"] = None if logits.is_meta else whole(logits)
        found["shape"] = tuple(logits.shape)
        state = model.state_dict()
        checkpoint.save(state, checkpoint_id=folder)
        found["weights"] = {n: whole(p) for n, p in model.named_parameters()}
        for p in model.parameters():
            p.data.zero_()
        checkpoint.load(state, checkpoint_id=folder)
        model.load_state_dict(state)
        assert all(torch.equal(whole(p), found["weights"][n]) for n, p in model.named_parameters())
        model.load_state_dict(tiny("mixtral", tie_word_embeddings=True, layers=2 * each, seed=1).state_dict())
    return found


@pytest.mark.parametrize(
    ("schedule", "zero", "each", "count"),
    [
        ("zero-bubble", 1, 2, 2),
        pytest.param("1f1b", 1, 2, 2, marks=pytest.mark.slow),
        pytest.param("zbv", 3, 2, 4, marks=pytest.mark.slow),
        pytest.param("dualpipev", 1, 2, 4, marks=pytest.mark.slow),
        *(pytest.param(s, 3, 1, 2, marks=pytest.mark.slow) for s in ("gpipe", "1f1b", "zero-bubble")),
    ],
)
def test_ranks_train_as_one_process_that_accumulates_and_hold_what_their_stages_use(
    schedule: str, zero: int, each: int, count: int
) -> None:
    plain, batch = tiny("mixtral", tie_word_embeddings=True, layers=2 * each), token_batch(8, 8)
    optimizer, losses, norms, gradients = torch.optim.AdamW(plain.parameters(), lr=1e-2), [], [], {}
    with in_float64():
        for _ in range(2):
            losses.append(accumulated(plain, batch, 2, count))
            gradients = gradients or {n: p.grad.clone() for n, p in plain.named_parameters()}
            norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            logits = plain(**batch).logits
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_distributed(train, 4, schedule, zero, each, count, folder, timeout=600)
        stored = {n: torch.empty_like(p) for n, p in plain.state_dict().items()}
        checkpoint.load(stored, checkpoint_id=folder, no_dist=True)
    last_place = (0, 1) if schedule in ("zbv", "dualpipev") else (2, 3)
    for rank, found in enumerate(ranks):
        assert found["losses"] == pytest.approx(losses, rel=1e-10) and found["norms"] == pytest.approx(norms, rel=1e-10)
        for name, gradient in found["gradients"].items():
            assert relative_error(gradient, gradients[name]) < 1e-10, f"{name} on rank {rank}"
        assert found["shape"] == (4, 8, 128) and (found["logits"] is None) == (rank not in last_place)
    assert relative_error(torch.cat([ranks[r]["logits"] for r in last_place]), logits) < 1e-7
    first, last = (set(ranks[r]["gradients"]) for r in (0, 2))
    # In a V, the first and the last stage are on one rank, and the two in the middle on the other.
    shared = set() if schedule in ("zbv", "dualpipev") else {"model.embed_tokens.weight"}
    assert first & last == shared and first | last == set(gradients)
    for name, p in plain.named_parameters():
        assert relative_error(stored[name], p) < 1e-7, name


# --- what cannot be ---


class Masked(nn.Module):
    """A mean over the rows that a mask says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def rows(self, x: Tensor) -> Tensor:
        rows: Tensor = self.second(self.first(x).relu()).square().mean(-1)
        return rows

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return (self.rows(x) * mask).sum() / mask.sum()


class Of(Masked):
    """Any loss of rows, their mask and a number."""

    def __init__(self, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, mask: Tensor, items: Any = 3) -> Any:
        return self.loss(self.rows(x), mask, items)


class Two(Masked):
    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return super().forward(x, mask), self.rows(x)


class Rows(Masked):
    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.rows(x)


MASKED = {"x": torch.ones(4, 8), "mask": torch.tensor([1, 1, 0, 1])}


def fold(model: nn.Module, mesh: str = "dp=1", count: int = 2, more: Batch | None = None, **options: Any) -> Any:
    inputs = {**MASKED, **(more or {})}
    return foldcc.parallelize(model, mesh, example_inputs=inputs, micro_batches=count, **options)


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        (Masked(), {"mesh": "pp=9"}, r"(?s)9 pipeline stages of 1 blocks.*stages_per_rank: 1 to 1"),
        (Masked(), {"mesh": "pp=3", "schedule": "1f1b"}, "1f1b fills 3 stages with 3 micro-batches at least, and there are 2"),
        (Masked(), {"mesh": "pp=3", "schedule": "zero-bubble"}, "zero-bubble fills 3 stages with 3 micro-batches at least"),
        (
            Masked(),
            {"mesh": "pp=2", "schedule": "zbv", "stages_per_rank": 2},
            "(?s)zbv fills 4 stages with 3 micro-batches at least, and there are 2.*micro_batches=3 or more",
        ),
        (
            Masked(),
            {"mesh": "pp=2", "schedule": "dualpipev", "stages_per_rank": 2, "count": 3},
            "dualpipev fills 4 stages with 4 micro-batches at least, and there are 3",
        ),
        (Masked(), {"mesh": "pp=2", "schedule": "zbv"}, "(?s)zbv goes down and up again.*stages_per_rank=1.*zero-bubble"),
        (Masked(), {"count": 3}, r"4 samples of a rank do not divide over micro_batches=3 \(4 = 1 \* 3 \+ 1\)"),
        (Masked(), {"count": 0}, "micro_batches=0"),
        (Masked(), {"stages_per_rank": 0}, "stages_per_rank=0 is no number of stages"),
        (Masked(), {"stages_per_rank": 2}, "stages_per_rank=2 with pp=1: one rank has nobody to take turns with"),
        (
            Masked(),
            {"mesh": "pp=2", "count": 3, "schedule": "1f1b", "stages_per_rank": 2},
            r"(?s)3 micro-batches do not divide over pp=2 \(3 = 1 \* 2 \+ 1\).*multiples of 2",
        ),
        (Masked(), {"schedule": "zb"}, "(?s)no schedule 'zb'.*gpipe, 1f1b"),
        (Masked(), {"schedule": "1f1b", "precision": foldcc.Precision(compute="float16")}, "too small in float16"),
        (Of(lambda rows, mask, _: (rows * mask).max()), {}, "(?s)does not add up over micro-batches.*aten.max"),
        (Of(lambda rows, mask, _: (rows * mask).sum().exp()), {}, "(?s)does not add up over micro-batches.*aten.exp"),
        (Of(lambda rows, mask, _: rows.sum() + 1), {}, "(?s)does not add up over micro-batches.*aten.add"),
        (Of(lambda rows, mask, _: rows.sum() / mask.float().mean()), {}, "(?s)does not add up over micro-batches.*aten.div"),
        (Of(lambda rows, mask, _: rows.sum() / torch.full((1,), rows.shape[0])), {}, "(?s)does not add up.*aten.div"),
        (Of(lambda rows, mask, _: rows.sum() / rows.new_full((1,), rows.shape[0])), {}, "(?s)does not add up.*aten.div"),
        (Of(lambda rows, mask, _: rows.mean() * torch.tensor(float(rows.shape[0]))), {}, "(?s)does not add up.*aten.mul"),
        (Of(lambda rows, mask, _: rows.sum() / torch.ones(rows.shape[0]).sum()), {}, "(?s)does not add up.*aten.div"),
        (Of(lambda rows, mask, _: mask.sum() / rows.mean()), {}, "(?s)does not add up over micro-batches.*aten.div"),
        (
            Of(lambda rows, mask, _: ((rows * mask).sum(), mask.sum())),
            {},
            "Output 1 .*whole numbers of micro-batches have no mean",
        ),
        (Rows(), {"schedule": "1f1b"}, "goes back from output 0"),
    ],
)
def test_what_micro_batches_cannot_do_is_refused_with_the_arithmetic(
    model: nn.Module, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(FoldError, match=sentence):
        fold(model, **options)


LOSSES: dict[str, Callable[..., Any]] = {
    "a mean over what counts": lambda rows, mask, _: (rows * mask).sum() / mask.sum(),
    "a count that is bounded": lambda rows, mask, _: (rows * mask).sum() / mask.sum().clamp(min=1),
    "a function of a count": lambda rows, mask, _: (rows * mask).sum() * mask.sum().add(1).rsqrt(),
    "a mean": lambda rows, mask, _: rows.mean() / 4,
    "a sum": lambda rows, mask, _: (rows * mask).sum() * 0.5,
    "a sum over a number that happens to be the count": lambda rows, mask, _: rows.sum() / 2,
    "a sum over the size": lambda rows, mask, _: rows.sum() / rows.numel(),
    "a sum over one of its sizes": lambda rows, mask, _: rows.sum() / rows.shape[0],
    "a mean times the size": lambda rows, mask, _: rows.mean() * rows.shape[0],
    "a sum over a tensor of the model's own": lambda rows, mask, _: rows.sum() / torch.tensor(7.0),
    "a sum over a tensor of its size": lambda rows, mask, _: rows.sum() / rows.new_full((), rows.shape[0]),
    "a sum over tensors like samples": lambda rows, mask, _: (
        rows.sum() * rows.new_full((1,), 0.25) / torch.full((), rows.shape[0])
    ).sum(),
    "a sum over an input": lambda rows, mask, items: (rows * mask).sum() / items,
    "a sum and a mean": lambda rows, mask, _: (rows * mask).sum() / mask.sum() - 0.1 * rows.mean(),
    "a mean and a sum": lambda rows, mask, items: rows.mean() + (rows * mask).sum() / items,
    "a sum of samples that is a vector": lambda rows, mask, _: (
        rows.mean(),
        (rows[:, None] * mask[:, None]).expand(-1, 3).sum(0),
    ),
    "a smoothed mean over labels that count": lambda rows, mask, _: F.cross_entropy(
        torch.stack([rows, 2 * rows], 1), mask, ignore_index=0, label_smoothing=0.1
    ),
    "a weighted mean over labels": lambda rows, mask, _: F.cross_entropy(
        torch.stack([rows, 2 * rows], 1), mask, weight=rows.new_tensor([0.3, 2.0])
    ),
    "what is returned twice": lambda rows, mask, _: (rows.mean() + rows.sum(), rows.mean()),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_in_micro_batches_is_that_of_the_call(loss: str) -> None:
    """Of two samples or of one, on two ranks or on one; the loss and all gradients are those of the original, called once."""
    plain = Of(LOSSES[loss]).double()
    given = {"x": torch.randn(4, 8).double(), "mask": torch.tensor([1, 1, 0, 1])}
    items = {"items": torch.tensor(7)} if "input" in loss else {}
    for mesh, count in (("dp=1", 2), ("dp=1", 4), ("dp=2", 2)):
        model = foldcc.parallelize(copy.deepcopy(plain), mesh, example_inputs={**given, **items}, micro_batches=count)
        for again in (given, {name: x.flip(0) for name, x in given.items()}):
            gradients = []
            for m in (plain, model):
                m.zero_grad()
                out = m(**again, **items)
                found = sum(x.sum() for x in out) if isinstance(out, tuple) else out
                found.backward()
                gradients.append((out, [p.grad for p in m.parameters()]))
            torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


def test_a_number_is_of_the_whole_call_and_is_compiled_over() -> None:
    plain = Of(LOSSES["a sum over an input"])
    model = fold(copy.deepcopy(plain), more={"items": 3})
    for items in (3, 5, 7, 11):
        torch.testing.assert_close(model(**MASKED, items=items), plain(**MASKED, items=items))
    assert len(model.programs) == 1


def test_a_number_of_items_beside_a_routers_loss_and_one_sample_a_micro_batch() -> None:
    plain, batch = tiny("mixtral"), token_batch(2, 8)
    batch["attention_mask"] = torch.ones(2, 8, dtype=torch.int64)
    batch["attention_mask"][1, 5:] = 0
    plain.config._experts_implementation = "eager"
    with in_float64(), torch.no_grad():
        given = {**batch, "num_items_in_batch": 31}
        model = foldcc.parallelize(copy.deepcopy(plain), "pp=2", example_inputs=given, micro_batches=2)
        for items in (31, 37, 41):
            loss, router = model(**batch, num_items_in_batch=items)[:2]
            whole = plain(**batch, num_items_in_batch=items)
            routers = sum(plain(**{n: x[i : i + 1] for n, x in batch.items()}).aux_loss for i in range(2)) / 2
            assert abs(router - routers) < 1e-12
            assert abs(loss - whole.loss - plain.config.router_aux_loss_coef * (routers - whole.aux_loss)) < 1e-12
    assert len(model.programs) == 1


def test_what_a_model_in_micro_batches_cannot_do_is_refused_when_it_is_asked() -> None:
    model = fold(Two(), schedule="1f1b")
    with pytest.raises(FoldError, match="went back from output 0 inside the call"):
        model(**MASKED)[1].sum().backward()
    with pytest.raises(FoldError, match="Gradients of gradients"):
        torch.autograd.grad(model(**MASKED)[0], model.first.weight, create_graph=True)


def test_counts_of_floats_and_micro_batches_of_one_sample() -> None:
    plain = Two()
    given = {"x": torch.randn(4, 8), "mask": torch.tensor([1.0, 0.5, 0.0, 0.0])}
    model = fold(copy.deepcopy(plain), count=4, more=given)
    for loss, rows in (model(**given), plain(**given)):
        (loss + rows.sum()).backward()
    torch.testing.assert_close(model(**given), plain(**given))
    assert model(**given)[1].shape == (4,)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, p.grad)
