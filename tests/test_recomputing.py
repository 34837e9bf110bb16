"""Policies of what is computed again: the same gradients, bit for bit, of fewer bytes, and nothing is sent twice."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import foldcc
from foldcc import FoldError
from foldcc.passes.recompute import POLICIES, _size
from foldcc.testing import run_distributed
from tests.models import tiny_model, token_batch

BATCH = token_batch(4)
MESH = "dp=2,tp=2|ep=4"


@cache
def folded(policy: str | float | None, **options: Any) -> foldcc.FoldedModule:
    model = tiny_model("mixtral", num_hidden_layers=1, aux_loss=True)
    return foldcc.parallelize(model, MESH, example_inputs=BATCH, recompute=policy, **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(**BATCH).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def kept(model: foldcc.FoldedModule) -> int:
    """Bytes that blocks keep beside parameters, each distinct block once."""
    blocks = model.stages["differentiate"].program.blocks
    there = {name: {n.name: n for n in block.graph.nodes} for name, block in blocks.items()}
    return sum(_size(there[name][n] for n in names) for name, names in model.plan.kept.items() if name in there)


@pytest.mark.parametrize("policy", [*POLICIES[1:], 0.6])
def test_gradients_are_the_same_bit_for_bit_and_nothing_is_sent_twice(policy: str | float) -> None:
    plain, found = folded("none"), folded(policy)
    wanted = gradients(plain)
    for name, gradient in gradients(found).items():
        assert torch.equal(gradient, wanted[name]), name
    assert found.collectives().bytes() == plain.collectives().bytes()
    if policy == "blocks":
        assert foldcc.verify(found, rounds=1).ok


def test_less_is_kept_the_more_may_be_computed_again() -> None:
    bytes_of = {policy: kept(folded(policy)) for policy in ("none", "selective", 0.6, "blocks")}
    assert list(bytes_of.values()) == sorted(bytes_of.values(), reverse=True)
    assert bytes_of["blocks"] < 0.55 * bytes_of["none"] and bytes_of[0.6] <= 0.6 * bytes_of["none"]
    assert folded(0.6).summary().flops_ratio < folded("blocks").summary().flops_ratio


def test_what_is_computed_again_is_no_copy(recwarn: pytest.WarningsRecorder) -> None:
    model = foldcc.parallelize(tiny_model("llama", num_hidden_layers=1), "dp=2,tp=2", example_inputs=BATCH, recompute="blocks")
    found = model.summary()
    assert found.flops_ratio > 1.1 and found.copies == pytest.approx(1) and not found.replicated
    assert "computed again in the backward pass" in str(found)
    assert not [w for w in recwarn if "several ranks compute the same" in str(w.message)]


def test_choices_of_experts_are_made_once() -> None:
    model = folded("blocks")
    again = [n for block in model.program.backward.children() for n in block.graph.nodes if n.meta.get("again")]
    assert any("scaled_dot_product" in str(n.target) for n in again) and any(
        n.target is torch.ops.aten.mm.default for n in again
    )
    assert not any(word in str(n.target) for n in again for word in ("topk", "argsort", "all_", "reduce_scatter", "splits"))


def test_the_share_that_has_to_be_kept_is_said() -> None:
    with pytest.raises(
        FoldError, match=r"recompute=0.01 would keep \d+ of \d+ bytes, and \d+ are needed.\n.*valid   0\.\d+ or more"
    ):
        folded(0.01)


@pytest.mark.parametrize("policy", ["all", 2, 1.5, 0.0, True])
def test_what_is_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(FoldError, match="is no policy.\n  valid   none, kernels, selective, blocks, or the share"):
        foldcc.parallelize(nn.Linear(2, 2), "dp=2", example_inputs=(torch.zeros(2, 2),), recompute=policy)


def test_gradient_checkpointing_of_transformers_is_the_policy_blocks() -> None:
    plain = tiny_model("llama", num_hidden_layers=2)
    usual = foldcc.parallelize(copy.deepcopy(plain), "dp=2", example_inputs=BATCH)
    plain.gradient_checkpointing_enable()
    plain.train()
    model = foldcc.parallelize(plain, "dp=2", example_inputs=BATCH)
    assert kept(model) < 0.6 * kept(usual)
    wanted = gradients(usual)
    assert all(torch.equal(gradient, wanted[n]) for n, gradient in gradients(model).items())
    assert kept(foldcc.parallelize(plain, "dp=2", example_inputs=BATCH, recompute="none")) == kept(usual)


def test_with_kernels_and_parameters_that_are_stored_divided() -> None:
    model = folded("blocks", kernels="triton", zero=3)
    wanted = gradients(folded("none", zero=3))
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, wanted[name], atol=1e-5), name


def test_a_plan_says_what_is_kept_or_recompute_does() -> None:
    text = str(folded("selective").plan)
    assert folded(None, plan=text).plan.kept == folded("selective").plan.kept
    with pytest.raises(FoldError, match="says what is kept, and recompute= would choose it"):
        folded("blocks", plan=text)


def on_processes(wanted: dict[str, Tensor]) -> None:
    mesh = foldcc.FoldedMesh.parse("dp=2|ep=2", device_type="cpu")
    own = {name: x.chunk(2)[mesh.coordinate(dist.get_rank(), "dp")] for name, x in BATCH.items()}
    model = foldcc.parallelize(
        tiny_model("mixtral", num_hidden_layers=1, aux_loss=True), mesh, example_inputs=own, recompute=0.6, zero=3
    )
    model(**own).loss.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad.full_tensor(), wanted[name], atol=1e-5), name


def test_on_processes() -> None:
    run_distributed(on_processes, 2, gradients(folded("none")))
