"""Executable: a lowered program with its inputs and outputs, on real ranks or on virtual ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from foldcc.errors import FoldError
from foldcc.hooks import Events
from foldcc.ir.program import Program
from foldcc.ir.walk import follow
from foldcc.layout import Layout
from foldcc.ops.groups import active
from foldcc.runtime.accumulation import Accumulation, Phases
from foldcc.runtime.lost import collective_at, meeting
from foldcc.runtime.placement import cut, join, own_samples
from foldcc.runtime.simulate import simulate
from foldcc.runtime.under_way import Runner

After = Callable[[Mapping[str, Tensor | None]], None]
Others = Callable[[tuple[bool, ...]], tuple["Executable", Accumulation]]


@dataclass
class Executable:
    """Runs one program. Values are this rank's on a real mesh, and lists with an entry per rank on a virtual one.

    Attributes:
        program: lowered.
    """

    program: Program

    def __post_init__(self) -> None:
        self.virtual = self.program.mesh.is_virtual
        self.layouts: list[Layout] = [n.meta["layout"] for n in self.program.placeholders]
        self.outputs = self.program.outputs

    @cached_property
    def phases(self) -> Phases:
        assert self.program.backward is not None
        return Phases.of(self.program.backward, self.program.slots)

    def __call__(self, values: Sequence[Tensor], others: Others, after: After | None = None) -> list[Tensor]:
        """The outputs for the values of all slots, differentiable with respect to what gets a gradient among them.

        On a real mesh, they are this rank's samples: DTensors where they are divided otherwise too.

        Args:
            others: gives the program whose backward pass is for the gradients of these outputs, and whose forward pass is the
                same; and what gradients wait for a reduction.
            after: called behind each backward pass with the gradients of taps by name, laid out like outputs.
        """
        if self.program.backward is None:
            with torch.no_grad():
                outputs = self.forward(values)[0]
        else:
            outputs = list(_Step.apply(self, others, after, *values))
        return [self.own(x, n) for x, n in zip(outputs, self.outputs, strict=True)]

    @property
    def events(self) -> tuple[Events, Events]:
        """Of which this process calls the forward hooks, and the backward hooks."""
        return self.program.observed, self.program.observed

    def in_micro_batches(
        self, values: Sequence[Sequence[Any]], others: Others, after: After | None = None
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The outputs of a call, and for each micro-batch what hooks see: here there is one, which is all."""
        outputs = self(values[0], others, after)
        return outputs, [outputs]

    def own(self, x: Tensor, node: fx.Node) -> Tensor:
        return x if self.virtual else own_samples(x, node.meta["layout"], self.program.mesh)

    def no_gradient(self, position: int) -> Tensor:
        """Zeros like an output."""
        node = self.outputs[position]
        return self.own(self.zeros(node), node)

    def zeros(self, node: fx.Node) -> Tensor:
        """A tap, or zeros like another value, as a rank holds it."""
        like, layout = node.meta["val"], node.meta["layout"]
        return torch.zeros(layout.global_shape if self.virtual else layout.shape, dtype=like.dtype, device=like.device)

    def forward(self, values: Sequence[Tensor]) -> tuple[list[Tensor], list[Any]]:
        """The outputs, and what each call of a block saves for its backward pass."""
        result = self.run(self.program.graph, self.enter(values, self.layouts))
        if not self.virtual:
            return _leaves(result[0]), list(result[1])
        leaves = [_leaves(r[0]) for r in result]
        layouts, names = [n.meta["layout"] for n in self.outputs], [n.name for n in self.outputs]
        outputs = self.leave([list(per_rank) for per_rank in zip(*leaves, strict=True)], layouts, names)
        return outputs, [list(per_rank) for per_rank in zip(*(r[1] for r in result), strict=True)]

    # --- entry and exit: on a virtual mesh, global tensors are cut and joined here and nowhere else ---

    def enter(self, values: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Any]:
        if not self.virtual:
            return list(values)
        mesh = self.program.mesh
        return [[cut(v, layout, mesh, r) for r in range(mesh.world_size)] for v, layout in zip(values, layouts, strict=True)]

    def leave(self, values: Sequence[Any], layouts: Sequence[Layout], names: Sequence[str]) -> list[Any]:
        if not self.virtual:
            return list(values)
        mesh = self.program.mesh
        return [
            None if v is None else join(v, layout, mesh, name) for v, layout, name in zip(values, layouts, names, strict=True)
        ]

    def run(self, graph: fx.GraphModule, values: list[Any]) -> Any:
        """One graph, on this rank or on all virtual ones; virtual results are transposed to lists per value.

        The list of values is emptied, and each is freed behind the last block that reads it.
        """
        mesh = self.program.mesh
        with active(mesh), torch._C._DisableAutocast():  # what it casts is in the graph
            if self.virtual:
                return simulate(mesh, graph, values)
            with meeting(partial(collective_at, mesh)):
                return follow(graph, values, Runner(graph, ahead=self.program.plan.ahead > 0))


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, executable: Executable, others: Others, after: After | None, *values: Tensor) -> Any:
        outputs, kept = executable.forward([v.detach() for v in values])
        save(ctx, kept)
        ctx.programs, ctx.after = others, after
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for o, n in zip(outputs, executable.outputs, strict=True) if not n.meta["grad"]))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        refuse_second_order()
        executable: Executable
        executable, accumulation = ctx.programs(tuple(g is not None for g in gradients))
        layouts = [n.meta["layout"] for n in executable.program.objectives]
        tangents = executable.enter([g.contiguous() for g in gradients if g is not None], layouts)
        result = accumulation.backward(executable, [*saved(ctx), *tangents])
        placeholders = executable.program.placeholders
        if executable.virtual:
            columns = [None if any(x is None for x in c) else list(c) for c in zip(*result, strict=True)]
            names = [f"The gradient of {executable.program.slot(n.name).names[0]}" for n in placeholders]
            result = executable.leave(columns, executable.layouts, names)
        if ctx.after is not None:
            slots = executable.program.slots
            taps = {s.name: (g, n) for s, g, n in zip(slots, result, placeholders, strict=True) if s.kind == "tap"}
            ctx.after({name: g if g is None else executable.own(g, n) for name, (g, n) in taps.items()})
            result = [None if s.kind == "tap" else g for s, g in zip(slots, result, strict=True)]
        return (None, None, None, *result)


