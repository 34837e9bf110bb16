"""A program that has no backward pass yet, over a field on all ranks at once, with the gradients that autograd gives it.

A value is one whole tensor while the program is a global one, and a list with one tensor per rank from where it is not: in
the dispatch stage between two crossings of the fold, in the localize stage everywhere. A collective takes part in
autograd as one function of all ranks' values, and its transpose runs in lock-step as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from foldcc.ir.program import Program, Slot
from foldcc.layout import INVARIANT, PARTIAL, VARYING, Layout
from foldcc.mesh import FoldedMesh
from foldcc.ops import record
from foldcc.ops.groups import active
from foldcc.ops.layout import cross_fold, reshard
from foldcc.ops.operator import Operator
from foldcc.runtime.placement import cut, join
from foldcc.runtime.simulate import simulate
from foldcc.verification.lockstep import Ranked, leaves
from foldcc.verification.mode import FieldMode
from foldcc.verification.reference import Reference, call


class OnRanks:
    """Runs one program that has not been differentiated.

    Attributes:
        outputs: of the main graph, each whole or on each rank.
        layouts: of the outputs and of the gradients, as far as they are not whole.
    """

    def __init__(self, program: Program, reference: Reference, wanted: Sequence[bool]):
        self.program, self.reference, self.wanted = program, reference, wanted
        self.local = "localized" in program.properties
        self.slots = {
            slot.name: self._entering(slot, node) for slot, node in zip(program.slots, program.placeholders, strict=True)
        }
        with FieldMode(reference.field), active(program.mesh):
            self.outputs: list[Any] = leaves(_run(program, program.graph, list(self.slots.values())))
        returned: list[fx.Node] = []
        fx.map_arg(program.output.args[0], returned.append)
        self.layouts: list[Layout | None] = [n.meta["layout"] if self.local else None for n in returned]

    def _entering(self, slot: Slot, node: fx.Node) -> Tensor | Ranked:
        x, trained = self.reference.inputs[slot.name], slot.grad
        if not self.local:
            return x.clone().requires_grad_(trained)
        mesh = self.program.mesh
        return Ranked(cut(x, node.meta["layout"], mesh, r).clone().requires_grad_(trained) for r in range(mesh.world_size))

    def gradients(self) -> dict[str, Any]:
        """Each parameter's gradient, whole or on each rank, for the tangents of the outputs that are wanted."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for x, tangent, layout, wanted in zip(self.outputs, self.reference.tangents, self.layouts, self.wanted, strict=True):
            if tangent is not None and wanted:
                pairs += zip(_each(x), _each(self._tangent(tangent, layout)), strict=True)
        names = [s.name for s in self.program.slots if s.grad]
        leaves = [x for name in names for x in _each(self.slots[name])]
        with FieldMode(self.reference.field), active(self.program.mesh):
            found = torch.autograd.grad(
                [x for x, _ in pairs], leaves, [t for _, t in pairs], allow_unused=True, retain_graph=True
            )
        left = iter(found)
        return {n: Ranked(next(left) for _ in self.slots[n]) if self.local else next(left) for n in names}

    def _tangent(self, tangent: Tensor, layout: Layout | None) -> Tensor | Ranked:
        mesh = self.program.mesh
        return tangent if layout is None else Ranked(cut(tangent, layout, mesh, r) for r in range(mesh.world_size))


def _each(x: Tensor | Ranked) -> list[Tensor]:
    return list(x) if isinstance(x, Ranked) else [x]


