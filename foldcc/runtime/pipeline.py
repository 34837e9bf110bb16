"""A program in micro-batches on pipeline stages: on a virtual mesh all of them, on a real one this rank's.

A call is cut into micro-batches along its samples. Each stage runs its piece of the main graphs (`runtime/stages.py`) for each
of them, in the order of the schedule (`runtime/schedule.py`). What each adds to a loss is added up, and they share the sums of
their counts; gradients add up over micro-batches and are then reduced once.

With `gpipe` the call runs all forward passes, and `backward()` all backward passes. With other schedules they take turns, so
that the call runs both, for a gradient of one; gradients are linear in it, and `backward()` multiplies them by the one that it
is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from foldcc.errors import FoldError
from foldcc.hooks import Events
from foldcc.ir.program import Program, told_outputs
from foldcc.layout import Layout, Shard, Symbol
from foldcc.mesh import SAMPLES, FoldedMesh
from foldcc.ops.share import micro_batches
from foldcc.runtime.accumulation import Phases
from foldcc.runtime.executable import After, Executable, Others, refuse_second_order, save, saved
from foldcc.runtime.micro_batches import Run
from foldcc.runtime.observing import Observing
from foldcc.runtime.placement import own_samples
from foldcc.runtime.schedule import Order, Pipelining, is_late
from foldcc.runtime.stages import Piece, Pieces, apart, cut, in_two, like
from foldcc.runtime.wires import create_wires, from_place, over_all_places, over_places
from foldcc.samples import samples_of_output
from foldcc.tree import Elsewhere


@dataclass
class Pipelined(Executable):
    """Runs one program, which is of one micro-batch and of one stage's mesh.

    Attributes:
        whole: the mesh with its pipeline stages.
        samples: of each output, which dimension is samples; None for what all of them have together, such as a loss.
        updates: by the position of an output, that of the slot of the buffer whose new value it is.
        count: of the outputs that a call has; those behind are each micro-batch's own, for hooks.
    """

    whole: FoldedMesh
    pipelining: Pipelining

    def __post_init__(self) -> None:
        super().__post_init__()
        self.samples = [samples_of_output(self.program, i, n) for i, n in enumerate(self.outputs)]
        names = [s.name for s in self.program.slots]
        self.updates = {i: names.index(name) for i, name in self.program.updates.items()}
        self.count = self.program.own + len(self.updates)
        for piece in (*self.ahead.stages, *(self.back.stages if self.trains else ())):
            for node in piece.sent:
                like(node)
        if self.in_turns and [n.meta["val"].dim() for n in self.program.objectives] != [0]:
            raise FoldError(
                f"Schedule {self.pipelining.schedule} runs backward passes inside the call, from one loss, and a training step "
                f"of this model goes back from {told_outputs(self.program.wanted or ())}.",
                valid="a model that returns a loss; schedule='gpipe'",
            )
        if self.in_turns and any(n.meta["val"].dtype == torch.float16 for n in _computed(self.program)):
            raise FoldError(
                f"Schedule {self.pipelining.schedule} goes back from a gradient of one, which is too small in float16, before "
                "a scaler can raise it.",
                valid="bfloat16; schedule='gpipe'",
            )
        self.observing = Observing(self) if self.program.observed else None

    @property
    def trains(self) -> bool:
        return self.program.backward is not None

    @property
    def events(self) -> tuple[Events, Events]:
        return ((), ()) if self.observing is None else (self.observing.ahead, self.observing.back)

    @property
    def in_turns(self) -> bool:
        """Whether backward passes run inside the call."""
        return self.trains and self.pipelining.in_turns

    @property
    def here(self) -> Sequence[int]:
        """The stages that this process runs."""
        return range(self.pipelining.stages) if self.virtual else self.pipelining.at(self.place)

    @property
    def place(self) -> int:
        """Where this process is along pp."""
        return self.whole.coordinate(self.whole.here, "pp")

    @cached_property
    def ahead(self) -> Pieces:
        return cut(self.program.graph, self.pipelining.stages)

    @cached_property
    def _phases(self) -> tuple[Phases, tuple[str, ...]]:
        main, slots = apart(self.program)
        return Phases.of(main, slots), tuple(s.name for s in slots)

    @cached_property
    def back(self) -> Pieces:
        taken = {len(self.terms) + k: stage for stage, piece in enumerate(self.reduce.stages) for k in piece.given}
        return cut(self._phases[0].first, self.pipelining.stages, backward=True, read=taken)

    @cached_property
    def halves(self) -> list[tuple[Piece, Piece]]:
        """The backward piece of each stage in two."""
        return [in_two(piece) for piece in self.back.stages]

    @cached_property
    def reduce(self) -> Pieces:
        return cut(self._phases[0].reduce, self.pipelining.stages, backward=True)

    @property
    def terms(self) -> tuple[str, ...]:
        """The slot of each gradient that backward pieces leave: one for each stage that adds to it."""
        return self._phases[1]

    @cached_property
    def apart(self) -> dict[int, str]:
        """By position, what backward pieces leave that is of one micro-batch: gradients of inputs and of taps, by slot."""
        own = {s.name for s in self.program.slots if s.kind in ("input", "tap")}
        return {k: name for k, name in enumerate(self.terms) if name in own}

    def adds_up(self, result: int) -> bool:
        """Whether what backward pieces leave is a gradient, or else what its reduction reads besides."""
        return (result < len(self.terms) and result not in self.apart) or result - len(self.terms) in self._phases[0].terms

    @cached_property
    def saves(self) -> int:
        """How many calls save something."""
        placeholders = self._phases[0].first.graph.find_nodes(op="placeholder")
        return len(placeholders) - len(self.program.objectives)

    def in_micro_batches(
        self, values: Sequence[Sequence[Any]], others: Others, after: After | None = None
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The outputs of all micro-batches together, differentiable with respect to parameters and inputs.

        On a real mesh losses are on every rank, and what else there is on the stage that makes it; elsewhere it is on meta.

        Args:
            values: of all slots, for each micro-batch; None for a parameter that is elsewhere.
            after: called behind each backward pass for each micro-batch with the gradients of taps by name.

        Returns:
            The outputs, and what forward hooks see of each micro-batch.
        """
        made: list[list[Any]] = []
        if self.trains:
            anchor = torch.empty((), requires_grad=True)  # a stage whose parameters are all frozen goes back as well
            later = [row[k] for row in values[1:] for k in self.inputs]
            outputs = list(_Steps.apply(self, others, values, after, made, anchor, *values[0], *later))
        else:
            with torch.no_grad():
                made += Run(self, self.entered(values)).through(self.orders(late=False)).outputs
                outputs = self.joined(made)
        seen = [self.observing.outputs(x) for x in made] if self.observing is not None else []
        return [x if self.virtual or x.is_meta else self._own(x, i) for i, x in enumerate(outputs)], seen

    @property
    def inputs(self) -> list[int]:
        """The positions of inputs that are given gradients."""
        return [k for k, slot in enumerate(self.program.slots) if slot.kind == "input" and slot.name in self.shared]

    def orders(self, *, late: bool | None = None) -> list[Order]:
        """What each stage does; what comes before its first backward pass alone, or what comes from then on."""
        found = []
        for order in self.pipelining.orders(backward=self.trains):
            first = next((k for k, action in enumerate(order) if is_late(action)), len(order))
            found.append(order if late is None else order[first:] if late else order[:first])
        return found

    # --- micro-batches, apart and together ---

    def entered(self, values: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """The values of each micro-batch as ranks hold them; what is the same in all of them is made once."""
        given: list[Any] = [v if v is None else v.detach() for v in values[0]]
        first = self.enter(given, self.layouts)
        found = [first]
        for row in values[1:]:
            new = [k for k, x in enumerate(row) if x is not values[0][k]]
            made = self.enter([row[k].detach() for k in new], [self.layouts[k] for k in new])
            found.append([*first])
            for k, x in zip(new, made, strict=True):
                found[-1][k] = x
        return found

    def joined(self, outputs: Sequence[Sequence[Any]]) -> list[Tensor]:
        """The outputs of the call, of those of its micro-batches."""
        found = []
        for i, several in enumerate(zip(*(x[: self.count] for x in outputs), strict=True)):
            several = several[-1:] if i in self.updates else several
            value, layout, maker = self.outputs[i].meta["val"], self.outputs[i].meta["layout"], self.ahead.maker(i)
            if maker in self.here:
                count = len(several)
                whole = self._together(i, self.leave(several, [layout] * count, [self.program.told_output(i)] * count))
            else:
                device = value.device if self.samples[i] is None else "meta"
                whole = torch.empty(self._shape(i), dtype=value.dtype, device=device)
            if self.samples[i] is None and not self.virtual:
                whole = from_place(whole, self.whole, self.pipelining.place(maker))
            found.append(whole)
        return found

    def tangents(self, gradients: Sequence[Tensor]) -> list[list[Any]]:
        """For each micro-batch the gradients of the outputs that are wanted, of those of the call."""
        wanted = [i for i, there in enumerate(self.program.wanted or ()) if there]
        columns = [self._apart(i, gradient) for i, gradient in zip(wanted, gradients, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]

    def _apart(self, i: int, gradient: Tensor) -> list[Any]:
        count, layout = self.pipelining.micro_batches, self.outputs[i].meta["layout"]
        if gradient.is_meta:  # of an output that is on another stage
            return [gradient] * count
        shape = layout.global_shape if self.virtual else layout.shape
        with torch.enable_grad():
            parts = [gradient.new_zeros(shape).requires_grad_() for _ in range(count)]
            each = torch.autograd.grad(self._together(i, parts), parts, gradient)
        return self.enter([g.contiguous() for g in each], [layout] * count)

    def _together(self, i: int, parts: Sequence[Tensor]) -> Tensor:
        """One output of all micro-batches: the sum of what each adds (`passes/average.py`); samples as the call had them."""
        dim = self.samples[i]
        if dim is None:
            return torch.stack(list(parts)).sum(0)
        return torch.stack([p.unflatten(dim, (self.program.mesh.passed, -1)) for p in parts], dim + 1).flatten(dim, dim + 2)

    def _whole(self, i: int) -> Layout:
        """The layout of an output of the call: its samples are those of each micro-batch after the other."""
        layout: Layout = self.outputs[i].meta["layout"]
        dim = self.samples[i]
        if dim is None:
            return layout
        count = Symbol("micro_batches", integer=True, positive=True)
        dims = tuple((count, *product) if d == dim else product for d, product in enumerate(layout.dims))
        moved = {
            axis: Shard(dim, state.start + 1, state.stop + 1) if isinstance(state, Shard) and state.dim == dim else state
            for axis, state in layout.states.items()
        }
        return replace(layout, dims=dims, sizes={**layout.sizes, count: self.pipelining.micro_batches}, states=moved)

    def _shape(self, i: int) -> list[Any]:
        """The shape of an output of the call with this rank's samples."""
        layout = self._whole(i)
        return list(replace(layout, states={a: s for a, s in layout.states.items() if a in SAMPLES}).shape)

    def _own(self, x: Tensor, i: int) -> Tensor:
        return own_samples(x, self._whole(i), self.program.mesh)

    # --- pieces ---

    def piece(self, piece: Piece, values: list[Any]) -> Sequence[list[Any]]:
        """What a stage makes, what it sends, and what it leaves."""
        with micro_batches(self.pipelining.micro_batches):
            result = self.run(piece.graph, values)
        if not self.virtual:
            return [list(several) for several in result]
        return [[list(x) for x in zip(*of_ranks, strict=True)] for of_ranks in zip(*result, strict=True)]

    def each(self, function: Callable[..., Tensor], *values: Any) -> Any:
        """A function of tensors, on this rank or on each of the virtual ones."""
        return [function(*x) for x in zip(*values, strict=True)] if self.virtual else function(*values)

    def gradients(self, run: Run) -> list[Tensor | None]:
        """The gradients of slots, of all stages that use them together; on a real mesh, of those on this one."""
        of = run.gradients()
        found: list[Tensor | None] = []
        for slot, node in zip(self.program.slots, self.program.placeholders, strict=True):
            several = [gradients[slot.name] for gradients in of if slot.name in gradients]
            if not several:
                found.append(None)
                continue
            total = several[0]
            for x in several[1:]:
                total = self.each(torch.add, total, x)
            places = self._places(self.shared.get(slot.name, ()))
            if not self.virtual and len(places) > 1:
                total = over_places(total, self.whole, places)
            what = f"The gradient of {slot.names[0]}"
            found += self.leave([total], [node.meta["layout"]], [what])
        return found

    def of_inputs(self, run: Run) -> list[list[Tensor]]:
        """For each micro-batch the gradients of its inputs, which all stages have."""
        found: list[list[Tensor]] = [[] for _ in run.apart]
        for k in self.inputs:
            name, node = self.program.slots[k].name, self.program.placeholders[k]
            each = [of.get(name) for of in run.apart]
            if not self.virtual and self.whole.size("pp") > 1:
                terms = torch.stack([self.zeros(node) if x is None else x for x in each])
                each = list(over_all_places(terms, self.whole, largest=False))
            what = f"The gradient of {self.program.slots[k].names[0]}"
            for row, x in zip(found, each, strict=True):
                row += self.leave([x], [node.meta["layout"]], [what])
        return found

    @cached_property
    def shared(self) -> dict[str, tuple[int, ...]]:
        """By slot, the stages that add to its gradient."""
        found: dict[str, set[int]] = {}
        for pieces in (self.back, self.reduce) if self.trains else ():
            for stage, piece in enumerate(pieces.stages):
                for k in piece.results:
                    if k < len(self.terms):
                        found.setdefault(self.terms[k], set()).add(stage)
        return {name: tuple(sorted(stages)) for name, stages in found.items()}

    def keep_own(self, tree: nn.Module, elsewhere: Elsewhere) -> None:
        """Leaves a tree the parameters that this rank's stage uses, and has process groups between the stages."""
        places = {name: self._places(stages) for name, stages in self.program.plan.stages.items()}
        create_wires(self.whole, [p for p in (*places.values(), *map(self._places, self.shared.values())) if len(p) > 1])
        held = [s.names for s in self.program.slots if s.kind == "parameter"]
        elsewhere.leave(tree, {n for names in held if self.place not in places.get(names[0], (self.place,)) for n in names})
        elsewhere.counted |= {names[0] for names in held if self.place in places.get(names[0], ())[1:]}

    def _places(self, stages: Sequence[int]) -> tuple[int, ...]:
        """Where stages are."""
        return tuple(sorted({self.pipelining.place(s) for s in stages}))


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        executable: Pipelined,
        others: Others,
        values: Sequence[Sequence[Any]],
        after: After | None,
        made: list[list[Any]],
        *_: Any,
    ) -> Any:
        entered = executable.entered(values)
        ctx.in_turns, ctx.programs, ctx.executable, ctx.after = executable.in_turns, others, executable, after
        if executable.in_turns:
            node = executable.program.objectives[0]
            one = torch.ones((), dtype=node.meta["val"].dtype, device=node.meta["val"].device)
            run = Run(executable, entered, executable.tangents([one])).through(executable.orders())
            save(ctx, [executable.gradients(run), executable.of_inputs(run), run.apart])
        else:
            run = Run(executable, entered).through(executable.orders(late=False))
            save(ctx, [run.saved])
        made += run.outputs
        outputs = executable.joined(run.outputs)
        ctx.set_materialize_grads(False)
        nodes = executable.outputs[: executable.count]
        ctx.mark_non_differentiable(*(o for o, n in zip(outputs, nodes, strict=True) if not n.meta["grad"]))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        refuse_second_order()
        executable: Pipelined = ctx.executable
        seen = len(executable.outputs) - len(gradients)
        wanted = (*(g is not None for g in gradients), *[False] * seen)
        given = [g for g in gradients if g is not None]
        factor = None
        if not ctx.in_turns:
            executable, _ = ctx.programs(wanted)
            # Nothing else holds what is saved, so that it is freed as backward passes go.
            run = Run(executable, (), executable.tangents(given), *saved(ctx)).through(executable.orders(late=True))
            of_slots, of_inputs, apart = executable.gradients(run), executable.of_inputs(run), run.apart
        elif wanted != executable.program.wanted:
            raise FoldError(
                f"Schedule {executable.pipelining.schedule} went back from {told_outputs(executable.program.wanted or ())} "
                f"inside the call, and the backward pass is given the gradients of {told_outputs(wanted)}.",
                valid="loss.backward() of the loss that the model returns; schedule='gpipe'",
            )
        else:
            ctx.programs(wanted)
            (factor,) = given
            of_slots, of_inputs, apart = saved(ctx)
            of_slots = [None if x is None else x * factor for x in of_slots]
            of_inputs = [[x * factor for x in row] for row in of_inputs]
        if ctx.after is not None and executable.observing is not None:
            for taps in apart:
                ctx.after(executable.observing.gradients(taps, factor))
        for k, x in zip(executable.inputs, of_inputs[0], strict=True):
            of_slots[k] = x
        return (*[None] * 6, *of_slots, *(x for row in of_inputs[1:] for x in row))


def _computed(program: Program) -> list[fx.Node]:
    """What blocks compute, as tensors."""
    return [n for _, n in program.nodes() if isinstance(n.meta.get("val"), Tensor)]