def refuse_second_order() -> None:
    """Raises inside a backward pass that is to be differentiated."""
    if torch.is_grad_enabled():
        raise FoldError(
            "Gradients of gradients were asked for with create_graph=True, and a backward pass has none.",
            valid="create_graph=False; gradients of gradients from the model in one process",
        )


def save(ctx: Any, values: list[Any]) -> None:
    """Hands tensors to autograd, each once, which frees them, checks that they were not changed, and has hooks for them."""
    leaves, ctx.spec = pytree.tree_flatten(values)
    tensors = {id(x): x for x in leaves if isinstance(x, Tensor)}
    places = {key: i for i, key in enumerate(tensors)}
    ctx.save_for_backward(*tensors.values())
    ctx.places = [places[id(x)] if isinstance(x, Tensor) else None for x in leaves]
    ctx.others = [None if isinstance(x, Tensor) else x for x in leaves]


def saved(ctx: Any) -> list[Any]:
    """What was saved; autograd lets go of it, unless there will be another backward pass."""
    tensors = ctx.saved_tensors
    ctx.maybe_clear_saved_tensors()
    leaves = [other if i is None else tensors[i] for i, other in zip(ctx.places, ctx.others, strict=True)]
    return pytree.tree_unflatten(leaves, ctx.spec)


def _leaves(outputs: Any) -> list[Any]:
    found: list[Any] = []
    for x in outputs:
        found += _leaves(x) if isinstance(x, (tuple, list)) else [x]
    return found
