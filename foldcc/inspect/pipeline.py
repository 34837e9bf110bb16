"""What ranks do and hold that are places of a pipeline: pieces of a program (`runtime/stages.py`), in the order of a schedule.

A stage's passes are walked once; what they keep is then added up along the actions of each place, for all its micro-batches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from foldcc.inspect.collectives import Collective, Collectives, sent
from foldcc.inspect.flops import local_flops
from foldcc.inspect.memory import MOMENTS, Memory, Policies, Storage, Walk, outside
from foldcc.inspect.memory import memory as memory_of
from foldcc.ir.sizes import human
from foldcc.ir.walk import BACKWARD, FORWARD
from foldcc.runtime import schedule
from foldcc.runtime.executable import Executable
from foldcc.runtime.pipeline import Pipelined
from foldcc.runtime.stages import Piece, like
from foldcc.tables import table

WEIGHT = "backward, parameters"  # of a pass in two, the second

__all__ = ["Pipeline", "Place", "Policies", "elements", "memory", "pipeline"]


@dataclass(frozen=True)
class Place:
    """One place of `pp`.

    Attributes:
        stages: of the pipeline, that it has.
        flops, again: of one of its ranks in a call, and those of them that the backward pass computes again.
        parameters: elements on one of its ranks.
        sent: the collectives of one of its ranks in a call, and what it sends to other places.
        memory: bytes on one of its ranks.
    """

    stages: tuple[int, ...]
    flops: int
    again: int
    parameters: int
    sent: Collectives
    memory: Memory


@dataclass(frozen=True)
class Pipeline:
    """The places of a pipeline.

    Attributes:
        told: the schedule.
        waits: the share of a step in which ranks wait, if stages take as long as each other, and twice as long backward.
    """

    places: tuple[Place, ...]
    told: str
    waits: float

    @property
    def fullest(self) -> Place:
        return max(self.places, key=lambda p: p.memory.peak)

    def __str__(self) -> str:
        head = ["pp", "stages", "FLOPs", "sent", "parameters", "moments", "gradients", "kept", "a step", "at its highest"]
        rows = []
        for number, place in enumerate(self.places):
            held = place.memory
            sizes = (held.parameters, held.moments, held.gradients, held.kept, held.step, held.peak)
            stages = " ".join(map(str, place.stages))
            share = f"{place.flops / max(1, self.flops):.1%}"
            rows.append([str(number), stages, share, *map(human, (place.sent.bytes(), *sizes))])
        return f"{self.told}; if stages take as long, ranks wait {self.waits:.1%} of a step\n" + table(
            head, rows, right=range(2, len(head))
        )

    @property
    def flops(self) -> int:
        """Of one rank of each place together."""
        return sum(p.flops for p in self.places)


def pipeline(executable: Pipelined) -> Pipeline:
    """What each place does and holds in a call."""
    cut = executable.pipelining
    each = f" of {cut.each} stages on each rank" if cut.each > 1 else ""
    return Pipeline(
        tuple(_place(executable, place) for place in range(cut.places)),
        f"{cut.micro_batches} micro-batches, {cut.schedule}{each}",
        schedule.bubble(cut.orders(backward=executable.trains), cut),
    )


def elements(shape: Iterable[Any]) -> int:
    return math.prod(int(n) for n in shape)


def memory(executable: Executable) -> Memory:
    """What a rank holds in a training step; with pipeline stages, the one that holds most."""
    if isinstance(executable, Pipelined):
        return pipeline(executable).fullest.memory
    return memory_of(executable.program)


def _place(executable: Pipelined, place: int) -> Place:
    cut, program = executable.pipelining, executable.program
    stages = cut.at(place)
    mains = [(FORWARD, executable.ahead.stages[s].graph) for s in stages]
    if executable.trains:
        mains += [(BACKWARD, pieces.stages[s].graph) for s in stages for pieces in (executable.back, executable.reduce)]
    flops, again = (cut.micro_batches * sum(local_flops(program, mains, again=x).values()) for x in (False, True))
    here = {name for name, at in program.plan.stages.items() if not set(at).isdisjoint(stages)}
    slots = [s for s in program.slots if s.kind == "parameter" and (s.names[0] in here or not program.plan.stages)]
    layouts = program.layouts()
    count = sum(elements(layouts[s.name].shape) for s in slots)
    held = _memory(executable, place, stages, {s.name for s in slots})
    return Place(stages, flops + again, again, count, _sent(executable, stages), held)


def _sent(executable: Pipelined, stages: Sequence[int]) -> Collectives:
    """What one rank sends: in the passes of each micro-batch, and in the reductions that are made once."""
    program, calls = executable.program, executable.pipelining.micro_batches
    passes = [(FORWARD, executable.ahead.stages[s]) for s in stages]
    passes += [(BACKWARD, executable.back.stages[s]) for s in stages] if executable.trains else []
    if any(piece.shared for _, piece in passes):
        passes.append((FORWARD, executable.ahead.counts))
    rows = [replace(c, calls=c.calls * calls) for c in sent(program, [(direction, piece.graph) for direction, piece in passes])]
    if executable.trains:
        rows += sent(program, [(BACKWARD, executable.reduce.stages[s].graph) for s in stages])
    across = [(direction, like(n)) for direction, piece in passes for n in piece.sent]
    return Collectives([*rows, *(Collective("send", ("pp",), way, "", calls, x.nbytes, False, x.dtype) for way, x in across)])


def _memory(executable: Pipelined, place: int, stages: Sequence[int], parameters: set[str]) -> Memory:
    """Bytes of one place along its actions."""
    cut, program = executable.pipelining, executable.program
    given = outside(program)
    held = Counter[str]()
    for slot, there in zip(program.slots, given, strict=True):
        held[slot.kind] += int(there.bytes) if slot.kind != "parameter" or slot.name in parameters else 0
    passes = {s: _Passes(executable, s, given) for s in stages}
    live, kept, sums = 0.0, 0.0, dict[int, float]()
    highest, at, most = dict.fromkeys((FORWARD, BACKWARD), 0.0), {FORWARD: "", BACKWARD: ""}, 0.0

    def reach(direction: str, bytes_: float, module: str) -> None:
        if bytes_ > highest[direction]:
            highest[direction], at[direction] = bytes_, module

    for action in cut.orders(backward=executable.trains)[place]:
        of = passes[action.stage]
        if action.kind == schedule.FORWARD:
            reach(FORWARD, live + kept + sum(sums.values()) + of.forward, of.at[FORWARD])
            live, kept = live + of.outputs, kept + of.kept
            most = max(most, kept)
        elif action.kind in (schedule.BACKWARD, schedule.BACKWARD_INPUT):
            kept -= of.kept
            reach(BACKWARD, live - of.outputs + kept + sum(sums.values()) + of.backward, of.at[BACKWARD])
            kept += of.waits
            most = max(most, kept)
            sums[action.stage] = of.sums
        elif action.kind == schedule.BACKWARD_WEIGHT:
            kept -= of.waits
            reach(BACKWARD, live - of.outputs + kept + sum(sums.values()) + of.weight, of.at[WEIGHT])
    reach(FORWARD, 2 * live, "")  # the outputs of all micro-batches, put together
    for of in passes.values():
        reach(BACKWARD, live + sum(sums.values()) + of.reduce, "")
    gradients = float(held["parameter"]) if executable.trains else 0.0
    if executable.in_turns:
        reach(BACKWARD, live + 2 * gradients, "")  # those of the call, and what `backward()` makes of them
    direction = max(highest, key=lambda d: highest[d])
    return Memory(
        parameters=held["parameter"],
        buffers=held["buffer"] + held["constant"],
        inputs=(held["input"] + held["key"]) * cut.micro_batches,
        gradients=gradients,
        moments=MOMENTS * held["parameter"],
        kept=most,
        outputs=live,
        forward=highest[FORWARD],
        backward=highest[BACKWARD],
        at=(at[direction], direction),
        communication=max(of.communication for of in passes.values()),
    )


class _Passes:
    """A stage's passes of one micro-batch.

    Attributes:
        forward, backward, weight, reduce: the most that lives at once in each, with what it is given, but for the sums of
            gradients. Where the backward pass is in two, `backward` is of the first half, and `weight` of the second.
        outputs: what the forward pass leaves for the call; kept: and for the backward pass alone.
        waits: what the first half of a backward pass leaves for the second, and what of `kept` that reads too.
        sums: gradients as they add up over micro-batches.
    """

    def __init__(self, executable: Pipelined, stage: int, slots: Sequence[Storage]):
        ahead, count = executable.ahead.stages[stage], len(executable.outputs)
        self.walk, self.at = Walk(executable.program), dict[str, str]()
        shared = [Storage(0.0, outside=True) for _ in ahead.shared]
        given = [*(slots[k] for k in ahead.given), *shared]
        made, self.forward, _ = self._run(ahead, given, FORWARD)
        saved = {k - count: x for k, x in made.items() if k >= count}
        self.outputs = self.walk.bytes([x for k, x in made.items() if k < count])
        self.kept = self.walk.live - self.outputs
        self.backward = self.weight = self.waits = self.reduce = self.sums = 0.0
        if executable.trains:
            self._back(executable, stage, saved)
        self.communication = self.walk.communication

    def _back(self, executable: Pipelined, stage: int, saved: Mapping[int, Any]) -> None:
        back, reduce, names = executable.back.stages[stage], executable.reduce.stages[stage], executable.terms
        tangents = [Storage(self.walk.size(n.meta["val"])) for n in executable.program.objectives]
        self.walk.take(tangents)
        given = [saved[k] if k < executable.saves else tangents[k - executable.saves] for k in back.given]
        if not executable.pipelining.in_two:
            terms, self.backward, _ = self._run(back, given, BACKWARD)
        else:
            first, second = executable.halves[stage]
            terms, self.backward, left = self._run(first, given, BACKWARD)
            self.waits = self.walk.bytes(left)
            later, self.weight, _ = self._run(second, (), WEIGHT, left)
            terms |= later
        results = dict(zip(back.results, back.graph.graph.output_node().args[0][0], strict=True))
        for k, x in terms.items():
            narrow = results[k].meta["val"].element_size() if executable.adds_up(k) else 4
            self.sums += self.walk.bytes([x]) * max(4, narrow) / narrow
        _, self.reduce, _ = self._run(reduce, [terms[len(names) + k] for k in reduce.given], "reduce")

    def _run(
        self, piece: Piece, given: Sequence[Any], direction: str, received: Sequence[Any] | None = None
    ) -> tuple[dict[int, Any], float, Sequence[Any]]:
        """What a piece makes, by position, the most that lives at once, and what it leaves; what it sends has left."""
        if received is None:
            received = [Storage(like(n).nbytes) for n in piece.received]
            self.walk.take(received)
        self.walk.highest = self.walk.live
        made, sent, left = self.walk.run(piece.graph, [*given, *received], direction, used_up=True)
        self.at[direction] = self.walk.at[0]
        self.walk.drop(sent)
        return dict(zip(piece.results, made, strict=True)), self.walk.highest, left
