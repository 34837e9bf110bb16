"""The proof of a schedule: arithmetic on lists of actions, whatever the stages compute.

The order of each place is held against what its actions read: what a stage works on has been received, and comes from the
stage and the micro-batch that it is meant for; a stage takes micro-batches in their order, since each may read what the one
before has left in a buffer; what it makes is sent on before it is freed, and freed once, behind its last use; gradients of
parameters are made once, behind what they are made of; and places do not wait for each other in a circle, though sends wait
until enough of what was sent before has been received. All ranks of a place have one order, so that their collectives start
alike; and what two places send each other starts alike on both, for each direction has a channel of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from foldcc.errors import FoldError
from foldcc.runtime.schedule import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    FREE,
    RECEIVE,
    RECEIVE_GRADIENT,
    RECEIVES,
    SEND,
    SEND_GRADIENT,
    SENDS,
    Action,
    Channel,
    Order,
    Pipelining,
    in_step,
)


def prove_schedule(pipelining: Pipelining, *, backward: bool) -> str:
    """`prove_orders` of those of a schedule."""
    return prove_orders(pipelining.orders(backward=backward), pipelining, backward=backward)


def prove_orders(orders: Sequence[Order], pipelining: Pipelining, *, backward: bool) -> str:
    """What is proved of the orders of a pipeline's places, in a sentence.

    Args:
        pipelining: how many micro-batches and stages there are, and where.
        backward: each micro-batch has a backward pass.

    Raises:
        FoldError: the first action that reads what is not there, or stages that wait for each other, or what is left undone.
    """
    micro_batches, stages = pipelining.micro_batches, pipelining.stages
    under_way: dict[Channel, list[Action]] = defaultdict(list)
    done: dict[tuple[int, int], list[str]] = defaultdict(list)
    held, most = [0] * len(orders), [0] * len(orders)
    for place, action in in_step(orders, pipelining):
        kind, stage = action.kind, action.stage
        before = done[stage, action.micro_batch]
        missing = [x for x in _needs(kind, stage, pipelining, backward=backward) if x not in before]
        there = 0 <= action.micro_batch < micro_batches and 0 <= stage < stages and pipelining.place(stage) == place
        if missing or kind in before or FREE in before or not there:
            why = f"without {missing[0]} before it" if missing else "a second time" if kind in before else "after it was freed"
            why = why if there else f"of {micro_batches} micro-batches and {stages} stages"
            raise FoldError(f"Place {place} of pp does {action} {why}.", order=" · ".join(map(str, orders[place])))
        if kind == FORWARD and action.micro_batch and FORWARD not in done[stage, action.micro_batch - 1]:
            raise FoldError(
                f"Place {place} of pp does {action} without {FORWARD} of the one before it, whose buffers it may read.",
                order=" · ".join(map(str, orders[place])),
            )
        if kind in SENDS:
            under_way[pipelining.channel(action)].append(action)
        if kind in RECEIVES:
            sent = under_way[pipelining.channel(action)].pop(0)
            if (sent.stage, sent.micro_batch) != (stage + RECEIVES[kind], action.micro_batch):
                raise FoldError(f"Place {place} of pp does {action}, and what comes is of {sent}.")
        before.append(kind)
        held[place] += (kind == FORWARD) - (kind == FREE)
        most[place] = max(most[place], held[place])
    for stage in range(stages):
        for i in range(micro_batches):
            if FREE not in done[stage, i]:
                raise FoldError(f"Stage {stage} of a schedule does not finish micro-batch {i}.")
    told = ", ".join(map(str, most))
    each = f"{len(orders)} ranks with {pipelining.each} stages each" if stages > len(orders) else f"{stages} stages"
    return f"the schedule of {each} and {micro_batches} micro-batches, of which they hold at most {told} at a time"


def _needs(kind: str, stage: int, pipelining: Pipelining, *, backward: bool) -> list[str]:
    """What a stage has done with a micro-batch before."""
    last = pipelining.stages - 1
    received, sent = [RECEIVE] * (stage > 0), [SEND] * (stage < last)
    came, returned = [RECEIVE_GRADIENT] * (stage < last), [SEND_GRADIENT] * (stage > 0)
    halves = [BACKWARD_INPUT, BACKWARD_WEIGHT] if pipelining.in_two else [BACKWARD]
    known = {
        BACKWARD_WEIGHT: [BACKWARD_INPUT],
        RECEIVE: [],
        FORWARD: received,
        SEND: [FORWARD],
        RECEIVE_GRADIENT: [FORWARD],
        halves[0]: [FORWARD, *came],
        SEND_GRADIENT: halves[:1],
        FREE: [FORWARD, *sent, *([*halves, *returned] if backward else [])],
    }
    return known[kind]
