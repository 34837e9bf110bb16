"""Gradients that wait for their reduction: backward passes inside `no_sync()` leave them, and the first one outside takes them.

    dw = unshard1(dv)          becomes          first:  dv            then:  dw = unshard1(dv + what has waited)

A backward pass reduces a parameter's gradient in the transpose of the block that unshards it (`passes/store.py`). Before that each
rank has a term of a sum, and terms add up as gradients do. Until they are reduced they are the parameter's `.grad`, a DTensor that
says so: whoever reads it has the right value, and `zero_grad` of any optimizer drops it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor, Partial
from torch.fx._lazy_graph_module import _LazyGraphModule

from foldcc.ir.program import Program, unshards
from foldcc.layout import PARTIAL, Layout
from foldcc.mesh import FoldedMesh
from foldcc.runtime.placement import placements, redistributed

if TYPE_CHECKING:
    from foldcc.runtime.executable import Executable


@dataclass(frozen=True)
class Phases:
    """A backward main graph in two.

    Attributes:
        first: what the backward graph takes -> the gradients of slots, None for those that are reduced; what reductions take.
        reduce: what reductions take -> the gradients of slots that are reduced, None for the others.
        terms: of what reductions take, by its position, the parameter whose gradient it is, and its layout.
    """

    first: fx.GraphModule
    reduce: fx.GraphModule
    terms: Mapping[int, tuple[str, Layout]]

    @classmethod
    def of(cls, program: Program) -> Phases:
        main = program.backward
        assert main is not None
        gradients: Any = main.graph.output_node().args[0]
        calls = [n for n in main.graph.find_nodes(op="call_module") if _only_reduces(n, gradients)]
        late = {*calls, *(item for call in calls for item in call.users)}
        taken = list(dict.fromkeys(x for call in calls for x in call.all_input_nodes))
        terms = {}
        for call in calls:
            items = {item.args[1]: item for item in call.users}
            formals = getattr(main, str(call.target)).graph.find_nodes(op="placeholder")
            for formal, actual in zip(formals, call.args, strict=True):
                if formal.meta.get("result") in items:
                    slot = program.slots[gradients.index(items[formal.meta["result"]])]
                    terms[taken.index(actual)] = (slot.names[0], formal.meta["layout"])
        first, reduce = fx.Graph(), fx.Graph()
        early: dict[fx.Node, fx.Node] = {}
        then = {x: reduce.placeholder(x.name) for x in taken}
        for node in main.graph.nodes:
            if node in late:
                then[node] = reduce.node_copy(node, then.__getitem__)
            elif node.op != "output":
                early[node] = first.node_copy(node, early.__getitem__)
        first.output((tuple(early.get(g) for g in gradients), tuple(early[x] for x in taken)))
        reduce.output(tuple(then[g] if g in late else None for g in gradients))
        return cls(_LazyGraphModule(main, first), _LazyGraphModule(main, reduce), terms)


def _only_reduces(call: fx.Node, gradients: Sequence[Any]) -> bool:
    """Whether a call reduces gradients, none of which is added to what comes another way."""
    name = str(call.target)
    return (
        unshards(name)
        and not name.endswith("_again")
        and all(item in gradients and len(item.users) == 1 for item in call.users)
    )


@dataclass(frozen=True)
class Accumulation:
    """How a backward pass goes on with gradients that wait.

    Attributes:
        parameters: by name; none on a virtual mesh, where nothing is sent and nothing waits.
        keep: this one leaves gradients unreduced as well.
    """

    mesh: FoldedMesh
    parameters: Mapping[str, nn.Parameter]
    keep: bool

    @property
    def waiting(self) -> list[str]:
        """The parameters whose gradients wait."""
        return [n for n, p in self.parameters.items() if isinstance(p, DTensor) and _waits(p)]

    def __str__(self) -> str:
        """What ranks have to agree on."""
        waiting = self.waiting
        told = f", beside {len(waiting)} gradients that wait for a reduction" if waiting else ""
        return f"{told}, without a reduction" if self.keep else told

    def backward(self, executable: Executable, values: Sequence[Any]) -> Any:
        """The gradients of the program's slots, None for those that wait now."""
        waiting = self.waiting
        if not self.keep and not waiting:
            return executable.run(executable.program.backward, values)
        phases = executable.phases
        gradients, taken = executable.run(phases.first, values)
        terms = {name: (i, self._terms(name, taken[i], layout)) for i, (name, layout) in phases.terms.items()}
        if self.keep:
            for name, (_, new) in terms.items():
                self._add(name, new)
            return gradients
        taken = list(taken)
        for name in waiting:
            there, kept = terms.get(name), self.parameters[name].grad
            if there is not None and kept.placements == there[1].placements:
                taken[there[0]] = kept.to_local() + taken[there[0]]
                self.parameters[name].grad = None
            else:
                self.parameters[name].grad = redistributed(kept, self.parameters[name].placements)
        reduced = executable.run(phases.reduce, taken)
        return [g if r is None else r for g, r in zip(gradients, reduced, strict=True)]

    def _terms(self, name: str, local: Tensor, layout: Layout) -> DTensor:
        p: Any = self.parameters[name]
        axes = zip(self.mesh.axes(layout.view), placements(layout, self.mesh), strict=True)
        there = [Partial() if layout.states.get(axis) == PARTIAL else placement for axis, placement in axes]
        return DTensor.from_local(local, p.device_mesh, there, run_check=False, shape=p.shape, stride=p.stride())

    def _add(self, name: str, new: DTensor) -> None:
        p: Any = self.parameters[name]
        if p.grad is None:
            p.grad = new
        elif p.grad.placements == new.placements:
            both = p.grad.to_local() + new.to_local()
            p.grad = DTensor.from_local(both, p.device_mesh, new.placements, run_check=False, shape=p.shape, stride=p.stride())
        else:  # one of them is reduced, or another program has left it in another layout
            p.grad = redistributed(p.grad, p.placements) + redistributed(new, p.placements)


def _waits(p: Any) -> bool:
    return p.grad is not None and p.grad.placements != p.placements
