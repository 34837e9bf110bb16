"""Schedules are proved, and what is planted in them is found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest

from foldcc.errors import FoldError
from foldcc.runtime.schedule import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
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
    bubble,
    simulated,
)
from foldcc.verification.schedule import prove_orders, prove_schedule

Orders = list[Order]


SIZES = [(1, 1, 1), (1, 4, 1), (2, 2, 1), (3, 8, 1), (4, 4, 1), (16, 64, 1), (2, 2, 2), (4, 8, 3), (3, 12, 2), (16, 64, 4)]
IN_V = [(2, 4, 2), (3, 6, 2), (4, 9, 2), (16, 64, 2)]
OF = {"zbv": IN_V, "dualpipev": IN_V}


@pytest.mark.parametrize(
    ("schedule", "places", "count", "each"), [(schedule, *sizes) for schedule in SCHEDULES for sizes in OF.get(schedule, SIZES)]
)
def test_every_schedule_holds_and_waits_as_long_as_its_closed_form_says(
    schedule: str, places: int, count: int, each: int
) -> None:
    """(p - 1) / (m v + p - 1), Narayanan et al., arXiv 2104.04473, sections 2.2.1 and 2.2.2, as a share of the whole step.

    With a backward pass in two, whose halves take as long as a forward pass, a place waits for (p - 1) passes of the 3 m v that
    it does: Qi et al., arXiv 2401.10241, table 1, where TF = TB = TW.
    """
    pipelining = Pipelining(places, count, schedule, each)
    for backward in (True, False):
        told = prove_schedule(pipelining, backward=backward)
        if backward and each == 1:
            held = [count if schedule == "gpipe" else min(count, places - s * (schedule == "1f1b")) for s in range(places)]
            assert f"at most {', '.join(map(str, held))} at a time" in told
        passes = count * each * (3 if backward and pipelining.in_two else 1)
        if backward or schedule in ("gpipe", "1f1b"):
            waits = bubble(pipelining.orders(backward=backward), pipelining)
            assert waits == pytest.approx((places - 1) / (passes + places - 1))


@pytest.mark.parametrize("schedule", ["zero-bubble", "zbv", "dualpipev"])
def test_a_backward_pass_in_two_waits_less_than_a_whole_one_of_as_many_stages(schedule: str) -> None:
    """Also where what is sent back takes longer than the gradients of parameters, as attention makes it."""
    waits, takes = {}, {FORWARD: 1.0, BACKWARD: 2.2, BACKWARD_INPUT: 1.3, BACKWARD_WEIGHT: 0.9}
    for name in ("1f1b", schedule):
        pipelining = Pipelining(4, 8, name, 2)
        whole, busy = simulated(pipelining.orders(backward=True), pipelining, lambda action: takes.get(action.kind, 0.0))
        assert busy == pytest.approx(4 * 8 * 2 * 3.2)
        waits[name] = 1 - busy / (4 * whole)
    assert waits[schedule] < 0.75 * waits["1f1b"]


def test_taking_turns_holds_no_more_than_the_stages_that_are_ahead() -> None:
    """With gpipe a place holds all that it has; with 1f1b as many as fill its own stages and the way to the end and back."""
    told = prove_schedule(Pipelining(4, 16, "1f1b", 2), backward=True)
    assert "4 ranks with 2 stages each and 16 micro-batches, of which they hold at most 11, 9, 7, 5 at a time" in told
    assert "at most 32, 32, 32, 32 at a time" in prove_schedule(Pipelining(4, 16, "gpipe", 2), backward=True)


def test_micro_batches_that_places_do_not_divide_hold_with_gpipe() -> None:
    for count in (1, 3, 5, 7):
        prove_schedule(Pipelining(4, count, "gpipe", 3), backward=True)


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
        reads |= {(RECEIVE_GRADIENT, BACKWARD_INPUT), (BACKWARD_INPUT, SEND_GRADIENT), (BACKWARD_INPUT, BACKWARD_WEIGHT)}
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


def elsewhere(order: Order) -> Iterator[tuple[str, Order]]:
    """An action of another stage."""
    for k, action in enumerate(order):
        yield f"{action} of the next stage", (*order[:k], replace(action, stage=action.stage + 1), *order[k + 1 :])


def mutants(orders: Orders) -> Iterator[tuple[str, Orders]]:
    for place, order in enumerate(orders):
        for mistake in (dropped, twice, of_another, elsewhere, late, early, exchanged):
            for what, new in mistake(order):
                yield f"place {place}: {what}", [*orders[:place], new, *orders[place + 1 :]]


def early(order: Order) -> Iterator[tuple[str, Order]]:
    """Gradients of parameters before what they are made of."""
    for k, action in enumerate(order):
        if action.kind == BACKWARD_WEIGHT:
            first = order.index(replace(action, kind=BACKWARD_INPUT))
            yield f"{action} early", (*order[:first], action, *order[first:k], *order[k + 1 :])


@pytest.mark.parametrize(("schedule", "each"), [*((s, 1) for s in SCHEDULES if s not in OF), *((s, 2) for s in SCHEDULES)])
def test_every_mistake_in_a_schedule_is_found(schedule: str, each: int) -> None:
    places = 2 if schedule in OF else 3
    pipelining = Pipelining(places, {1: 4, 2: 2 * places}[each], schedule, each)
    planted = list(mutants(pipelining.orders(backward=True)))
    assert len(planted) > 200
    for what, wrong in planted:
        with pytest.raises(FoldError):
            prove_orders(wrong, pipelining, backward=True)
            pytest.fail(f"{what} is not found")


def test_stages_that_wait_for_each_other_in_a_circle_are_found() -> None:
    """Every action is there, and in an order that its own stage could follow."""
    first, last = Pipelining(2, 2, "1f1b").orders(backward=True)
    receive = Action(RECEIVE_GRADIENT, 0, 0)
    waits = (Action(FORWARD, 0, 0), receive, Action(SEND, 0, 0), *(a for a in first[2:] if a != receive))
    with pytest.raises(FoldError, match=r"(?s)wait for each other without end.*pp 0 +receive gradient 0.*pp 1 +receive 0"):
        prove_orders([waits, last], Pipelining(2, 2, "1f1b"), backward=True)


def test_a_send_waits_for_what_was_sent_before() -> None:
    """A stage that sends two before it receives anything, to one that sends two back in between."""
    first = tuple(Action(k, i, 0) for k, i in ((FORWARD, 0), (SEND, 0), (FORWARD, 1), (SEND, 1), (FORWARD, 2), (SEND, 2)))
    last = (Action(RECEIVE, 0, 1), Action(FORWARD, 0, 1), Action(RECEIVE_GRADIENT, 0, 1))
    with pytest.raises(FoldError, match="(?s)wait for each other.*pp 0 +send 2"):
        prove_orders([first, last, ()], Pipelining(3, 3, "gpipe"), backward=True)


def test_a_later_micro_batch_that_comes_first_everywhere_is_found() -> None:
    """All of it would fit, and of buffers that are updated it would read what is not there yet."""
    swapped = {0: 1, 1: 0}
    pipelining = Pipelining(2, 4, "1f1b")
    orders = [
        tuple(replace(a, micro_batch=swapped.get(a.micro_batch, a.micro_batch)) for a in order)
        for order in pipelining.orders(backward=True)
    ]
    with pytest.raises(FoldError, match="Place 0 of pp does forward 1.* without forward of the one before it"):
        prove_orders(orders, pipelining, backward=True)
