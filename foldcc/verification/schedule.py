"""The proof of a schedule: arithmetic on lists of actions, whatever the stages compute.

The order of each stage is held against what its actions read: what a stage works on has been received, and comes from the
micro-batch that it is meant for; it is sent on before it is freed, and freed once, behind its last use; and stages do not wait
for each other in a circle, though a send waits until what was sent before has been received. All ranks of a stage have one
order, so that their collectives start alike; and what two stages send each other starts alike on both, for each direction has a
channel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from foldcc.errors import FoldError
from foldcc.runtime.schedule import (
    BACKWARD,
    FORWARD,
    FREE,
    RECEIVE,
    RECEIVE_GRADIENT,
    SEND,
    SEND_GRADIENT,
    Order,
    Pipelining,
    in_step,
)


def prove_schedule(pipelining: Pipelining, *, backward: bool) -> str:
    """`prove_orders` of those of a schedule."""
    return prove_orders(pipelining.orders(backward=backward), pipelining.micro_batches, backward=backward)


def prove_orders(orders: Sequence[Order], micro_batches: int, *, backward: bool) -> str:
    """What is proved of the orders of a pipeline's stages, in a sentence.

    Args:
        backward: each micro-batch has a backward pass.

    Raises:
        FoldError: the first action that reads what is not there, or stages that wait for each other, or what is left undone.
    """
    last = len(orders) - 1
    under_way: dict[tuple[int, str], list[int]] = {}
    done: dict[tuple[int, int], list[str]] = {}
    held, most = [0] * len(orders), [0] * len(orders)
    for stage, action in in_step(orders):
        kind, i = action.kind, action.micro_batch
        before = done.setdefault((stage, i), [])
        missing = [x for x in _needs(kind, stage, last, backward=backward) if x not in before]
        if missing or kind in before or FREE in before or not 0 <= i < micro_batches:
            why = f"without {missing[0]} before it" if missing else "a second time" if kind in before else "after it was freed"
            why = why if 0 <= i < micro_batches else f"of {micro_batches} micro-batches"
            raise FoldError(f"Stage {stage} of a schedule does {action} {why}.", order=" · ".join(map(str, orders[stage])))
        if kind in (SEND, SEND_GRADIENT):
            under_way.setdefault((stage, kind), []).append(i)
        if kind in (RECEIVE, RECEIVE_GRADIENT):
            sender = (stage - 1, SEND) if kind == RECEIVE else (stage + 1, SEND_GRADIENT)
            sent = under_way[sender].pop(0)
            if sent != i:
                raise FoldError(f"Stage {stage} of a schedule does {action}, and what comes is of micro-batch {sent}.")
        before.append(kind)
        held[stage] += (kind == FORWARD) - (kind == FREE)
        most[stage] = max(most[stage], held[stage])
    for stage in range(len(orders)):
        for i in range(micro_batches):
            if FREE not in done.get((stage, i), ()):
                raise FoldError(f"Stage {stage} of a schedule does not finish micro-batch {i}.")
    told = ", ".join(map(str, most))
    return (
        f"the schedule of {len(orders)} stages and {micro_batches} micro-batches, of which they hold at most {told} at a time"
    )


def _needs(kind: str, stage: int, last: int, *, backward: bool) -> list[str]:
    """What a stage has done with a micro-batch before."""
    received, sent = [RECEIVE] * (stage > 0), [SEND] * (stage < last)
    came, returned = [RECEIVE_GRADIENT] * (stage < last), [SEND_GRADIENT] * (stage > 0)
    known = {
        RECEIVE: [],
        FORWARD: received,
        SEND: [FORWARD],
        RECEIVE_GRADIENT: [FORWARD],
        BACKWARD: [FORWARD, *came],
        SEND_GRADIENT: [BACKWARD],
        FREE: [FORWARD, *sent, *([BACKWARD, *returned] if backward else [])],
    }
    return known[kind]
