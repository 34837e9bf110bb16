"""Moves: what brings a value from one state on a mesh axis to another. `localize` writes these steps, and costs count them.

A step is an operator of `foldcc/ops/collectives.py` and the type behind it. What is not here is no move: a value that every
rank has with gradients of its own (R) does not become one whose gradient is the same everywhere (I).
"""

from __future__ import annotations

from foldcc.layout import INVARIANT, PARTIAL, REPLICATED, VARYING
from foldcc.ops.collectives import all_gather, all_reduce, once, reduce_scatter, retype, shard
from foldcc.ops.exchange import exchange
from foldcc.ops.operator import Operator

Step = tuple[Operator, str]
R, I, V, P = REPLICATED, INVARIANT, VARYING, PARTIAL  # noqa: E741

MOVES: dict[tuple[str, str], tuple[Step, ...]] = {
    (I, R): ((retype, R),),
    (I, V): ((shard, V),),
    (I, P): ((once, P),),
    (R, V): ((shard, V),),
    (R, P): ((once, P),),
    (V, I): ((all_gather, I),),
    (V, R): ((all_gather, R),),
    (V, V): ((exchange, V),),
    (P, I): ((all_reduce, I),),
    (P, R): ((all_reduce, R),),
    (P, V): ((reduce_scatter, V),),
}
# A part that lies within one that is joined or cut moves in two steps.
IN_TWO: tuple[Step, ...] = ((all_gather, I), (shard, V))
# The order in which steps are taken, where a value moves on several axes: sums first, also on the way back, and what makes
# values smaller last.
ORDER: tuple[tuple[Operator, ...], ...] = ((all_reduce,), (retype,), (all_gather,), (once,), (reduce_scatter, shard))
