"""Optimizers step on a folded model as on the original, on processes; what they reduce is complete when they get it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_model, token_batch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer
from torch.torch_version import TorchVersion
from versions import joins_blocks

import foldcc
from foldcc.runtime.checkpoint import watch_optimizers
from foldcc.runtime.reductions import REDUCTIONS
from foldcc.testing import in_float64, run_distributed
from foldcc.testing.equivalence import relative_error

aten = torch.ops.aten
ARGUMENTS: dict[Any, tuple[Any, ...]] = {
    aten.sum.dim_IntList: ([-1],),
    aten.mean.dim: ([-1],),
    aten.prod.dim_int: (-1,),
    aten.amax.default: ([-1],),
    aten.amin.default: ([-1],),
    aten.norm.Scalar: (2,),
    aten.norm.ScalarOpt_dim: (2, [-1]),
    aten.linalg_vector_norm.default: (2, [-1], True),
}


def in_place() -> tuple[dict[str, float], list[str]]:
    """How far the root, in place, of each reduction is from one process; and what stays terms on meshes of no folded model."""
    x = torch.rand(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    mesh, others = (init_device_mesh("cpu", shape) for shape in ((2,), (2, 1)))
    watch_optimizers(mesh)
    off, terms = {}, []
    for op in REDUCTIONS:

        def reduced(x: Tensor, op: Any = op) -> Tensor:
            found: Tensor = op(x, *ARGUMENTS.get(op, ()))
            return found

        found = reduced(distribute_tensor(x, mesh, [Shard(1)])).sqrt_()
        off[str(op)] = (found.full_tensor() - reduced(x).sqrt_()).abs().max().item()
        left = reduced(distribute_tensor(x, others, [Shard(1), Replicate()]))
        assert isinstance(left, DTensor)
        if any(p.is_partial() for p in left.placements):
            terms.append(str(op))
    return off, terms


def test_a_reduction_of_a_folded_tensor_can_be_changed_in_place_and_those_of_others_are_left_alone():
    for off, terms in run_distributed(in_place, 2):
        assert len(off) == len(REDUCTIONS) and max(off.values()) < 1e-12, off
        assert len(terms) == len(REDUCTIONS)


def _decayed(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


class Stacks(Optimizer):
    """Muon, with another iteration, for stacks of matrices: each is made orthogonal as a whole."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            x = p.grad / torch.linalg.vector_norm(p.grad, dim=(-2, -1), keepdim=True)
            for _ in range(4):
                x = 1.5 * x - 0.5 * x @ x.mT @ x
            p.sub_(x, alpha=0.05)


class Orthogonal(Optimizer):
    """PyTorch's Muon for matrices, and `Stacks` for stacks of them."""

    def __init__(self, model: nn.Module) -> None:
        of = {dims: [p for p in model.parameters() if p.ndim == dims] for dims in (2, 3)}
        super().__init__([*of[2], *of[3]], {})
        self.both = (Muon(of[2], lr=0.05), Stacks(of[3]))

    def step(self, closure: Any = None) -> None:
        for optimizer in self.both:
            optimizer.step()


# Before PyTorch 2.13 DTensor has no rule for what this does.
FOREACH = {"foreach": True} if TorchVersion(torch.__version__) >= (2, 13) else {}
MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "Adafactor": lambda m: Adafactor(_decayed(m), lr=0.05),
    "Adafactor maximizes": lambda m: Adafactor(_decayed(m), lr=0.05, maximize=True, **FOREACH),
    "SGD": lambda m: SGD(_decayed(m), lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "AdamW fused": lambda m: AdamW(_decayed(m), lr=0.01, fused=True, amsgrad=True),
}
ALIKE = ("k_proj.weight", "v_proj.weight", "lm_head.weight", "layernorm.weight")  # others of their layouts are trained


def after_steps(text: str, makers: tuple[str, ...] = tuple(MAKERS), zero: int = 0) -> dict[str, float]:
    """The largest distance of a weight from one process after two steps of each optimizer, beside the largest weight."""
    # Every expert is chosen by some token. Without one, its row of the router has a gradient that is rounding, and optimizers
    # that divide a gradient by its own size make a step of that.
    batch, mesh, found = token_batch(8), foldcc.FoldedMesh.parse(text, "cpu"), {}
    own = {name: x.chunk(mesh.size("dp"))[mesh.coordinate(dist.get_rank(), "dp")] for name, x in batch.items()}
    plain = tiny_model("mixtral", num_hidden_layers=1, experts_implementation="eager").double()
    for name, p in plain.named_parameters():
        p.requires_grad_(not name.endswith(ALIKE))
    start = copy.deepcopy(plain.state_dict())
    with in_float64():
        folded = foldcc.parallelize(plain, mesh, example_inputs=own, verify=False, zero=zero)
        for name in makers:
            for model, given in ((plain, batch), (folded, own)):
                model.load_state_dict(start)
                optimizer = {**MAKERS, "Muon": Orthogonal}[name](model)
                for _ in range(2):
                    optimizer.zero_grad()
                    model(**given).loss.backward()
                    optimizer.step()
            trained = dict(folded.named_parameters())
            assert all(isinstance(p, DTensor) for p in trained.values())
            found[name] = max(relative_error(trained[n].full_tensor(), p) for n, p in plain.named_parameters())
    return found


@pytest.mark.parametrize(
    "text", [pytest.param("tp=2|ep=2", marks=pytest.mark.slow), pytest.param("tp=2|etp=2", marks=joins_blocks)]
)
def test_weights_after_two_steps_are_those_of_one_process(text: str):
    for found in run_distributed(after_steps, 2, text):
        assert set(found) == set(MAKERS) and max(found.values()) < 1e-10, found


@pytest.mark.slow
@pytest.mark.parametrize(("text", "zero"), [("dp=2,tp=2|ep=2", 3), pytest.param("dp=2,tp=2|etp=2", 1, marks=joins_blocks)])
def test_matrices_are_made_orthogonal_as_a_whole_however_they_are_divided(text: str, zero: int):
    for found in run_distributed(after_steps, 4, text, ("Muon",), zero):
        assert found["Muon"] < 1e-10, found
