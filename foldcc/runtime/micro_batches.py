"""One call in micro-batches: the actions of a schedule, done on the stages that this process runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foldcc.runtime.schedule import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    FREE,
    RECEIVE,
    RECEIVES,
    SENDS,
    Action,
    Order,
    in_step,
)
from foldcc.runtime.stages import Piece
from foldcc.runtime.wires import Wires

if TYPE_CHECKING:
    from foldcc.runtime.pipeline import Pipelined

Saved = dict[tuple[int, int], dict[int, Any]]  # by stage and micro-batch, what calls save, by position


class Run:
    """Passes under way.

    Attributes:
        values: of all slots, as ranks hold them, for each micro-batch.
        tangents: of the outputs that are wanted, for each micro-batch.
        saved: what forward passes have left for backward passes.
        outputs: of each micro-batch.
        apart: of each micro-batch, the gradients of slots that are its own, by name.
    """

    def __init__(
        self,
        executable: Pipelined,
        values: Sequence[Sequence[Any]] = (),
        tangents: Sequence[Sequence[Any]] = (),
        saved: Mapping[tuple[int, int], dict[int, Any]] | None = None,
    ):
        self.executable, self.values, self.tangents = executable, [list(row) for row in values], tangents
        self.saved: Saved = dict(saved or {})
        self.wires = Wires(executable.whole, executable.pipelining)
        self.outputs: list[list[Any]] = [[None] * len(executable.outputs) for _ in values]
        self.apart: list[dict[str, Any]] = [{} for _ in range(executable.pipelining.micro_batches)]
        self._shared = self._counts() if values else []
        self._entering: dict[tuple[int, int], list[Any]] = {}
        self._leaving: dict[tuple[int, int], list[Any]] = {}
        self._waiting: dict[tuple[int, int], list[Any]] = {}  # what the second half of a backward pass is given
        self._sums: dict[int, dict[int, Any]] = defaultdict(dict)  # by stage, what its backward piece makes, by position
        self._dtypes: dict[int, torch.dtype] = {}

    def through(self, orders: Sequence[Order]) -> Run:
        """Does what the stages of this process have to do."""
        run = self.executable
        actions = (a for _, a in in_step(orders, run.pipelining)) if run.virtual else orders[run.place]
        for action in actions:
            self._do(action)
        self.wires.finish()
        return self

    def _do(self, action: Action) -> None:
        kind, stage, place = action.kind, action.stage, (action.stage, action.micro_batch)
        if kind in SENDS:
            self.wires.send(action, self._leaving.pop(place))
        elif kind in RECEIVES:
            pieces = self.executable.ahead if kind == RECEIVE else self.executable.back
            self._entering[place] = self.wires.receive(action, pieces.stages[stage].received)
        elif kind == FORWARD:
            self._forward(place)
        elif kind == BACKWARD:
            self._back(place, self.executable.back.stages[stage])
        elif kind == BACKWARD_INPUT:
            self._waiting[place] = self._back(place, self.executable.halves[stage][0])
        elif kind == BACKWARD_WEIGHT:
            second = self.executable.halves[stage][1]
            made, _, _ = self.executable.piece(second, self._waiting.pop(place))
            self._add(place, second, made)
        else:
            assert kind == FREE
            self.saved.pop(place, None)  # a backward pass frees it piece by piece

    def _counts(self) -> list[Any]:
        """What micro-batches share: the sum of what each has."""
        run, piece = self.executable, self.executable.ahead.counts
        if not any(run.ahead.stages[s].shared for s in run.here):
            return []
        each = [run.piece(piece, [values[k] for k in piece.given])[0] for values in self.values]
        return [run.each(lambda *x: torch.stack(x).sum(0), *several) for several in zip(*each, strict=True)]

    def _forward(self, place: tuple[int, int]) -> None:
        stage, i = place
        piece, count = self.executable.ahead.stages[stage], len(self.executable.outputs)
        given = [*(self.values[i][k] for k in piece.given), *(self._shared[k] for k in piece.shared)]
        made, self._leaving[place], _ = self.executable.piece(piece, [*given, *self._entering.pop(place, ())])
        self.saved[place] = {}
        for k, x in zip(piece.results, made, strict=True):
            if k < count:
                self.outputs[i][k] = x
                if k in self.executable.updates and i + 1 < len(self.values):
                    self.values[i + 1][self.executable.updates[k]] = x
            else:
                self.saved[place][k - count] = x

    def _back(self, place: tuple[int, int], piece: Piece) -> list[Any]:
        """Runs a backward pass, or its first half: what that leaves."""
        i, saves = place[1], self.executable.saves
        saved = self.saved.pop(place)
        given = [saved[k] if k < saves else self.tangents[i][k - saves] for k in piece.given]
        del saved
        given += self._entering.pop(place, ())
        made, self._leaving[place], left = self.executable.piece(piece, given)
        self._add(place, piece, made)
        return left

    def _add(self, place: tuple[int, int], piece: Piece, made: Sequence[Any]) -> None:
        """Adds what a backward pass makes to what those of other micro-batches have made."""
        (stage, i), run = place, self.executable
        sums = self._sums[stage]
        for k, x in zip(piece.results, made, strict=True):
            if k in run.apart:
                of, name = self.apart[i], run.apart[k]
                of[name] = x if name not in of else run.each(torch.add, of[name], x)
                continue
            self._dtypes[k] = (x[0] if run.virtual else x).dtype
            wide = run.each(_wide, x) if run.adds_up(k) else x
            sums[k] = run.each(torch.add, sums[k], wide) if k in sums and run.adds_up(k) else wide

    def gradients(self) -> list[dict[str, Any]]:
        """By stage of this process, the gradients of slots by name: reduced over ranks, and of what this stage alone adds."""
        found = []
        for stage in self.executable.here:
            sums, piece = self._sums[stage], self.executable.reduce.stages[stage]
            names = self.executable.terms
            narrow = {k: self.executable.each(partial(Tensor.to, dtype=self._dtypes[k]), x) for k, x in sums.items()}
            made, *_ = self.executable.piece(piece, [narrow[len(names) + k] for k in piece.given])
            terms = {k: x for k, x in narrow.items() if k < len(names)} | dict(zip(piece.results, made, strict=True))
            of: dict[str, Any] = {}
            for k, x in terms.items():
                of[names[k]] = x if names[k] not in of else self.executable.each(torch.add, of[names[k]], x)
            found.append(of)
        return found


def _wide(x: Tensor) -> Tensor:
    """What is added up over micro-batches has 32 bits at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
