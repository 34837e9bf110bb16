"""The pipeline, top to bottom."""

from foldcc.ir.pipeline import Pass, Stage, Stages, run_passes
from foldcc.passes.annotate import Annotate
from foldcc.passes.bucket import Bucket
from foldcc.passes.differentiate import Differentiate
from foldcc.passes.dispatch import Dispatch
from foldcc.passes.localize import Localize
from foldcc.passes.lower import Lower
from foldcc.passes.outline import Outline
from foldcc.passes.shard import ShardPass
from foldcc.passes.simplify import Simplify
from foldcc.types.check import check_types

PIPELINE: tuple[Pass, ...] = (
    Outline(),
    Annotate(),
    ShardPass(),
    Dispatch(),
    Localize(),
    Differentiate(),
    Lower(),
    Simplify(),
    Bucket(),
)

__all__ = ["PIPELINE", "Pass", "Stage", "Stages", "check_types", "run_passes"]
