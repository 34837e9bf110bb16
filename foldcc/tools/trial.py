"""One small model of a Transformers type, folded on a mesh: what became of it."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import foldcc
from foldcc.errors import FoldError
from foldcc.mesh import FoldedMesh
from foldcc.module import FoldedModule
from foldcc.testing.equivalence import compared
from foldcc.testing.float64 import in_float64
from foldcc.tools.small import LENGTH, SIZES, VOCABULARY, small_model

TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a type on a mesh.

    Attributes:
        kind, mesh: the type, and the mesh as text.
        reached: how far it came: "" if it does not run in one process, else "run", "captured", "folded", "compared".
        error: the largest relative error of the loss, an output or a gradient, in float64.
        proof: "proved", what the proof does not cover, or how it failed.
        ratio: FLOPs of all ranks over FLOPs of the model.
        replicated: operators that run whole on ranks, for want of a rule.
        seconds: of one core, for `parallelize` and its proof.
        reason: why it came no further.
    """

    kind: str
    mesh: str
    reached: str = ""
    error: float | None = None
    proof: str = ""
    ratio: float | None = None
    replicated: tuple[str, ...] = ()
    seconds: float = 0.0
    reason: str = ""

    @property
    def runs(self) -> bool:
        """Whether the model runs forward and backward in one process."""
        return self.reached != ""

    @property
    def captured(self) -> bool:
        return self.reached in ("captured", "folded", "compared")

    @property
    def folded(self) -> bool:
        return self.reached in ("folded", "compared")

    @property
    def equal(self) -> bool:
        return self.error is not None and self.error <= TOLERANCE

    @property
    def proved(self) -> bool:
        return self.proof == "proved"

    @property
    def good(self) -> bool:
        return self.equal and self.proved


def trial(kind: str, mesh: str) -> Outcome:
    """Folds a small model of a type, compares it with itself in one process, and proves it.

    Whatever is raised is the outcome's reason: that is what is asked for.
    """
    found = Outcome(kind=kind, mesh=mesh)
    passed: list[str] = []
    try:
        with in_float64():
            model, batch = _runs(kind), _batch()
            found = replace(found, reached="run")
            start = time.process_time()
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                folded = foldcc.parallelize(model, mesh, example_inputs=batch, verify=False, progress=passed.append)
            seconds = time.process_time() - start
            unknown = tuple(dict.fromkeys(str(w.message).split()[0] for w in told if "no factor rule" in str(w.message)))
            found = replace(found, reached="folded", ratio=folded.summary().flops_ratio, replicated=unknown, seconds=seconds)
            found = _proved(found, folded)
            found = _compared(found, folded, model, batch)
    except Exception as error:  # a crash is an outcome
        reached = "captured" if found.reached == "run" and len(passed) > 1 else found.reached
        return replace(found, reached=reached, reason=_told(error))
    return found


def _runs(kind: str) -> nn.Module:
    """A small model that has run forward and backward."""
    *sizes, last = SIZES
    for size in sizes:
        try:
            return _tried(kind, size)
        except Exception:  # whatever it says: the next size may do
            continue
    return _tried(kind, last)


def _tried(kind: str, size: int) -> nn.Module:
    model = small_model(kind, size).double()
    model(**_batch()).loss.backward()
    model.zero_grad()
    return model


def _batch() -> dict[str, Tensor]:
    """Four samples of random tokens and their labels, of which each sample has other numbers that count."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (4, LENGTH), generator=random)
    labels = ids.clone()
    labels[0, : LENGTH // 2 + 1] = -100
    labels[-1, 3:5] = -100
    return {"input_ids": ids, "labels": labels}


def _proved(found: Outcome, folded: FoldedModule) -> Outcome:
    start = time.process_time()
    try:
        proof = foldcc.verify(folded, rounds=1)
    except Exception as error:  # as `parallelize` does, which goes on without a proof
        verdict = f"not proved: {_told(error)}"
    else:
        missing = "; ".join(proof.missing)
        verdict = ("proved" if not missing else f"in part: {missing}") if proof.ok else _first(str(proof.difference or proof))
    return replace(found, proof=verdict, seconds=found.seconds + time.process_time() - start)


def _compared(found: Outcome, folded: FoldedModule, model: nn.Module, batch: dict[str, Any]) -> Outcome:
    result = compared(folded, model, (), batch)
    error = result.largest
    worst = [f"{path}: {x:.1e}" for path, x in (*result.outputs.items(), *result.gradients.items()) if not x <= TOLERANCE]
    reason = f"{len(worst)} values differ, such as {worst[0]}" if worst else ""
    return replace(found, reached="compared", error=error, reason=reason)


def _told(error: Exception) -> str:
    if isinstance(error, FoldError):
        facts = [str(error.facts[label]) for label in ("at",) if label in error.facts]
        return " ".join([_first(error.message), *(f"({_first(fact)})" for fact in facts)])
    return f"{type(error).__name__}: {_first(str(error))}"


def _first(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""


def meshes_of(experts: bool) -> tuple[str, ...]:
    """The meshes that a type is folded on unless others are asked for."""
    return tuple(map(str, map(FoldedMesh.parse, ("dp=2,tp=2|ep=4", "tp=2|ep=2") if experts else ("dp=2,tp=2",))))
