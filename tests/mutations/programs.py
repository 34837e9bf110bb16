"""The programs in which mistakes are planted, and what they compute without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import foldcc
from foldcc.module import FoldedModule
from foldcc.testing import in_float64
from foldcc.testing.mutate import Mutant, mutants
from tests.models import tiny_model, token_batch

MESHES = ("dp=2,tp=4|ep=4,etp=2", "dp=3,tp=2|ep=2")
# Mixtral with what it can have: a load-balancing loss, and the embedding tied to the head.
FAMILIES: dict[str, dict[str, Any]] = {"mixtral": {"aux_loss": True, "tie_word_embeddings": True}, "deepseek_v3": {}}
PROGRAMS = tuple((family, mesh) for family in FAMILIES for mesh in MESHES)


@dataclass(frozen=True)
class Subject:
    """A model that is folded twice, in float64 with the casts lifted and as it is, and its results.

    Attributes:
        lifted, plain: folded, in float64 and in float32; their programs have the same operators.
        results: of `lifted`: every output, and every gradient of the loss.
        loss, gradients: of the original in float32.
    """

    lifted: FoldedModule
    plain: FoldedModule
    batch: dict[str, Tensor]
    results: dict[str, Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]

    def pairs(self) -> Iterator[tuple[Mutant, Mutant]]:
        """Every mutant, of `plain` and of `lifted`."""
        for plain, lifted in zip(mutants(self.plain), mutants(self.lifted), strict=True):
            assert str(plain) == str(lifted)
            yield plain, lifted


@cache
def folded(family: str, mesh: str, **changes: Any) -> FoldedModule:
    """A tiny model of a family, folded on a virtual mesh."""
    fold = foldcc.FoldedMesh.parse(mesh)
    model = tiny_model(family, **FAMILIES.get(family, {}) | changes)
    return foldcc.parallelize(model, fold, example_inputs=token_batch(2 * fold.size("dp"), 8))


@cache
def subject(family: str, mesh: str) -> Subject:
    """A program of the table."""
    fold = foldcc.FoldedMesh.parse(mesh)
    batch = token_batch(2 * fold.size("dp"), 8)
    plain, original = folded(family, mesh), tiny_model(family, **FAMILIES[family])
    with in_float64():
        lifted = foldcc.parallelize(tiny_model(family, **FAMILIES[family]).double(), fold, example_inputs=batch)
    return Subject(lifted, plain, batch, all_results(lifted, batch), *loss_and_gradients(original, batch))


def all_results(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every output, and every gradient of the loss, by name, in lifted float64."""
    with in_float64():
        result = model(**batch)
        leaves = pytree.tree_leaves_with_path(result)
        outputs = {pytree.keystr(p): x for p, x in leaves if isinstance(x, Tensor) and x.requires_grad}
    return {n: x.detach() for n, x in outputs.items()} | _gradients(model, result.loss)


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """What a training step computes."""
    loss = model(**batch).loss
    return loss.detach(), _gradients(model, loss)


def _gradients(model: nn.Module, objective: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(objective, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}
