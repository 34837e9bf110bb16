"""Schedules: in which order each pipeline stage works on which micro-batch. Lists of actions, and what runs them in step.

    gpipe, 2 stages, 2 micro-batches        stage 0   F0 s0 F1 s1        r0 B0 f0 r1 B1 f1
                                            stage 1   r0 F0 r1 F1        B0 s0 f0 B1 s1 f1

A place of the axis pp has one stage, or several: stages s, s + pp, s + 2 pp, ... are on place s, so that a micro-batch passes
all places several times, and a place waits less for its first one (Narayanan et al., arXiv 2104.04473, section 2.2). The orders
are those of places.

What a place sends to another one arrives in the order in which it was sent, on a channel for each pair of neighbours and each
direction; from the last place to the first is one of its own. A send starts when what was sent before on its channel has been
received; a receive waits for what comes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from foldcc.errors import FoldError, divides, listed

SCHEDULES = ("gpipe", "1f1b")
RECEIVE, FORWARD, SEND = "receive", "forward", "send"
RECEIVE_GRADIENT, BACKWARD, SEND_GRADIENT, FREE = "receive gradient", "backward", "send gradient", "free"
SENDS = {SEND: 1, SEND_GRADIENT: -1}  # to which neighbour
RECEIVES = {RECEIVE: -1, RECEIVE_GRADIENT: 1}  # from which neighbour


@dataclass(frozen=True)
class Action:
    """What a stage does with a micro-batch."""

    kind: str
    micro_batch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.kind} {self.micro_batch} of stage {self.stage}"


Order = tuple[Action, ...]
Channel = tuple[int, int]  # the place that sends, and 1 to the next one or -1 to the one before


@dataclass(frozen=True)
class Pipelining:
    """How a call is cut: `parallelize(micro_batches=, schedule=, stages_per_rank=)`, and `pp` of the mesh.

    Attributes:
        places: of the axis pp.
        each: how many stages a place has.
    """

    places: int
    micro_batches: int
    schedule: str
    each: int = 1

    def __post_init__(self) -> None:
        if type(self.micro_batches) is not int or self.micro_batches < 1:
            raise FoldError(f"micro_batches={self.micro_batches!r} is no number of micro-batches.", valid="1 or more")
        if self.schedule not in SCHEDULES:
            raise FoldError(f"There is no schedule {self.schedule!r}.", valid=listed(SCHEDULES))
        if type(self.each) is not int or self.each < 1:
            raise FoldError(f"stages_per_rank={self.each!r} is no number of stages.", valid="1 or more")
        if self.each > 1 and self.places == 1:
            raise FoldError(f"stages_per_rank={self.each} with pp=1: one rank has nobody to take turns with.", valid="1")
        if self.schedule == "1f1b" and self.micro_batches < self.places:
            raise FoldError(
                f"Schedule 1f1b fills {self.places} stages with as many micro-batches, and there are {self.micro_batches}.",
                valid=f"micro_batches={self.places} or more, or schedule='gpipe'",
            )
        if self.schedule == "1f1b" and self.each > 1:
            divides(
                "micro-batches",
                self.micro_batches,
                "pp",
                self.places,
                valid=f"micro_batches: multiples of {self.places}; stages_per_rank=1; schedule='gpipe'",
            )

    @property
    def stages(self) -> int:
        return self.places * self.each

    def place(self, stage: int) -> int:
        """Where a stage is."""
        return stage % self.places

    def orders(self, *, backward: bool) -> list[Order]:
        """What each place does, in its order.

        Args:
            backward: gradients are asked for.
        """
        return [tuple(self._order(place, backward=backward)) for place in range(self.places)]

    def _order(self, place: int, *, backward: bool) -> Iterator[Action]:
        ahead = count = self.micro_batches * self.each
        if self.schedule == "1f1b":
            # Each place is a step behind the one before, and a step back follows as soon as the last stage can make it.
            later = self.places - 1 - place
            ahead = min(count, later if self.each == 1 else 2 * later + (self.each - 1) * self.places)
        steps = [*self._steps(place)]
        back = [(self.stages - self.places - stage + 2 * place, i) for stage, i in steps]  # the last stages first
        for k in range(count + ahead):
            if k < count:
                yield from self._forward(*steps[k], backward=backward)
            if backward and k >= ahead:
                yield from self._backward(*back[k - ahead])

    def _steps(self, place: int) -> Iterator[tuple[int, int]]:
        """The stages of a place with their micro-batches, of which as many as places go through one stage before the next."""
        for start in range(0, self.micro_batches, self.places):
            for stage in range(place, self.stages, self.places):
                yield from ((stage, i) for i in range(start, min(start + self.places, self.micro_batches)))

    def _forward(self, stage: int, i: int, *, backward: bool) -> Iterator[Action]:
        kinds = [RECEIVE] * (stage > 0) + [FORWARD] + [SEND] * (stage < self.stages - 1) + [FREE] * (not backward)
        return (Action(kind, i, stage) for kind in kinds)

    def _backward(self, stage: int, i: int) -> Iterator[Action]:
        kinds = [RECEIVE_GRADIENT] * (stage < self.stages - 1) + [BACKWARD] + [SEND_GRADIENT] * (stage > 0) + [FREE]
        return (Action(kind, i, stage) for kind in kinds)


def is_late(action: Action) -> bool:
    """Whether an action belongs to a backward pass."""
    return action.kind in (RECEIVE_GRADIENT, BACKWARD, SEND_GRADIENT)


def channel(action: Action, places: int) -> Channel:
    """Where a send or a receive takes place."""
    step = SENDS[action.kind] if action.kind in SENDS else -RECEIVES[action.kind]
    sender = action.stage if action.kind in SENDS else action.stage - step
    return sender % places, step


def in_step(orders: Sequence[Order]) -> Iterator[tuple[int, Action]]:
    """The actions of all places as they run: each place goes on as long as it waits for no other.

    Raises:
        FoldError: all places that are left wait: for what, and whom.
    """
    done = [0] * len(orders)
    sent: dict[Channel, list[Action]] = defaultdict(list)  # what is under way
    moved = True
    while moved:
        moved = False
        for place, order in enumerate(orders):
            while done[place] < len(order) and _may(order[done[place]], sent, len(orders)):
                action = order[done[place]]
                if action.kind in SENDS:
                    sent[channel(action, len(orders))].append(action)
                if action.kind in RECEIVES:
                    sent[channel(action, len(orders))].pop(0)
                done[place] += 1
                moved = True
                yield place, action
    waiting = {f"pp {p}": str(order[done[p]]) for p, order in enumerate(orders) if done[p] < len(order)}
    if waiting:
        raise FoldError("The stages of a pipeline wait for each other without end.", **waiting)
    if under_way := {f"from pp {place}": listed(x) for (place, _), x in sent.items() if x}:
        raise FoldError("What a stage has sent is never received.", **under_way)


def _may(action: Action, sent: dict[Channel, list[Action]], places: int) -> bool:
    if action.kind in SENDS:
        return not sent[channel(action, places)]
    return action.kind not in RECEIVES or bool(sent[channel(action, places)])


def bubble(orders: Sequence[Order], *, backward: float = 2.0) -> float:
    """The share of a step in which places wait, where a forward pass of a stage takes 1 and what they send takes no time.

    Args:
        backward: how long a backward pass of a stage takes.
    """
    clocks, busy = [0.0] * len(orders), 0.0
    sent: dict[Channel, list[float]] = defaultdict(list)
    taken: dict[Channel, float] = defaultdict(float)  # when what was sent last has been received
    for place, action in in_step(orders):
        if action.kind in SENDS:
            clocks[place] = max(clocks[place], taken[channel(action, len(orders))])
            sent[channel(action, len(orders))].append(clocks[place])
        if action.kind in RECEIVES:
            clocks[place] = max(clocks[place], sent[channel(action, len(orders))].pop(0))
            taken[channel(action, len(orders))] = clocks[place]
        work = {FORWARD: 1.0, BACKWARD: backward}.get(action.kind, 0.0)
        clocks[place], busy = clocks[place] + work, busy + work
    return 1 - busy / (len(orders) * max(clocks))
