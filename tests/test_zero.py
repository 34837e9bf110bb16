"""ZeRO: parameters that ranks hold divided train as whole ones do, and nobody keeps them whole between two passes."""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

import foldcc
from foldcc import FoldError
from foldcc.testing import check_equivalence, in_float64, run_distributed
from foldcc.testing.equivalence import relative_error
from tests.models import FAMILIES, FusedAttention, tiny_model, token_batch
from tests.versions import joins_blocks

MESHES = ["dp=2,tp=2|ep=4", "dp=4|ep=2", "dp=3,tp=2|ep=2"]
HSDP = "dp_replicate=2,dp=2,tp=2|ep=4"


class Mlp(nn.Module):
    """Sizes that two ranks divide, and a bias of 7 that they do not."""

    def __init__(self, out: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).square().mean()


X = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    result = model(*args, **kwargs)
    (result if isinstance(result, Tensor) else result.loss).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(family: str, mesh: str, zero: int, **options: Any) -> foldcc.FoldedModule:
    aux = {"aux_loss": True} if family in ("mixtral", "gpt_oss") else {}
    batch = token_batch(6 if "dp=3" in mesh else 4)
    plain = tiny_model(family, **aux, **options).double()
    with in_float64():
        model = foldcc.parallelize(copy.deepcopy(plain), mesh, example_inputs=batch, zero=zero, verify=True)
        assert model.proof.ok and not model.proof.impossible
        if hasattr(plain.config, "_experts_implementation"):
            plain.config._experts_implementation = "eager"
        wanted = gradients(plain, **batch)
        for _ in range(2):
            for name, gradient in gradients(model, **batch).items():
                assert relative_error(gradient, wanted[name]) < 1e-10, name
    return model


@pytest.mark.parametrize(
    ("family", "mesh", "zero"),
    [
        ("mixtral", MESHES[0], 3),
        ("deepseek_v3", MESHES[1], 2),
        ("llama", MESHES[2], 3),
        ("qwen3", "dp=2,cp=2,tp=2", 1),
        ("llama", HSDP, 3),
    ],
)
def test_gradients_are_those_of_one_process(family: str, mesh: str, zero: int) -> None:
    compare(family, mesh, zero)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("mesh", [*MESHES, HSDP])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family_are_those_of_one_process(family: str, mesh: str, zero: int) -> None:
    compare(family, mesh, zero)


def test_a_rank_holds_its_part_of_all_there_is() -> None:
    model = foldcc.parallelize(Mlp(), "dp=4", example_inputs=(X,), zero=2)
    told = {name: str(layout) for name, layout in model.plan.stored.items()}
    assert told.keys() == dict(model.named_parameters()).keys() and all("@dp" in text for text in told.values())
    assert model.summary().parameters_per_rank == (8 * 32 + 32 + 32 * 7) // 4 + 2  # of a bias of 7


def test_dp_and_cp_share_what_neither_divides_where_it_is_used() -> None:
    model = compare("llama", "dp=2,cp=2", 3, num_hidden_layers=1)
    assert str(model.plan.stored["lm_head.weight"]) == "[vocab2@(dp,cp), hidden]"
    assert model.summary().parameters_per_rank < 0.26 * model.summary().parameters_total


@pytest.mark.parametrize("zero", [2, 3])
def test_what_is_kept_between_the_passes(zero: int) -> None:
    model = foldcc.parallelize(Mlp(), "dp=4", example_inputs=(X,), zero=zero)
    whole = {tuple(p.shape) for p in model.parameters() if p.dim() == 2} | {
        tuple(p.t().shape) for p in model.parameters() if p.dim() == 2
    }
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        model(X)
    assert any(shape in whole for shape in saved) == (zero == 2)
    times = {n: sum(c.calls for c in model.collectives() if c.operator == n) for n in ("all_gather", "reduce_scatter")}
    assert times["reduce_scatter"] > 0 and times["all_gather"] > 0


