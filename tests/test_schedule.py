"""Schedules are proved, and what is planted in them is found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest

from foldcc.errors import FoldError
from foldcc.runtime.schedule import (
    BACKWARD,
    FORWARD,
    FREE,
    RECEIVE,
    RECEIVE_GRADIENT,
    SCHEDULES,
    SEND,
    SEND_GRADIENT,
    Action,
    Order,
    Pipelining,
)
from foldcc.verification.schedule import prove_orders, prove_schedule

Orders = list[Order]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "count"), [(1, 1), (1, 4), (2, 2), (3, 8), (4, 4), (16, 64)])
def test_every_schedule_holds_with_and_without_backward_passes(schedule: str, stages: int, count: int) -> None:
    pipelining = Pipelining(stages, count, schedule)
    for backward in (True, False):
        told = prove_schedule(pipelining, backward=backward)
        if backward:
            held = [min(count, stages - s) if schedule == "1f1b" else count for s in range(stages)]
            assert f"at most {', '.join(map(str, held))} at a time" in told


def dropped(order: Order) -> Iterator[tuple[str, Order]]:
    """A pass, a send, a wait for what comes, or a free that is missing."""
    for k, action in enumerate(order):
        yield f"without {action}", order[:k] + order[k + 1 :]


def twice(order: Order) -> Iterator[tuple[str, Order]]:
    for k, action in enumerate(order):
        yield f"{action} twice", order[: k + 1] + order[k:]


def of_another(order: Order) -> Iterator[tuple[str, Order]]:
    """An action on the wrong micro-batch."""
    for k, action in enumerate(order):
        yield f"{action} of the next", (*order[:k], replace(action, micro_batch=action.micro_batch + 1), *order[k + 1 :])


def late(order: Order) -> Iterator[tuple[str, Order]]:
    """A receive behind what reads it; and so what is sent before it is made, and what is freed before it is read."""
    for k, (first, then) in enumerate(pairwise(order)):
        reads = {(RECEIVE, FORWARD), (FORWARD, SEND), (RECEIVE_GRADIENT, BACKWARD), (BACKWARD, SEND_GRADIENT)}
        frees = then.kind == FREE
        if first.micro_batch == then.micro_batch and ((first.kind, then.kind) in reads or frees):
            yield f"{then} before {first}", (*order[:k], then, first, *order[k + 2 :])


def exchanged(order: Order) -> Iterator[tuple[str, Order]]:
    """Two launches on one channel that one stage exchanges, with all that belongs to them."""
    for kind in (SEND, SEND_GRADIENT, RECEIVE, RECEIVE_GRADIENT):
        places = [k for k, action in enumerate(order) if action.kind == kind]
        for a, b in pairwise(places):
            new = list(order)
            new[a], new[b] = order[b], order[a]
            yield f"{order[a]} and {order[b]} exchanged", tuple(new)


def mutants(orders: Orders) -> Iterator[tuple[str, Orders]]:
    for stage, order in enumerate(orders):
        for mistake in (dropped, twice, of_another, late, exchanged):
            for what, new in mistake(order):
                yield f"stage {stage}: {what}", [*orders[:stage], new, *orders[stage + 1 :]]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_mistake_in_a_schedule_is_found(schedule: str) -> None:
    orders = Pipelining(3, 4, schedule).orders(backward=True)
    planted = list(mutants(orders))
    assert len(planted) > 200
    for what, wrong in planted:
        with pytest.raises(FoldError):
            prove_orders(wrong, 4, backward=True)
            pytest.fail(f"{what} is not found")


def test_stages_that_wait_for_each_other_in_a_circle_are_found() -> None:
    """Every action is there, and in an order that its own stage could follow."""
    first, last = Pipelining(2, 2, "1f1b").orders(backward=True)
    receive = Action(RECEIVE_GRADIENT, 0)
    waits = (Action(FORWARD, 0), receive, Action(SEND, 0), *(a for a in first[2:] if a != receive))
    with pytest.raises(
        FoldError, match=r"(?s)wait for each other without end.*stage 0 +receive gradient 0.*stage 1 +receive 0"
    ):
        prove_orders([waits, last], 2, backward=True)


def test_a_send_waits_for_what_was_sent_before() -> None:
    """A stage that sends two before it receives anything, to one that sends two back in between."""
    first = tuple(Action(k, i) for k, i in ((FORWARD, 0), (SEND, 0), (FORWARD, 1), (SEND, 1), (FORWARD, 2), (SEND, 2)))
    last = (Action(RECEIVE, 0), Action(FORWARD, 0), Action(RECEIVE_GRADIENT, 0))
    with pytest.raises(FoldError, match="(?s)wait for each other.*stage 0 +send 2"):
        prove_orders([first, last, ()], 3, backward=True)
