"""Schedules: in which order each pipeline stage works on which micro-batch. Lists of actions, and what runs them in step.

    gpipe, 2 stages, 2 micro-batches        stage 0   F0 s0 F1 s1        r0 B0 f0 r1 B1 f1
                                            stage 1   r0 F0 r1 F1        B0 s0 f0 B1 s1 f1

A place of the axis pp has one stage, or several, so that a micro-batch passes all places several times, and a place waits less
for its first one (Narayanan et al., arXiv 2104.04473, section 2.2). Stages s, s + pp, s + 2 pp, ... are on place s; or, where a
schedule goes down and up again, the stages s and 2 pp - 1 - s. The orders are those of places.

Where a backward pass is in two (`passes/weights.py`), what a stage sends back is made first, and the gradients of its
parameters while it would wait (Qi et al., arXiv 2401.10241).

What a place sends to another one arrives in the order in which it was sent, on a channel for each pair of neighbours and each
direction of the model. A send starts when what was sent before on its channel has been received, but for the last few sends
that a schedule lets be under way; a receive waits for what comes. What goes to the next stage on the same place waits for
nothing.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.distributed.pipelining.schedules import get_schedule_class

from foldcc.errors import FoldError, divides, listed

SCHEDULES = ("gpipe", "1f1b", "zero-bubble", "zbv", "dualpipev")
_IN_V = {"zbv": "ZBVZeroBubble", "dualpipev": "DualPipeV"}  # down and up again; what `torch.distributed.pipelining` calls them
RECEIVE, FORWARD, SEND = "receive", "forward", "send"
RECEIVE_GRADIENT, BACKWARD, SEND_GRADIENT, FREE = "receive gradient", "backward", "send gradient", "free"
BACKWARD_INPUT, BACKWARD_WEIGHT = "backward of inputs", "backward of weights"
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
Channel = tuple[int, int, int]  # the place that sends, the one that receives, and 1 to the next stage or -1 to the one before


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
        if self.in_v and self.each != 2:
            raise FoldError(
                f"Schedule {self.schedule} goes down and up again, through two stages of each rank: "
                f"stages_per_rank={self.each}.",
                valid="stages_per_rank=2, or schedule='zero-bubble'",
            )
        if self.each > 1 and self.places == 1:
            raise FoldError(f"stages_per_rank={self.each} with pp=1: one rank has nobody to take turns with.", valid="1")
        if self.micro_batches < self._least:
            raise FoldError(
                f"Schedule {self.schedule} fills {self.stages} stages with {self._least} micro-batches at least, and there are "
                f"{self.micro_batches}.",
                valid=f"micro_batches={self._least} or more, or schedule='gpipe'",
            )
        if self.schedule in ("1f1b", "zero-bubble") and self.each > 1:
            divides(
                "micro-batches",
                self.micro_batches,
                "pp",
                self.places,
                valid=f"micro_batches: multiples of {self.places}; stages_per_rank=1; schedule='gpipe'",
            )

    @property
    def _least(self) -> int:
        """How many micro-batches a schedule needs."""
        known = {"gpipe": 1, "zbv": 2 * self.places - 1, "dualpipev": 2 * self.places}
        return known.get(self.schedule, self.places)

    @property
    def in_v(self) -> bool:
        """Whether stages go down the places and up again."""
        return self.schedule in _IN_V

    @property
    def in_turns(self) -> bool:
        """Whether backward passes begin before all forward passes have ended."""
        return self.schedule != "gpipe"

    @property
    def in_two(self) -> bool:
        """Whether backward passes are in two: what is sent back, and the gradients of parameters."""
        return self.schedule not in ("gpipe", "1f1b")

    @property
    def under_way(self) -> int:
        """How many sends of a channel may wait to be received. Interleaved and in two, a place runs ahead of the next one."""
        return self.places if self.schedule == "zero-bubble" and self.each > 1 else 1

    @property
    def stages(self) -> int:
        return self.places * self.each

    def place(self, stage: int) -> int:
        """Where a stage is."""
        turn, at = divmod(stage, self.places)
        return self.places - 1 - at if self.in_v and turn % 2 else at

    def at(self, place: int) -> tuple[int, ...]:
        """The stages of a place."""
        return tuple(s for s in range(self.stages) if self.place(s) == place)

    def channel(self, action: Action) -> Channel:
        """Where a send or a receive takes place."""
        if action.kind in SENDS:
            step, here = SENDS[action.kind], action.stage
        else:
            step = -RECEIVES[action.kind]
            here = action.stage - step
        return self.place(here), self.place(here + step), step

    def orders(self, *, backward: bool) -> list[Order]:
        """What each place does, in its order.

        Args:
            backward: gradients are asked for.
        """
        found = []
        for place in range(self.places):
            passes = _of_torch(_IN_V[self.schedule], self)[place] if self.in_v else tuple(self._passes(place))
            found.append(tuple(a for p in passes for a in self._with_transfers(p, backward=backward)))
        return found

    def _passes(self, place: int) -> Iterator[Action]:
        """Forward and backward passes of a place, in its order."""
        ahead, behind = self._ahead(place), place if self.in_two else 0
        steps = [*self._steps(place)]
        back = [(self.stages - self.places - stage + 2 * place, i) for stage, i in steps]  # the last stages first
        for k in range(len(steps) + ahead + behind):
            if k < len(steps):
                yield Action(FORWARD, steps[k][1], steps[k][0])
            if 0 <= k - ahead < len(steps):
                stage, i = back[k - ahead]
                yield Action(BACKWARD_INPUT if self.in_two else BACKWARD, i, stage)
            if self.in_two and 0 <= k - ahead - behind:
                stage, i = back[k - ahead - behind]
                yield Action(BACKWARD_WEIGHT, i, stage)

    def _ahead(self, place: int) -> int:
        """How many forward passes of a place come before its first backward pass."""
        count, later = self.micro_batches * self.each, self.places - 1 - place
        if self.schedule == "gpipe":
            return count
        # Each place is a step behind the one before, and a step back follows as soon as the last stage can make it. In two, a
        # step back takes as long as one ahead.
        both = 1 if self.each == 1 or self.in_two else 2
        return min(count, both * later + (self.each - 1) * self.places)

    def _steps(self, place: int) -> Iterator[tuple[int, int]]:
        """The stages of a place with their micro-batches, of which as many as places go through one stage before the next."""
        for start in range(0, self.micro_batches, self.places):
            for stage in range(place, self.stages, self.places):
                yield from ((stage, i) for i in range(start, min(start + self.places, self.micro_batches)))

    def _with_transfers(self, action: Action, *, backward: bool) -> Iterator[Action]:
        """A pass with what is received before it, and sent and freed behind it."""
        first, last = action.stage == 0, action.stage == self.stages - 1
        if action.kind == FORWARD:
            kinds = [RECEIVE] * (not first) + [FORWARD] + [SEND] * (not last) + [FREE] * (not backward)
        elif not backward:
            kinds = []
        elif action.kind == BACKWARD_WEIGHT:
            kinds = [BACKWARD_WEIGHT, FREE]
        else:
            kinds = [RECEIVE_GRADIENT] * (not last) + [action.kind] + [SEND_GRADIENT] * (not first)
            kinds += [FREE] * (action.kind == BACKWARD)
        return (Action(kind, action.micro_batch, action.stage) for kind in kinds)


@cache
def _of_torch(schedule: str, pipelining: Pipelining) -> tuple[Order, ...]:
    """The passes of each place as `torch.distributed.pipelining` orders them, which asks stages where they are and no more.

    Forward and backward passes that it would overlap come one behind the other, and a whole backward pass is one in two.
    """
    places, stages = pipelining.places, pipelining.stages
    told = {
        "group_size": places,
        "group_rank": 0,
        "num_stages": stages,
        "submod": nn.Identity(),
        "device": "cpu",
        "group": None,
    }
    mine = [SimpleNamespace(stage_index=s, is_first=s == 0, is_last=s == stages - 1, **told) for s in (0, stages - 1)]
    made: Any = get_schedule_class(schedule)(mine, pipelining.micro_batches)
    halves = [BACKWARD_INPUT, BACKWARD_WEIGHT]
    kinds = {"FORWARD": [FORWARD], "FULL_BACKWARD": halves, "BACKWARD_INPUT": halves[:1], "BACKWARD_WEIGHT": halves[1:]}
    found = []
    for place in range(places):
        every = [a for a in made.pipeline_order[place] if a is not None]
        each = [x for a in every for x in (a.sub_actions or (a,))]
        passes = ((k, a.microbatch_index, a.stage_index) for a in each for k in kinds[a.computation_type.name])
        found.append(tuple(Action(*x) for x in passes))
    return tuple(found)


def is_late(action: Action) -> bool:
    """Whether an action belongs to a backward pass."""
    return action.kind in (RECEIVE_GRADIENT, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, SEND_GRADIENT)


def in_step(orders: Sequence[Order], pipelining: Pipelining) -> Iterator[tuple[int, Action]]:
    """The actions of all places as they run: each place goes on as long as it waits for no other.

    Raises:
        FoldError: all places that are left wait: for what, and whom.
    """
    done = [0] * len(orders)
    sent: dict[Channel, deque[Action]] = defaultdict(deque)  # what is under way

    def may(action: Action) -> bool:
        if action.kind in SENDS:
            sender, receiver, _ = wire = pipelining.channel(action)
            return sender == receiver or len(sent[wire]) < pipelining.under_way
        return action.kind not in RECEIVES or bool(sent[pipelining.channel(action)])

    moved = True
    while moved:
        moved = False
        for place, order in enumerate(orders):
            while done[place] < len(order) and may(order[done[place]]):
                action = order[done[place]]
                if action.kind in SENDS:
                    sent[pipelining.channel(action)].append(action)
                if action.kind in RECEIVES:
                    sent[pipelining.channel(action)].popleft()
                done[place] += 1
                moved = True
                yield place, action
    waiting = {f"pp {p}": str(order[done[p]]) for p, order in enumerate(orders) if done[p] < len(order)}
    if waiting:
        raise FoldError("The stages of a pipeline wait for each other without end.", **waiting)
    if under_way := {f"from pp {place}": listed(x) for (place, _, _), x in sent.items() if x}:
        raise FoldError("What a stage has sent is never received.", **under_way)


def simulated(orders: Sequence[Order], pipelining: Pipelining, takes: Callable[[Action], float]) -> tuple[float, float]:
    """How long a step takes, and how long all places work in it together, where what they send takes no time.

    Args:
        takes: how long an action takes.
    """
    clocks, busy = [0.0] * len(orders), 0.0
    sent: dict[Channel, deque[float]] = defaultdict(deque)
    many = pipelining.under_way
    taken: dict[Channel, deque[float]] = defaultdict(lambda: deque([0.0] * many, many))  # when the last sends were received
    for place, action in in_step(orders, pipelining):
        if action.kind in SENDS:
            sender, receiver, _ = wire = pipelining.channel(action)
            clocks[place] = clocks[place] if sender == receiver else max(clocks[place], taken[wire][0])
            sent[wire].append(clocks[place])
        if action.kind in RECEIVES:
            wire = pipelining.channel(action)
            clocks[place] = max(clocks[place], sent[wire].popleft())
            taken[wire].append(clocks[place])
        work = takes(action)
        clocks[place], busy = clocks[place] + work, busy + work
    return max(clocks), busy


def bubble(orders: Sequence[Order], pipelining: Pipelining, *, backward: float = 2.0) -> float:
    """The share of a step in which places wait, where a forward pass of a stage takes 1.

    Args:
        backward: how long a backward pass of a stage takes; where it is in two, each takes half of that.
    """
    takes = {FORWARD: 1.0, BACKWARD: backward, BACKWARD_INPUT: backward / 2, BACKWARD_WEIGHT: backward / 2}
    whole, busy = simulated(orders, pipelining, lambda action: takes.get(action.kind, 0.0))
    return 1 - busy / (len(orders) * whole)