def test_what_is_sent_over_dp() -> None:
    sent: dict[int, Counter[tuple[str, str]]] = {}
    for zero in (0, 2, 3):
        model = foldcc.parallelize(Mlp(8), "dp=4", example_inputs=(X,), zero=zero)
        sent[zero] = Counter()
        for c in model.collectives():
            sent[zero][c.operator, c.direction] += c.bytes
    share = 3 / 4 * 4 * (8 * 32 + 32 + 32 * 8 + 8)  # of what ranks do not hold themselves
    loss = sent[0]["all_reduce", "forward"]
    gathered, again, scattered = ("all_gather", "forward"), ("all_gather", "backward"), ("reduce_scatter", "backward")
    assert sent[0] == {("all_reduce", "forward"): loss, ("all_reduce", "backward"): 2 * share}
    assert sent[2] == {("all_reduce", "forward"): loss, gathered: share, scattered: share}
    assert sent[3] == {**sent[2], again: share}


def test_evaluation_autocast_frozen_weights_and_another_shape() -> None:
    plain = Mlp()
    plain.down.bias.requires_grad_(False)
    model = foldcc.parallelize(copy.deepcopy(plain), "dp=2,tp=2", zero=3)
    with torch.no_grad():
        assert torch.allclose(model(X), plain(X))
    for x in (X, torch.cat([X, X])):
        found, wanted = gradients(model, x), gradients(plain, x)
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[n], wanted[n], atol=1e-6) for n in wanted)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = gradients(model, X), gradients(plain, X)
    assert all(relative_error(found[n], wanted[n]) < 0.02 for n in wanted)
    assert len(model.programs) == 4


def test_frozen_weights_that_two_blocks_read_are_gathered_again_too() -> None:
    plain = tiny_model("llama", num_hidden_layers=3, tie_word_embeddings=True)
    plain.get_input_embeddings().requires_grad_(False)
    model = foldcc.parallelize(copy.deepcopy(plain), "dp=2,tp=2", example_inputs=token_batch(4), zero=3, verify=True)
    assert foldcc.verify(model, reduced=True, rounds=1).ok
    wanted, found = gradients(plain, **token_batch(4)), gradients(model, **token_batch(4))
    assert found.keys() == wanted.keys() and all(relative_error(found[n], wanted[n]) < 1e-5 for n in wanted)


def test_bf16() -> None:
    model = tiny_model("mixtral", num_hidden_layers=1).bfloat16()
    narrow, whole = (foldcc.parallelize(copy.deepcopy(model), MESHES[0], example_inputs=token_batch(4), zero=z) for z in (3, 0))
    wanted, found = gradients(whole, **token_batch(4)), gradients(narrow, **token_batch(4))
    assert all(relative_error(found[n].float(), wanted[n].float()) < 0.05 for n in wanted)


HYBRID = """
plan dp=2,cp=2 · zero=3
stored
  up.weight    [w, hidden@cp] I(dp)
  up.bias      [w@cp] I(dp)
  down.weight  [hidden@cp, w] I(dp)
  down.bias    [hidden@cp] I(dp)
"""


def test_a_plan_stores_over_one_axis_and_adds_what_a_rank_has_of_gradients_over_the_other() -> None:
    x = X.reshape(4, 2, 8)
    folded = foldcc.parallelize(Mlp(8), "dp=2,cp=2", example_inputs=(x,), plan=HYBRID)
    found, wanted = gradients(folded, x), gradients(Mlp(8), x)
    assert all(torch.allclose(found[n], wanted[n], atol=1e-6) for n in wanted)
    sent = {(c.operator, c.axes, c.direction): (c.calls, c.bytes) for c in folded.collectives()}
    half = 4 * (8 * 32 + 32 + 32 * 8 + 8) / 2
    assert sent.pop(("all_reduce", ("dp", "cp"), "forward"))  # the loss
    assert sent == {
        ("all_gather", ("cp",), "forward"): (1, half),
        ("all_gather", ("cp",), "backward"): (1, half),
        ("reduce_scatter", ("cp",), "backward"): (1, half),
        ("all_reduce", ("dp",), "backward"): (1, half),
    }


