"""The checkers that every mutant is shown to.

Each is a function of a subject, and of the mutant of its float32 and of its float64 program, and returns what it says against
the mutant, or None. An exception while the mutant runs is said against it too: nobody trains on. The two plain comparisons
are what a careful user writes: the loss, or the gradients, that rank 0 sees, next to those of the model in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import foldcc
from foldcc.layout import Layout, Shard
from foldcc.module import FoldedModule
from foldcc.passes import check_types
from foldcc.runtime.executable import Executable
from foldcc.testing.equivalence import relative_error
from foldcc.testing.mutate import Mutant
from tests.mutations.programs import Subject, all_results, loss_and_gradients

FAILURES = (RuntimeError, ValueError, IndexError)  # what a broken program raises while it runs
RAISED = "raises "


class RankZero(Executable):
    """Shows what rank 0 and its shards hold, and does not compare replicas, as on a real mesh."""

    def leave(self, values: Sequence[Any], layouts: Sequence[Layout], names: Sequence[str]) -> list[Any]:
        seen = [v if v is None else self._seen(v, layout) for v, layout in zip(values, layouts, strict=True)]
        return super().leave(seen, layouts, names)

    def _seen(self, parts: list[Tensor], layout: Layout) -> list[Tensor]:
        mesh = self.program.mesh
        whole = tuple(a for a in mesh.axes(layout.view) if not isinstance(layout.states.get(a), Shard))
        return [parts[mesh.group_of(r, whole)[0]] for r in range(mesh.world_size)]


def as_rank_zero_sees(model: FoldedModule) -> FoldedModule:
    model._programs = model._programs.rewritten(model.stages, RankZero(model.program))
    return model


def _raised(error: Exception) -> str:
    return f"{RAISED}{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def types(subject: Subject, plain: Mutant, lifted: Mutant) -> str | None:
    try:
        check_types(plain.program())
    except foldcc.FoldError as error:
        return error.message
    return None


def exact(subject: Subject, plain: Mutant, lifted: Mutant) -> str | None:
    try:
        proof = foldcc.verify(plain.apply())
    except FAILURES as error:
        return _raised(error)
    return None if proof.ok else str(proof.difference)


def numeric(subject: Subject, plain: Mutant, lifted: Mutant) -> str | None:
    """Every output and gradient in float64, to 1e-10; the folded model itself compares replicas."""
    try:
        found = all_results(lifted.apply(), subject.batch)
    except FAILURES as error:
        said = _raised(error)
        return said.removeprefix(RAISED) if "which hold replicas of it" in said else said
    return _largest(found, subject.results, 1e-10)


def plain_loss(subject: Subject, plain: Mutant, lifted: Mutant) -> str | None:
    """The loss in float32, as `torch.testing.assert_close` compares."""
    try:
        # Without gradients a program of its own would be compiled, which has no mistake.
        loss = as_rank_zero_sees(plain.apply())(**subject.batch).loss.detach()
    except FAILURES as error:
        return _raised(error)
    same = torch.allclose(loss, subject.loss, rtol=1.3e-6, atol=1e-5)
    return None if same else f"the loss is {loss:.7f} instead of {subject.loss:.7f}"


def plain_gradients(subject: Subject, plain: Mutant, lifted: Mutant) -> str | None:
    """The gradients of the loss in float32, each to 1e-3 of its norm."""
    try:
        _, found = loss_and_gradients(as_rank_zero_sees(plain.apply()), subject.batch)
    except FAILURES as error:
        return _raised(error)
    return _largest(found, subject.gradients, 1e-3)


def _largest(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> str | None:
    errors = {name: relative_error(found[name], x) for name, x in wanted.items()}
    worst = max(errors, key=lambda name: errors[name])
    return None if errors[worst] <= tolerance else f"{worst} differs by {errors[worst]:.1e}"


Checker = Callable[[Subject, Mutant, Mutant], str | None]
CHECKERS: dict[str, Checker] = {"types": types, "exact": exact, "numeric": numeric}
PLAIN: dict[str, Checker] = {"loss": plain_loss, "gradients": plain_gradients}
