"""Schedules: in which order each pipeline stage works on which micro-batch. Lists of actions, and what runs them in step.

    gpipe, 2 stages, 2 micro-batches        stage 0   F0 s0 F1 s1        r0 B0 f0 r1 B1 f1
                                            stage 1   r0 F0 r1 F1        B0 s0 f0 B1 s1 f1

What a stage sends to another one arrives in the order in which it was sent, on a channel for each pair of neighbours and each
direction. A send starts when what was sent before on its channel has been received; a receive waits for what comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from foldcc.errors import FoldError, listed

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

    def __str__(self) -> str:
        return f"{self.kind} {self.micro_batch}"


Order = tuple[Action, ...]


@dataclass(frozen=True)
class Pipelining:
    """How a call is cut: `parallelize(micro_batches=, schedule=)`, and `pp` of the mesh."""

    stages: int
    micro_batches: int
    schedule: str

    def __post_init__(self) -> None:
        if type(self.micro_batches) is not int or self.micro_batches < 1:
            raise FoldError(f"micro_batches={self.micro_batches!r} is no number of micro-batches.", valid="1 or more")
        if self.schedule not in SCHEDULES:
            raise FoldError(f"There is no schedule {self.schedule!r}.", valid=listed(SCHEDULES))
        if self.schedule == "1f1b" and self.micro_batches < self.stages:
            raise FoldError(
                f"Schedule 1f1b fills {self.stages} stages with as many micro-batches, and there are {self.micro_batches}.",
                valid=f"micro_batches={self.stages} or more, or schedule='gpipe'",
            )

    def orders(self, *, backward: bool) -> list[Order]:
        """What each stage does, in its order.

        Args:
            backward: gradients are asked for.
        """
        return [self._order(stage, backward=backward) for stage in range(self.stages)]

    def _order(self, stage: int, *, backward: bool) -> Order:
        count, last = self.micro_batches, self.stages - 1
        ahead = min(count, last - stage) if self.schedule == "1f1b" else count
        work = [(FORWARD, i) for i in range(ahead)]
        for i in range(ahead, count):
            work += [(FORWARD, i), (BACKWARD, i - ahead)]
        work += [(BACKWARD, i) for i in range(count - ahead, count)]
        found: list[Action] = []
        for kind, i in work:
            if kind == FORWARD:
                found += [Action(RECEIVE, i)] if stage > 0 else []
                found += [Action(FORWARD, i), *([Action(SEND, i)] if stage < last else [])]
                found += [] if backward else [Action(FREE, i)]
            elif backward:
                found += [Action(RECEIVE_GRADIENT, i)] if stage < last else []
                found += [Action(BACKWARD, i), *([Action(SEND_GRADIENT, i)] if stage > 0 else []), Action(FREE, i)]
        return tuple(found)


def is_late(action: Action) -> bool:
    """Whether an action belongs to a backward pass."""
    return action.kind in (RECEIVE_GRADIENT, BACKWARD, SEND_GRADIENT)


def in_step(orders: Sequence[Order]) -> Iterator[tuple[int, Action]]:
    """The actions of all stages as they run: each stage goes on as long as it waits for no other.

    Raises:
        FoldError: all stages that are left wait: for what, and whom.
    """
    places = [0] * len(orders)
    sent: dict[tuple[int, int], list[int]] = {}  # by sender and receiver, what is under way
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            while places[stage] < len(order) and _may(stage, order[places[stage]], sent):
                action = order[places[stage]]
                if action.kind in SENDS:
                    sent.setdefault((stage, stage + SENDS[action.kind]), []).append(action.micro_batch)
                if action.kind in RECEIVES:
                    sent[stage + RECEIVES[action.kind], stage].pop(0)
                places[stage] += 1
                moved = True
                yield stage, action
    waiting = {f"stage {s}": str(order[places[s]]) for s, order in enumerate(orders) if places[s] < len(order)}
    if waiting:
        raise FoldError("The stages of a pipeline wait for each other without end.", **waiting)
    if under_way := {f"{a} to {b}": listed(x) for (a, b), x in sent.items() if x}:
        raise FoldError("What a stage has sent is never received.", **under_way)


def _may(stage: int, action: Action, sent: dict[tuple[int, int], list[int]]) -> bool:
    if action.kind in SENDS:
        return not sent.get((stage, stage + SENDS[action.kind]))
    if action.kind in RECEIVES:
        return bool(sent.get((stage + RECEIVES[action.kind], stage)))
    return True