def test_dp_stores_and_dp_replicate_adds() -> None:
    folded = foldcc.parallelize(Mlp(8), "dp_replicate=2,dp=2", example_inputs=(X,), zero=3)
    assert {axes for layout in folded.plan.stored.values() for axes in layout.axes("V")} == {"dp"}
    sent = {(c.operator, c.axes, c.direction): c.bytes for c in folded.collectives()}
    half = 4 * (8 * 32 + 32 + 32 * 8 + 8) / 2
    assert sent.pop(("all_reduce", ("dp_replicate", "dp"), "forward"))  # the loss
    assert sent == {
        ("all_gather", ("dp",), "forward"): half,
        ("all_gather", ("dp",), "backward"): half,
        ("reduce_scatter", ("dp",), "backward"): half,
        ("all_reduce", ("dp_replicate",), "backward"): half,
    }


def test_a_plan_keeps_some_experts_whole_beside_others_that_are_divided() -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    plan = f"plan dp=4|ep=2 · zero=3\nstored\n  {name} [experts@ep, hidden, width] I(edp)"
    model = tiny_model("mixtral", num_hidden_layers=1)
    check_equivalence(model, "dp=4|ep=2", kwargs=token_batch(4), plan=plan)
    folded = foldcc.parallelize(model, "dp=4|ep=2", example_inputs=token_batch(4), plan=plan, verify=False)
    assert [n for n, x in folded.plan.stored.items() if "edp" not in str(x).partition("I")[0] and "experts" in n] == [name]
    again = foldcc.parallelize(model, "dp=4|ep=2", example_inputs=token_batch(4), plan=str(folded.plan), verify=False)
    assert again.plan == folded.plan


@pytest.mark.parametrize("zero", [4, True, 3.0])
def test_a_stage_that_there_is_not(zero: Any) -> None:
    with pytest.raises(FoldError, match=f"zero={zero} is no stage"):
        foldcc.parallelize(Mlp(), "dp=2", example_inputs=(X,), zero=zero)


