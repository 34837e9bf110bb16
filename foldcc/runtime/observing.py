"""Hooks on modules of a program in micro-batches: which of them this process calls, and with what.

Hooks are called for each micro-batch on the ranks of the stage that has the module. Of a module on several stages, those that
PyTorch calls before a forward pass, or behind a backward pass, are called where it begins, and the others where it ends; what
they see of other stages goes there behind the passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from foldcc.errors import FoldError
from foldcc.hooks import Events, Result, Seen
from foldcc.runtime.stages import like
from foldcc.runtime.wires import from_place

if TYPE_CHECKING:
    from foldcc.runtime.pipeline import Pipelined


class Observing:
    """The hooks of one process.

    Attributes:
        ahead, back: the events whose forward hooks, and whose backward hooks, this process calls.
    """

    def __init__(self, executable: Pipelined):
        self.executable = executable
        program = executable.program
        self._made = {s.name: n for s, n in zip(program.slots, program.placeholders, strict=True) if s.kind == "tap"}
        ahead = [(event, self._begins_or_ends(*event)) for event in program.observed]
        back = [(event, self._goes_back(*event)) for event in program.observed]
        self.ahead, self.back = self._here(ahead), self._here(back)
        # What is called elsewhere than it is made, by place: outputs by position, and taps by name.
        self._outputs = self._moved([(i, executable.ahead.maker(i), stage) for e, stage in ahead for i in _entered(*e)])
        self._taps = self._moved([(t, self._of_tap(t), stage) for e, stage in back for t in _taps(*e)])
        for node in (*(executable.outputs[i] for i in self._outputs), *(self._made[t] for t in self._taps)):
            like(node)

    # --- where ---

    def _begins_or_ends(self, seen: Seen, ends: bool) -> int:
        held = [at for name, at in self.executable.program.plan.stages.items() if name.startswith(f"{seen.path}.")]
        return max([min((s for at in held for s in at), default=0), *map(self.executable.ahead.maker, _entered(seen, ends))])

    def _goes_back(self, seen: Seen, ends: bool) -> int:
        return min(map(self._of_tap, _taps(seen, ends)), default=0)

    def _of_tap(self, name: str) -> int:
        """The stage that makes the gradient of a tap."""
        return min(self.executable.shared.get(name, (0,)))

    def _place(self, stage: int) -> int:
        return self.executable.pipelining.place(stage)

    def _here(self, events: Iterable[tuple[tuple[Seen, bool], int]]) -> Events:
        run = self.executable
        return [event for event, stage in events if run.virtual or self._place(stage) == run.place]

    def _moved(self, read: Iterable[tuple[Any, int, int]]) -> dict[Any, int]:
        if self.executable.virtual:
            return {}
        return {x: self._place(made) for x, made, stage in read if self._place(made) != self._place(stage)}

    # --- what ---

    def outputs(self, made: Sequence[Any]) -> list[Tensor]:
        """The outputs of a micro-batch as hooks see them. Collective, if some go to other stages."""
        run, found = self.executable, list(made)
        for i, place in self._outputs.items():
            found[i] = self._from(place, found[i], run.outputs[i])
        there = [i for i, x in enumerate(found) if x is not None]
        layouts = [run.outputs[i].meta["layout"] for i in there]
        whole = run.leave([found[i] for i in there], layouts, [run.program.told_output(i) for i in there])
        for i, x in zip(there, whole, strict=True):
            found[i] = self._seen(run.own(x, run.outputs[i]), run.outputs[i])
        return found

    def gradients(self, made: Mapping[str, Any], factor: Tensor | None = None) -> dict[str, Tensor | None]:
        """The gradients of taps of a micro-batch. Collective, if some go to other stages.

        Args:
            factor: what they are multiplied by.
        """
        run, found = self.executable, dict[str, Tensor | None]()
        for name, node in self._made.items():
            x = made.get(name)
            if name in self._taps and name in run.shared:
                x = self._from(self._taps[name], x, node)
            if x is not None:
                (x,) = run.leave([x], [node.meta["layout"]], [f"The gradient of {name}"])
                x = run.own(x if factor is None else x * factor, node)
            found[name] = x
        return found

    def _from(self, place: int, x: Any, node: fx.Node) -> Any:
        return from_place(self.executable.zeros(node) if x is None else x, self.executable.whole, place)

    def _seen(self, x: Tensor, node: fx.Node) -> Tensor:
        if not (self.executable.trains and node.meta["grad"]):
            return x
        return _Seen.apply(x, torch.empty((), requires_grad=True))


class _Seen(torch.autograd.Function):
    """What a hook sees of a micro-batch, which has a gradient that nothing asks for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise FoldError(
            "A loss is computed of what a hook on a module was given, which in micro-batches is there to be looked at.",
            valid="a model that returns it; micro_batches=1 and pp=1",
        )


def _entered(seen: Seen, ends: bool) -> list[int]:
    """The positions of the program's results that a forward hook is called with, behind a module or before it."""
    given: Any = (seen.args, seen.kwargs, seen.output) if ends else (seen.args, seen.kwargs)
    return [x.position for x in pytree.tree_leaves(given) if isinstance(x, Result)]


def _taps(seen: Seen, ends: bool) -> list[str]:
    """The taps whose gradients a backward hook is called with."""
    return [t for t in (*seen.leaving, *(() if ends else seen.entering)) if t is not None]
