"""What is done to a model whose stages are on real ranks: to parameters that a rank holds, and to those that it does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_model, token_batch
from test_pipelines import accumulated, tiny, whole
from torch import Tensor, nn

import foldcc
from foldcc.errors import FoldError
from foldcc.testing import in_float64, run_distributed
from foldcc.testing.equivalence import relative_error

PHASES = ("layers", "layers.1", "")  # what is trained, by a part of its name: also nothing that the first stage holds


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return tiny_model("llama", tie_word_embeddings=True, pad_token_id=3)


def initialised() -> dict[str, Tensor]:
    """The weights that this rank holds; it has computed with them."""
    model = foldcc.parallelize(
        on_meta(), foldcc.FoldedMesh.parse("pp=2", "cpu"), example_inputs=token_batch(4, 8), micro_batches=2, verify=False
    ).to_empty(device="cpu")
    foldcc.init_parameters(model, 3)
    assert torch.isfinite(model(**token_batch(4, 8)).loss) and len(model.programs) == 1
    return {n: whole(p) for n, p in model.named_parameters()}


def test_stages_initialise_what_they_hold() -> None:
    virtual = foldcc.parallelize(on_meta(), "dp=1", example_inputs=token_batch(4, 8), verify=False).to_empty(device="cpu")
    assert virtual.lm_head.weight is virtual.model.embed_tokens.weight
    foldcc.init_parameters(virtual, 3)
    wanted, ranks = dict(virtual.named_parameters()), run_distributed(initialised, 2)
    assert ranks[0].keys() & ranks[1].keys() == {"model.embed_tokens.weight"}
    assert ranks[0].keys() | ranks[1].keys() == wanted.keys()
    for found in ranks:
        for name, x in found.items():
            assert torch.equal(x, wanted[name]), name


def changed() -> list[dict[str, Any]]:
    """Losses and gradients while parameters are frozen, unfrozen and cast behind parallelize."""
    mesh, batch, found = foldcc.FoldedMesh.parse("pp=2", "cpu"), token_batch(4, 8), []
    plain = tiny("llama", tie_word_embeddings=True)
    with in_float64():
        model = foldcc.parallelize(plain, mesh, example_inputs=batch, micro_batches=2, schedule="1f1b", verify=False)
        called: list[str] = []
        for name, p in model.named_parameters():
            p.register_post_accumulate_grad_hook(lambda _, name=name: called.append(name))
        for part in PHASES:
            called.clear()
            for name, p in model.named_parameters():
                p.requires_grad_(part in name)
            loss = model(**batch).loss
            loss.backward()
            gradients = {n: p.grad if p.grad is None else whole(p.grad) for n, p in model.named_parameters()}
            assert sorted(called) == sorted(n for n, g in gradients.items() if g is not None)
            found.append({"loss": loss.item(), "gradients": gradients})
            model.zero_grad()
    del loss  # its graph holds parameters, which PyTorch then does not cast in place
    if dist.get_rank() == 0:
        model.get_input_embeddings().weight.requires_grad_(False)
    with pytest.raises(FoldError, match="Ranks 0 and 1 hold .*embed_tokens.weight, and have done different things"):
        model(**batch)
    model.requires_grad_(True).bfloat16()
    found.append({"loss": model(**batch).loss.item()})
    trusting = foldcc.parallelize(
        tiny("llama"), mesh, example_inputs=batch, micro_batches=2, check_ranks=False, verify=False
    ).requires_grad_(False)
    with pytest.raises(FoldError, match="(?s)was frozen, unfrozen or cast, and other.*check_ranks=True"):
        trusting(**batch)
    with pytest.raises(FoldError, match="(?s)decided by the first program.*example_inputs"):
        foldcc.parallelize(nn.Linear(4, 4), mesh)
    return found


def test_parameters_are_frozen_unfrozen_and_cast_behind_parallelize() -> None:
    plain, batch, ranks = tiny("llama", tie_word_embeddings=True), token_batch(4, 8), run_distributed(changed, 2)
    for i, part in enumerate(PHASES):
        plain.zero_grad()
        for name, p in plain.named_parameters():
            p.requires_grad_(part in name)
        with in_float64():
            wanted = accumulated(plain, batch, 1, 2)
        for found in (rank[i] for rank in ranks):
            assert found["loss"] == pytest.approx(wanted, rel=1e-10)
            for name, gradient in found["gradients"].items():
                other = plain.get_parameter(name).grad
                assert (gradient is other is None) or relative_error(gradient, other) < 1e-10, (part, name)
    cast = copy.deepcopy(plain).bfloat16()(**batch).loss.item()
    for rank in ranks:
        assert rank[-1]["loss"] == pytest.approx(cast, rel=1e-2)


BATCHES = [token_batch(4, length, seed=length) for length in (8, 12)]


def with_options() -> dict[str, Any]:
    """Losses, gradients and evaluations in bfloat16, with blocks computed again; and losses with dropout."""
    mesh, found = foldcc.FoldedMesh.parse("pp=2", "cpu"), []
    model = foldcc.parallelize(
        tiny_model("llama"),
        mesh,
        example_inputs=BATCHES[0],
        micro_batches=2,
        schedule="1f1b",
        precision=foldcc.Precision(compute="bfloat16", reduce="float32"),
        recompute="blocks",
        verify=False,
    )
    for batch in BATCHES:
        loss = model.train()(**batch).loss
        loss.backward()
        with torch.no_grad():
            evaluated = model.eval()(**batch).loss.item()
        found.append((loss.item(), evaluated, {n: whole(p.grad) for n, p in model.named_parameters()}))
        model.zero_grad()
    return {"steps": found, "dropped": dropped(mesh)}


def dropped(mesh: Any) -> list[float]:
    plain = tiny_model("llama", attention_dropout=0.5)
    model = foldcc.parallelize(plain, mesh, example_inputs=BATCHES[0], micro_batches=2, recompute="blocks", verify=False)
    torch.manual_seed(3)
    return [model(**BATCHES[0]).loss.item() for _ in range(2)]


@pytest.mark.slow
def test_ranks_compute_in_bfloat16_again_and_with_dropout_as_one_process() -> None:
    ranks, plain, draws = run_distributed(with_options, 2), tiny_model("llama"), dropped("dp=1")
    assert draws[0] != draws[1]
    for i, batch in enumerate(BATCHES):
        plain.zero_grad()
        wanted = accumulated(plain, batch, 1, 2)
        for loss, evaluated, gradients in (rank["steps"][i] for rank in ranks):
            assert loss == pytest.approx(wanted, rel=1e-2) and evaluated == pytest.approx(wanted, rel=1e-2)
            for name, gradient in gradients.items():
                assert gradient.dtype == torch.float32
                assert relative_error(gradient, plain.get_parameter(name).grad) < 5e-2, name
    for rank in ranks:
        assert rank["dropped"] == pytest.approx(draws, rel=1e-5)
