"""Parameters in a narrower dtype than the router train as in one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import MixtralConfig, MixtralForCausalLM

import foldcc
from foldcc.testing import run_distributed
from foldcc.testing.equivalence import relative_error
from tests.models import tiny_model, token_batch

BATCH = token_batch(4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_router_weights_keep_their_own_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        use_cache=False,
    )
    config._experts_implementation = "eager"
    plain = MixtralForCausalLM(config).to(dtype)
    ids = torch.randint(0, 64, (4, 8))
    want = plain(input_ids=ids, labels=ids).loss
    want.backward()
    gradients = {n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}
    plain.zero_grad()
    mesh = foldcc.FoldedMesh.parse("dp=2,tp=2|ep=4", device_type="virtual")
    model = foldcc.parallelize(plain, mesh, example_inputs={"input_ids": ids, "labels": ids})
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, want, rtol=4 * eps if dtype != torch.float64 else 1e-6, atol=0)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        error = (p.grad.double() - gradients[name].double()).norm() / gradients[name].double().norm()
        assert error < (16 * eps if dtype != torch.float64 else 1e-5), name


def gradients_of(model: torch.nn.Module, dtype: torch.dtype, *, inside: bool) -> tuple[dict[str, torch.Tensor], Any]:
    """Of a step whose forward, and whose backward if `inside`, is under autocast; with what the model returns."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        out = model(**BATCH)
        if inside:
            out.loss.backward()
    if not inside:
        out.loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, out


@pytest.mark.parametrize(("family", "dtype"), [("mixtral", torch.bfloat16), ("gpt_oss", torch.float16)], ids=str)
def test_autocast_around_the_call_casts_what_it_casts_in_one_process(family: str, dtype: torch.dtype) -> None:
    plain = tiny_model(family, num_hidden_layers=1)
    model = foldcc.parallelize(copy.deepcopy(plain), "dp=2,tp=2|ep=4", example_inputs=BATCH)
    plain.config._experts_implementation = "eager"
    exact = plain(**BATCH)
    wanted, out = gradients_of(plain, dtype, inside=False)
    largest = float(torch.stack([g.norm() for g in wanted.values()]).max())
    for inside in (False, True):
        found, ours = gradients_of(model, dtype, inside=inside)
        assert ours.logits.dtype == out.logits.dtype and ours.loss.dtype == out.loss.dtype
        assert 0 < relative_error(ours.logits, exact.logits) < 2 * relative_error(out.logits, exact.logits)
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            assert gradient.dtype == wanted[name].dtype
            assert relative_error(gradient, wanted[name], 0.1 * largest) < 16 * torch.finfo(dtype).eps, name
    plainly = model(**BATCH)
    assert plainly.logits.dtype == torch.float32 and relative_error(plainly.logits, exact.logits) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_experts_in_one_process_are_under_autocast_what_folded_ones_are(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weights, up = torch.randn(12, 8), torch.rand(12, 2), torch.randn(4, 8, 8).requires_grad_()
    ids = torch.stack([torch.arange(12) % 4, torch.arange(1, 13) % 4], 1)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y = foldcc.ops.experts(x, ids, weights, up, up, activation_fn=torch.tanh)
        return y, torch.autograd.grad(y.square().mean(), up)[0]

    exact = step()
    with torch.autocast("cpu", dtype):
        narrow = step()
    for found, wanted in zip(narrow, exact, strict=True):
        assert found.dtype == torch.float32 and 0 < relative_error(found, wanted) < 8 * torch.finfo(dtype).eps


def both_on_processes(wanted: dict[str, torch.Tensor]) -> None:
    mesh = foldcc.FoldedMesh.parse("dp=2|ep=2", device_type="cpu")
    own = {name: x.chunk(2)[dist.get_rank()] for name, x in BATCH.items()}
    model = foldcc.parallelize(tiny_model("mixtral", num_hidden_layers=1), mesh, example_inputs=own)
    model(**own).loss.backward()
    for p in model.parameters():
        p.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**own).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32 and relative_error(p.grad.full_tensor(), wanted[name]) < 0.05, name


def test_autocast_finds_experts_where_they_are_held() -> None:
    plain = tiny_model("mixtral", num_hidden_layers=1)
    plain.config._experts_implementation = "eager"
    run_distributed(both_on_processes, 2, gradients_of(plain, torch.bfloat16, inside=False)[0])


@pytest.mark.parametrize(("family", "dtype"), [("deepseek_v3", torch.bfloat16)], ids=str)
def test_narrow_parameters_are_as_near_to_the_truth_as_in_one_process(family: str, dtype: torch.dtype) -> None:
    def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        model(**BATCH).loss.backward()
        return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}

    plain = tiny_model(family, num_hidden_layers=2).to(dtype)
    model = foldcc.parallelize(copy.deepcopy(plain), "tp=2|ep=2", example_inputs=BATCH)
    plain.config._experts_implementation = "eager"
    exact, one, folded = (gradients(m) for m in (copy.deepcopy(plain).double(), plain, model))
    least = 0.1 * max(float(g.norm()) for g in exact.values())
    assert folded.keys() == one.keys()
    ours, theirs = (max(relative_error(x[n], exact[n], least) for n in x) for x in (folded, one))
    assert ours < 2 * theirs, (ours, theirs)


def test_kernels_multiply_narrow_numbers_in_the_interpreter() -> None:
    plain = tiny_model("mixtral", num_hidden_layers=1).to(torch.bfloat16)
    batch = token_batch(2, 8)
    with torch.no_grad():
        found = foldcc.parallelize(copy.deepcopy(plain), "dp=1", kernels="triton", example_inputs=batch)(**batch).logits
        plain.config._experts_implementation = "eager"
        wanted, exact = plain(**batch).logits, copy.deepcopy(plain).double()(**batch).logits
    assert relative_error(found, exact) < 2 * relative_error(wanted, exact)
