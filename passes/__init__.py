"""The pipeline, top to bottom."""

from collections.abc import Sequence
from dataclasses import replace

from foldcc.ir.pipeline import Pass, Stage, Stages, run_passes
from foldcc.ir.program import Program
from foldcc.passes.ahead import Ahead
from foldcc.passes.annotate import Annotate
from foldcc.passes.average import Average
from foldcc.passes.bucket import Bucket
from foldcc.passes.differentiate import Differentiate
from foldcc.passes.dispatch import Dispatch
from foldcc.passes.experts import Experts
from foldcc.passes.localize import Localize
from foldcc.passes.lower import Lower
from foldcc.passes.outline import Outline
from foldcc.passes.precision import PrecisionPass
from foldcc.passes.recompute import Recompute
from foldcc.passes.shard import ShardPass
from foldcc.passes.simplify import Simplify
from foldcc.passes.split import Split
from foldcc.passes.stage import StagePass
from foldcc.passes.store import Store
from foldcc.passes.travel import Travel
from foldcc.passes.weights import Weights
from foldcc.types.check import check_types

PIPELINE: tuple[Pass, ...] = (
    PrecisionPass(),
    Outline(),
    Annotate(),
    ShardPass(),
    Dispatch(),
    Store(),
    Localize(),
    Differentiate(),
    Travel(),
    Split(),
    Lower(),
    Simplify(),
    Bucket(),
    Ahead(),
)


def for_kernels(pipeline: Sequence[Pass]) -> tuple[Pass, ...]:
    """The pipeline of a program that kernels are emitted for, which rewrites joint graphs and keeps less of them."""
    found: list[Pass] = []
    for p in pipeline:
        p = replace(p, in_pieces=True) if isinstance(p, Differentiate) else p
        found += [Experts(), Recompute(), p] if isinstance(p, Split) else [p]
    return tuple(found)


def recomputing(pipeline: Sequence[Pass], policy: str | float) -> tuple[Pass, ...]:
    """The pipeline of a program that keeps between its passes what a policy of `passes/recompute.py` says."""
    found: list[Pass] = []
    for p in pipeline:
        found += [] if isinstance(p, Recompute) else [Recompute(policy=policy), p] if isinstance(p, Split) else [p]
    return tuple(found)


def in_stages(pipeline: Sequence[Pass], stages: int, *, in_two: bool) -> tuple[Pass, ...]:
    """The pipeline of a program whose calls run on pipeline stages, and whose backward passes may be in two."""
    found: list[Pass] = []
    for p in pipeline:
        found += [StagePass(stages=stages), p] if isinstance(p, Dispatch) else [p]
    return (*found, Weights()) if in_two else tuple(found)


def in_micro_batches(pipeline: Sequence[Pass], micro_batches: int, whole: Program | None = None) -> tuple[Pass, ...]:
    """The pipeline of a program of one micro-batch; `whole` is that of the call, captured, if it is known."""
    at = next(i for i, p in enumerate(pipeline) if isinstance(p, Annotate)) + 1
    average = Average(micro_batches=micro_batches, whole=whole, before=tuple(pipeline[:at]))
    return (*pipeline[:at], average, *pipeline[at:])


__all__ = [
    "for_kernels",
    "in_micro_batches",
    "in_stages",
    "PIPELINE",
    "Pass",
    "Stage",
    "Stages",
    "check_types",
    "recomputing",
    "run_passes",
]
