"""Gradients that wait for their reduction: backward passes inside `no_sync()` leave them, and the first one outside takes them.

    dw = unshard1(dv)          becomes          first:  dv            then:  dw = unshard1(dv + what has waited)

A backward pass reduces a parameter's gradient in the transpose of the block that unshards it (`passes/store.py`). Before that
each rank has a term of a sum, and terms add up as gradients do, in the parameter's dtype. Until they are reduced they are the
parameter's `.grad`, a DTensor that says so: whoever reads it has the right value, and `zero_grad` of any optimizer drops it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor, Partial, Placement
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.torch_version import TorchVersion

from foldcc.hooks import has_gradient_hook
from foldcc.ir.program import Slot, unshards
from foldcc.layout import PARTIAL, Layout
from foldcc.mesh import FoldedMesh
from foldcc.runtime.placement import placements, redistributed

if TYPE_CHECKING:
    from foldcc.runtime.executable import Executable

MAY_WAIT = TorchVersion(torch.__version__) >= "2.12"  # before, DTensor takes a gradient that is not there for zeros


@dataclass(frozen=True)
class Phases:
    """A backward main graph in two; `slots` are those whose gradients it returns.

    Attributes:
        first: what the backward graph takes -> the gradients of slots, None for those that are reduced; what reductions take.
        reduce: what reductions take -> the gradients of slots that are reduced, None for the others.
        terms: of what reductions take, by its position, the parameter whose gradient it is, and its layout.
    """

    first: fx.GraphModule
    reduce: fx.GraphModule
    terms: Mapping[int, tuple[str, Layout]]

    @classmethod
    def of(cls, main: fx.GraphModule, slots: Sequence[Slot]) -> Phases:
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
                    slot = slots[gradients.index(items[formal.meta["result"]])]
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
        parameters: DTensors by name; none on a virtual mesh, where nothing is sent and nothing waits.
        may_keep: this one leaves gradients unreduced as well, unless hooks are to be given them.
    """

    mesh: FoldedMesh
    parameters: Mapping[str, Any]
    may_keep: bool

    @property
    def keep(self) -> bool:
        return self.may_keep and not any(map(has_gradient_hook, self.parameters.values()))

    @property
    def waiting(self) -> list[str]:
        """The parameters whose gradients wait."""
        return [n for n, p in self.parameters.items() if p.grad is not None and p.grad.placements != p.placements]

    def __str__(self) -> str:
        """What ranks have to agree on."""
        waiting = self.waiting
        told = f", beside {len(waiting)} gradients that wait for a reduction" if waiting else ""
        return f"{told}, without a reduction" if self.keep else told

    def backward(self, executable: Executable, values: list[Any]) -> Any:
        """The gradients of the program's slots, None for those that wait now."""
        waiting = self.waiting
        if not self.keep and not waiting:
            assert executable.program.backward is not None
            return executable.run(executable.program.backward, values)
        phases = executable.phases
        gradients, taken = executable.run(phases.first, values)
        if self.keep:
            for i, (name, layout) in phases.terms.items():
                self._add(name, taken[i], layout)
            at_once = {s.names[0] for s, g in zip(executable.program.slots, gradients, strict=True) if g is not None}
            for name in at_once.intersection(waiting):
                self._reduce(name)
            return gradients
        taken, places = list(taken), {name: (i, layout) for i, (name, layout) in phases.terms.items()}
        for name in waiting:
            p, place = self.parameters[name], places.get(name)
            if place is not None and list(p.grad.placements) == self._placements(place[1]):
                taken[place[0]] = p.grad.to_local() + taken[place[0]]
                p.grad = None
            else:  # this program has no part in it, or uses the parameter in another layout
                self._reduce(name)
        reduced = executable.run(phases.reduce, taken)
        return [g if r is None else r for g, r in zip(gradients, reduced, strict=True)]

    def _reduce(self, name: str) -> None:
        """Brings a gradient that waits together, without a program."""
        p = self.parameters[name]
        p.grad = redistributed(p.grad, p.placements)

    def _placements(self, layout: Layout) -> list[Placement]:
        """Those of a layout, terms of a sum where it says so."""
        axes = zip(self.mesh.dividing(layout.view), placements(layout, self.mesh), strict=True)
        return [Partial() if layout.states.get(axis) == PARTIAL else placement for axis, placement in axes]

    def _add(self, name: str, terms: Tensor, layout: Layout) -> None:
        """Adds what this rank has of a gradient to what waits."""
        p, there = self.parameters[name], self._placements(layout)
        terms = terms.to(p.dtype)  # where a weight is cast, its reduction is behind the cast back
        same = p.grad is not None and list(p.grad.placements) == there
        terms = p.grad.to_local() + terms if same else terms
        new: Any = DTensor.from_local(terms, p.device_mesh, there, run_check=False, shape=p.shape, stride=p.stride())
        if p.grad is not None and not same:  # it is reduced, or another program has left it in another layout
            self._reduce(name)
            new = p.grad + redistributed(new, p.placements)
        p.grad = new