def fused_on_processes() -> None:
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(dist.get_rank() // 2))
    mesh = foldcc.FoldedMesh.parse("dp=2,tp=2", device_type="cpu")
    model = foldcc.parallelize(FusedAttention(causal=True), mesh, example_inputs=(x,), zero=1)
    for name, p in FusedAttention(causal=True).named_parameters():
        assert torch.equal(model.get_parameter(name).full_tensor(), p), name
    other = foldcc.FoldedMesh.parse("tp=4", device_type="cpu")
    whole = foldcc.parallelize(FusedAttention(causal=True), other, example_inputs=(x,), check_ranks=False)
    with pytest.raises(FoldError, match="is a DTensor on .*, and the parameter is on"):
        whole.load_state_dict(model.state_dict())


def test_what_tp_cuts_in_blocks_is_put_together_as_it_was() -> None:
    run_distributed(fused_on_processes, 4)


def stepped(model: nn.Module, x: Tensor, optimizer: Any) -> list[float]:
    """The norms of the gradients of two steps, by the largest element and by all; in the second, gradients have waited."""
    found = []
    for waits in (False, True):
        optimizer.zero_grad()
        with model.no_sync() if waits and isinstance(model, foldcc.FoldedModule) else contextlib.nullcontext():
            model(x).backward()
        if waits:
            model(x).backward()
        norms = [foldcc.clip_grad_norm_(model.parameters(), 0.05, p) for p in (math.inf, 2.0)]
        optimizer.step()
        found += [float(norm) for norm in norms]
    return found


def uneven_on_processes(text: str, out: int, parts: list[int], folder: str) -> None:
    mesh = foldcc.FoldedMesh.parse(text, device_type="cpu")
    dp = mesh.data_parallel
    x, plain = X[: 2 * dp].double(), Mlp(out).double()
    own = x.chunk(dp)[mesh.index(dist.get_rank(), mesh.samples)]
    model = foldcc.parallelize(Mlp(out).double(), mesh, example_inputs=(own,), zero=3)
    optimizer, usual = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, plain))
    assert stepped(model, own, optimizer) == pytest.approx(stepped(plain, x, usual), rel=1e-9)
    with in_float64():  # instead of the bfloat16 of Muon's iteration
        for m in (model, plain):
            torch.optim.Muon([m.up.weight, m.down.weight], lr=0.1).step()
    for name, p in model.named_parameters():
        assert relative_error(p.full_tensor(), plain.get_parameter(name)) < 1e-9, name
    held = model.down.bias.to_local().numel()
    assert held == parts[dist.get_rank()]
    state, moments = get_state_dict(model, optimizer)
    checkpoint.save({"model": state, "optimizer": moments}, checkpoint_id=folder)
    other = foldcc.parallelize(Mlp(out).double(), mesh, example_inputs=(own,), check_ranks=False)
    second = torch.optim.AdamW(other.parameters(), lr=0.1)
    state, moments = get_state_dict(other, second)
    checkpoint.load({"model": state, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(other, second, model_state_dict=state, optim_state_dict=moments)
    assert stepped(other, own, second) == pytest.approx(stepped(plain, x, usual), rel=1e-9)
    for m in (model, other):
        foldcc.init_parameters(m, seed=1)
    for name, p in other.named_parameters():
        assert torch.equal(whole(p), whole(model.get_parameter(name))), name


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


@pytest.mark.parametrize(
    ("text", "out", "parts"),
    [
        ("dp=3", 4, [2, 2, 0]),
        ("dp_replicate=2,dp=2", 7, [4, 3, 4, 3]),
        pytest.param("dp=4", 5, [2, 2, 1, 0], marks=pytest.mark.slow),
        pytest.param("dp=2,tp=2", 7, [4, 4, 3, 3], marks=[joins_blocks, pytest.mark.slow]),
    ],
)
def test_parts_that_differ_train_are_made_orthogonal_as_a_whole_and_are_stored_and_loaded(
    text: str, out: int, parts: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_distributed(uneven_on_processes, len(parts), text, out, parts, folder)


def trained(model: nn.Module, batch: dict[str, Tensor], steps: int = 3, optimizer: Any = None) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        norm = foldcc.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses += [loss.item(), float(norm)]
    return losses


def on_processes(text: str, folder: str, wanted: list[float]) -> None:
    mesh = foldcc.FoldedMesh.parse(text, device_type="cpu")
    place = mesh.index(dist.get_rank(), mesh.samples)
    own = {name: x.chunk(mesh.data_parallel)[place] for name, x in token_batch(4).items()}
    with in_float64():
        model = foldcc.parallelize(
            tiny_model("mixtral", num_hidden_layers=1, aux_loss=True).double(), mesh, example_inputs=own, zero=3
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = trained(model, own, 3, optimizer)
        assert found == pytest.approx(wanted[:6], rel=1e-9)
        held = sum(p.to_local().numel() for p in model.parameters())
        moments = sum(s["exp_avg"].to_local().numel() for s in optimizer.state.values())
        whole = sum(p.numel() for p in model.parameters())
        replicas = mesh.size("dp_replicate")
        assert held == moments == model.summary().parameters_per_rank < 1.2 * replicas / mesh.world_size * whole
        state, moments = get_state_dict(model, optimizer)
        checkpoint.save({"model": state, "optimizer": moments}, checkpoint_id=folder)
        other = foldcc.parallelize(
            tiny_model("mixtral", num_hidden_layers=1, aux_loss=True, seed=1).double(), mesh, example_inputs=own
        )
        second = torch.optim.AdamW(other.parameters(), lr=1e-2)
        state, moments = get_state_dict(other, second)
        checkpoint.load({"model": state, "optimizer": moments}, checkpoint_id=folder)
        set_state_dict(other, second, model_state_dict=state, optim_state_dict=moments)
        for name, p in get_model_state_dict(model).items():
            there = get_model_state_dict(other)[name]
            assert torch.equal(p.full_tensor(), there.full_tensor() if isinstance(there, DTensor) else there), name
        assert trained(other, own, 1, second) == pytest.approx(wanted[6:], rel=1e-9)


@pytest.mark.parametrize("mesh", ["dp=2", *(pytest.param(x, marks=pytest.mark.slow) for x in (MESHES[0], HSDP))])
def test_training_on_processes_and_a_checkpoint_that_another_storage_resumes(mesh: str) -> None:
    with in_float64():
        plain = tiny_model("mixtral", num_hidden_layers=1, aux_loss=True).double()
        plain.config._experts_implementation = "eager"
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
        wanted = trained(plain, token_batch(4), 4, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        run_distributed(on_processes, foldcc.FoldedMesh.parse(mesh).world_size, mesh, folder, wanted)
    assert math.isfinite(sum(wanted))