def _run(program: Program, graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        elif node.op == "call_module":
            values[node] = _run(program, getattr(graph, str(node.target)), [values[a] for a in node.args])
        else:
            values[node] = _call(program, node, values)
    raise AssertionError("a graph ends with its output")


def _call(program: Program, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    mesh, local = program.mesh, "localized" in program.properties
    read = [values[x] for x in node.all_input_nodes]
    known = record(node.target)
    if node.target is cross_fold:
        return read[0] if local else _crossed(mesh, node, read[0])
    if node.target is reshard:
        return _once(mesh, node, read[0]) if isinstance(read[0], Ranked) else read[0]
    alone = known is None or "axes" not in known.arguments(node.args, dict(node.kwargs))
    if alone and not any(isinstance(x, Ranked) for x in read):
        return call(node, _with(node.args, values), _with(node.kwargs, values))
    whole = [x for x in node.all_input_nodes if isinstance(values[x], Tensor)]
    values = values | {x: _divided(values[x], None if local else x.meta["layout"], mesh) for x in whole}
    calls = [_on_rank(node, values, r) for r in range(mesh.world_size)]
    if known is not None and not alone:
        return Ranked(_together(mesh, known, [list(known.arguments(args, kwargs).values()) for args, kwargs in calls]))
    return Ranked(call(node, args, kwargs) for args, kwargs in calls)


def _with(arguments: Any, values: dict[fx.Node, Any]) -> Any:
    return fx.map_arg(arguments, values.__getitem__)


def _on_rank(node: fx.Node, values: dict[fx.Node, Any], rank: int) -> Any:
    return fx.map_arg((node.args, node.kwargs), lambda n: values[n][rank] if isinstance(values[n], Ranked) else values[n])


# --- between whole values and ranks ---


def _crossed(mesh: FoldedMesh, node: fx.Node, x: Any) -> Any:
    """A rank keeps what it holds: rows are divided as the attention side divides them, and joined as it joins them."""
    if isinstance(x, Ranked):
        return join(list(x), node.meta["layout"], mesh, node.name)
    layout: Layout = node.all_input_nodes[0].meta["layout"]
    return _divided(x, layout, mesh) if layout.axes(VARYING) else x


def _divided(x: Tensor, layout: Layout | None, mesh: FoldedMesh) -> Ranked:
    """Each rank's part; where ranks hold an invariant value, its gradient is taken from the first of them."""
    if layout is None:
        return Ranked([x] * mesh.world_size)
    first = [all(mesh.coordinate(r, a) == 0 for a in layout.axes(INVARIANT)) for r in range(mesh.world_size)]
    return Ranked(cut(x if first[r] else x.detach(), layout, mesh, r) for r in range(mesh.world_size))


def _once(mesh: FoldedMesh, node: fx.Node, x: Ranked) -> Ranked:
    """A replicated value as one term of a sum: the first rank's."""
    added = [a for a in node.meta["layout"].axes(PARTIAL) if a not in node.all_input_nodes[0].meta["layout"].axes(PARTIAL)]
    return Ranked(v if all(mesh.coordinate(r, a) == 0 for a in added) else v * 0 for r, v in enumerate(x))


# --- collectives, with autograd across ranks ---


def _together(mesh: FoldedMesh, known: Operator, calls: list[list[Any]]) -> list[Any]:
    tensors = [x for call in calls for x in call if isinstance(x, Tensor)]
    return list(_Collective.apply(mesh, known, calls, *tensors))


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mesh: FoldedMesh, known: Operator, calls: list[list[Any]], *tensors: Tensor) -> Any:
        ctx.mesh, ctx.known, ctx.calls = mesh, known, calls
        result = simulate(mesh, _graph(lambda emit, *args: emit(known.overload, args), calls[0]), _columns(calls))
        result = [x.clone() for x in result]  # ranks that hold the same value share a tensor, and have a gradient each
        if known.transpose is None:
            ctx.mark_non_differentiable(*result)
        return tuple(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        first = [x.detach() if isinstance(x, Tensor) else x for x in ctx.calls[0]]
        transpose = _graph(lambda emit, *args: ctx.known.transpose(args[-1], *args[:-1]), [*first, grads[0]])
        columns = [*_columns(ctx.calls), list(grads)]
        found = simulate(ctx.mesh, transpose, columns)
        per_rank = [list(x) if isinstance(x, tuple) else [x] for x in found]
        count = sum(isinstance(x, Tensor) for x in first)
        return (None, None, None, *(x for xs in per_rank for x in [*xs, *[None] * (count - len(xs))]))


def _columns(calls: list[list[Any]]) -> list[list[Any]]:
    """For each tensor argument, its value on each rank."""
    return [list(column) for column in zip(*([x for x in call if isinstance(x, Tensor)] for call in calls), strict=True)]


def _graph(fn: Any, arguments: list[Any]) -> fx.GraphModule:
    """A function of the tensors among some arguments, as a graph that all ranks can run in lock-step."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = [fx.Proxy(graph.placeholder(f"x{i}"), tracer) if isinstance(x, Tensor) else x for i, x in enumerate(arguments)]
    result = fn(lambda target, args: tracer.create_proxy("call_function", target, args, {}), *proxies)
    graph.output(fx.node.map_aggregate(result, lambda x: x.node if isinstance(x, fx.Proxy) else x))
    return fx.GraphModule(torch.nn.Module(), graph)
