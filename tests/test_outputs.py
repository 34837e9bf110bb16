"""What a model returns beside its loss is this rank's samples, divided as they were computed: nobody pays for unread logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_model, token_batch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from versions import joins_blocks

import foldcc
from foldcc.layout import Shard
from foldcc.testing import in_float64, run_distributed

pytest.importorskip("transformers")


def model_of(dtype: torch.dtype = torch.float64) -> nn.Module:
    return tiny_model("mixtral", aux_loss=True, num_hidden_layers=1).to(dtype)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def returned_on_a_rank(text: str) -> dict[str, Any]:
    """What one rank is given of the outputs, and gradients of losses that are made of them outside of the model."""
    mesh = foldcc.FoldedMesh.parse(text, "cpu")
    batch = token_batch(2 * mesh.size("dp"))
    batch = {name: x.chunk(mesh.size("dp"))[mesh.coordinate(dist.get_rank(), "dp")] for name, x in batch.items()}
    model = model_of()
    with in_float64():
        folded = foldcc.parallelize(model, mesh, example_inputs=batch)
        out = folded(**batch)
        found: dict[str, Any] = {
            "divided": [isinstance(x, DTensor) for x in (out.loss, out.logits, *out.router_logits)],
            "local": out.logits.to_local().shape,
            "logits": out.logits.full_tensor().detach(),
            "router_logits": whole(out.router_logits[0]).detach(),
        }
        for name, loss in {
            "loss": lambda out: out.loss,
            "of others": lambda out: _objective(*map(whole, (out.logits, out.router_logits[0], out.logits.square().sum()))),
        }.items():
            folded.zero_grad()
            loss(folded(**batch)).backward()
            found[name] = {n: whole(p.grad) for n, p in folded.named_parameters() if p.grad is not None}
        with torch.no_grad():
            found["no_grad"] = folded(**batch).logits.full_tensor()
    return found if dist.get_rank() in (0, mesh.world_size - 1) else {}


def _objective(logits: Tensor, router: Tensor, squares: Tensor) -> Tensor:
    """A loss that reads two outputs whole, and a number that is made of the parts of one."""
    weights = [torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view_as(x[0]) for x in (logits, router)]
    return (logits.log_softmax(-1) * weights[0]).sum() + (router.square() * weights[1]).sum() + squares


class OnlyLoss(nn.Module):
    """A model that returns its loss and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=input_ids, labels=labels).loss
        return loss


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.bfloat16])
def test_what_is_returned_beside_the_loss_is_not_gathered(dtype: torch.dtype) -> None:
    mesh, batch = foldcc.FoldedMesh.parse("dp=2,tp=2|ep=4"), token_batch(4)
    folded, alone = (foldcc.parallelize(m, mesh, example_inputs=batch) for m in (model_of(dtype), OnlyLoss(model_of(dtype))))
    moved = [
        sorted((c.operator, c.axes, c.direction, c.bytes) for c in m.collectives() if not c.operator.startswith("all_reduce"))
        for m in (folded, alone)
    ]  # reductions of the loss's few numbers may stand elsewhere
    assert moved[0] == moved[1]
    layouts = [node.meta["layout"] for node in folded.stages["shard"].program.output.all_input_nodes]
    assert any(isinstance(x.states["tp"], Shard) and x.dims[x.states["tp"].dim][0].name.startswith("vocab") for x in layouts)
    assert folded(**batch).logits.shape == (4, 16, 128)  # all ranks are here, and so are all parts


@joins_blocks
@pytest.mark.parametrize("text", ["dp=2,tp=2|ep=4"])
def test_outputs_on_processes_are_this_ranks_samples_and_differentiable(text: str) -> None:
    mesh = foldcc.FoldedMesh.parse(text)
    ranks = run_distributed(returned_on_a_rank, mesh.world_size, text, timeout=400)
    model, batch, dp = model_of(), token_batch(2 * mesh.size("dp")), mesh.size("dp")
    model.config._experts_implementation = "eager"  # it shares no code with the folded program
    with in_float64():
        wanted = model(**batch)
        for rank, found in enumerate(ranks):
            if not found:
                continue
            position = mesh.coordinate(rank, "dp")
            assert found["divided"] == [False, True, True]
            assert found["local"] == (2, 16, 128 // mesh.size("tp"))
            torch.testing.assert_close(found["logits"], wanted.logits.chunk(dp)[position], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(found["no_grad"], found["logits"], rtol=0, atol=0)
            routed = wanted.router_logits[0].chunk(dp)[position]
            torch.testing.assert_close(found["router_logits"], routed, rtol=1e-10, atol=1e-12)
        for name, loss in {
            "loss": lambda out: out.loss,
            "of others": lambda out: sum(
                _objective(x, y, x.square().sum())
                for x, y in zip(out.logits.chunk(dp), out.router_logits[0].chunk(dp), strict=True)
            ),
        }.items():
            model.zero_grad()
            loss(model(**batch)).backward()
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            for found in filter(None, ranks):
                assert found[name].keys() == gradients.keys()
                for n, gradient in gradients.items():
                    torch.testing.assert_close(found[name][n], gradient, rtol=1e-9, atol=1e-11, msg=f"{name}: {n}")
