"""Context parallelism: ranks of cp divide the sequence, and each query attends to what it attends to in one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import foldcc
from foldcc import FoldError
from foldcc.testing import in_float64, run_distributed
from foldcc.testing.equivalence import relative_error
from tests.models import FAMILIES, WITH_AUX_LOSS, FusedAttention, tiny_model, token_batch

BATCH = token_batch(4)


def gradients(model: nn.Module, **batch: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(
    family: str, mesh: str, batch: dict[str, Tensor], *, zero: int = 0, attention: str | None = None, **changes: Any
) -> foldcc.FoldedModule:
    plain = tiny_model(family, aux_loss=family in WITH_AUX_LOSS, **changes).double()
    with in_float64():
        model = foldcc.parallelize(
            copy.deepcopy(plain), mesh, example_inputs=batch, zero=zero, attention=attention, verify=True
        )
        assert not model.proof.impossible and model.summary().flops_ratio < 1.01
        if hasattr(plain.config, "_experts_implementation"):
            plain.config._experts_implementation = "eager"
        wanted = gradients(plain, **batch)
        for name, gradient in gradients(model, **batch).items():
            assert relative_error(gradient, wanted[name]) < 1e-10, name
    return model


@pytest.mark.parametrize(
    ("family", "mesh", "zero"),
    [("mixtral", "dp=2,cp=2|ep=4", 3), ("gpt_oss", "cp=2,tp=2|ep=2,etp=2", 0), ("llama", "cp=4", 1)],
)
def test_gradients_are_those_of_one_process(family: str, mesh: str, zero: int) -> None:
    compare(family, mesh, BATCH, zero=zero, num_hidden_layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp=2,cp=2,tp=2|ep=8", "cp=4,tp=2|ep=8", "dp=2,cp=3|ep=6"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family_are_those_of_one_process(family: str, mesh: str) -> None:
    many = {"num_local_experts": 24} if family in ("mixtral", "gpt_oss") else {}
    if family not in ("llama", "qwen3"):
        many = many or {"n_routed_experts" if family == "deepseek_v3" else "num_experts": 24}
    compare(family, mesh, token_batch(4, 24), **many)


def test_padding_evaluation_bf16_and_another_length() -> None:
    plain = tiny_model("mixtral", num_hidden_layers=1)
    model = foldcc.parallelize(copy.deepcopy(plain), "dp=2,cp=2|ep=2")
    for length in (16, 24):
        batch = token_batch(4, length)
        mask = torch.ones_like(batch["input_ids"])
        mask[1, -5:] = mask[2, :3] = 0
        batch = {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}
        with torch.no_grad():
            assert torch.allclose(model(**batch).loss, plain(**batch).loss, atol=1e-6)
        wanted = gradients(plain, **batch)
        for name, gradient in gradients(model, **batch).items():
            assert relative_error(gradient, wanted[name]) < 1e-5, name
    narrow = foldcc.parallelize(copy.deepcopy(plain).bfloat16(), "dp=2,cp=2|ep=2", example_inputs=BATCH)
    usual = foldcc.parallelize(copy.deepcopy(plain).bfloat16(), "dp=2|ep=2", example_inputs=BATCH)
    wanted = gradients(usual, **BATCH)
    for name, gradient in gradients(narrow, **BATCH).items():
        assert relative_error(gradient.float(), wanted[name].float()) < 0.05, name


def test_attention_that_looks_both_ways_needs_no_mask() -> None:
    x = torch.randn(2, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = FusedAttention(causal=False).double()
    model = foldcc.parallelize(copy.deepcopy(plain), "cp=3", example_inputs=(x,), verify=True)
    for m in (plain, model):
        m(x).backward()
    for name, p in plain.named_parameters():
        assert relative_error(model.get_parameter(name).grad, p.grad) < 1e-10, name
    assert "where" not in str(model.stages["bucket"].block("block0"))


class Positions(nn.Module):
    """Learned positions, one for each that an input has, and a norm of groups that sees the whole sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions, self.linear = nn.Parameter(torch.randn(1, 8, 16)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x + self.positions)
        return torch.nn.functional.group_norm(y.transpose(1, 2), 4).square().mean() + y.sum() / 100


@pytest.mark.parametrize("mesh", ["cp=2", "dp=2,cp=2,tp=2"])
def test_positions_that_are_parameters_are_divided_with_the_sequence(mesh: str) -> None:
    x = torch.randn(4, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = Positions().double()
    model = foldcc.parallelize(copy.deepcopy(plain), mesh, example_inputs=(x,), verify=True, zero=3)
    for m in (plain, model):
        m(x).backward()
    for name, p in plain.named_parameters():
        assert relative_error(model.get_parameter(name).grad, p.grad) < 1e-10, name


def test_what_cp_does_not_divide_is_refused() -> None:
    with pytest.raises(FoldError, match=r"16 positions do not divide over cp=3 \(16 = 5 \* 3 \+ 1\)"):
        foldcc.parallelize(tiny_model("llama", num_hidden_layers=1), "cp=3", example_inputs=BATCH)
    with pytest.raises(FoldError, match="No input has a sequence that cp=2 could divide"):
        foldcc.parallelize(nn.Linear(8, 8), "cp=2", example_inputs=(torch.zeros(4, 8),))


def on_processes(wanted: dict[str, Tensor], logits: Tensor) -> None:
    mesh = foldcc.FoldedMesh.parse("dp=2,cp=2|ep=4", device_type="cpu")
    own = {name: x.chunk(2)[mesh.coordinate(dist.get_rank(), "dp")] for name, x in BATCH.items()}
    with in_float64():
        model = foldcc.parallelize(
            tiny_model("mixtral", num_hidden_layers=1, aux_loss=True).double(), mesh, example_inputs=own, zero=2
        )
        result = model(**own)
        assert isinstance(result.logits, DTensor)
        mine = logits.chunk(2)[mesh.coordinate(dist.get_rank(), "dp")]
        assert relative_error(result.logits.full_tensor(), mine) < 1e-10
        result.loss.backward()
        for name, p in model.named_parameters():
            assert relative_error(p.grad.full_tensor(), wanted[name]) < 1e-10, name


def test_on_processes() -> None:
    with in_float64():
        plain = tiny_model("mixtral", num_hidden_layers=1, aux_loss=True).double()
        plain.config._experts_implementation = "eager"
        logits = plain(**BATCH).logits.detach()
        run_distributed(on_processes, 4, gradients(plain, **BATCH), logits)
