"""What a person reads: a stage as text, the difference of two, and tables of stages, collectives and costs."""

from foldcc.inspect.collectives import Collective, Collectives, collectives
from foldcc.inspect.ranks import rank_table
from foldcc.inspect.summary import Summary, summary
from foldcc.ir.syntax import Line, parse
from foldcc.ir.text import stage_diff, stage_text, stages_table

__all__ = [
    "Collective", "Collectives", "Line", "Summary", "collectives", "parse", "rank_table", "stage_diff", "stage_text",
    "stages_table", "summary",
]  # fmt: skip
