"""A differentiated program over a field: every rank, forward and backward, on the reference's inputs and tangents."""

from __future__ import annotations

from typing import Any

from torch import fx

from foldcc.layout import Layout
from foldcc.ops.groups import active
from foldcc.runtime.executable import Executable
from foldcc.runtime.placement import parts
from foldcc.verification.lockstep import Ranked, Watch, leaves, on_ranks, run_in_lockstep
from foldcc.verification.mode import FieldMode
from foldcc.verification.reference import Reference


class Folded:
    """Runs one program that has been differentiated.

    Attributes:
        outputs: of the main graph, on each rank.
        layouts: of the outputs.
    """

    def __init__(self, executable: Executable, reference: Reference):
        self.program, self.executable, self.reference = executable.program, executable, reference
        self.layouts: list[Layout] = [n.meta["layout"] for n in self.executable.outputs]
        self.outputs, self.saved = self.forward()

    def forward(self, watch: Watch | None = None) -> tuple[list[Ranked], list[Any]]:
        """Each output on each rank, and what every call of a block saves for the backward pass."""
        slots = zip(self.program.slots, self.executable.layouts, strict=True)
        entering = [self.cut(self.reference.inputs[slot.name], layout) for slot, layout in slots]
        outputs, saved = self.run(self.program.graph, entering, watch)
        return [on_ranks(x, self.program.mesh.world_size) for x in leaves(outputs)], saved

    def gradients(self, watch: Watch | None = None) -> dict[str, Ranked]:
        """Each slot's gradient on each rank, for the tangents of the outputs that are wanted; None without one."""
        program = self.program
        assert program.backward is not None and program.wanted is not None
        outputs = zip(self.reference.tangents, self.layouts, program.wanted, strict=True)
        entering = [self.cut(tangent, layout) for tangent, layout, wanted in outputs if wanted]
        result = self.run(program.backward, [*self.saved, *entering], watch)
        ranks = self.program.mesh.world_size
        return {slot.name: on_ranks(x, ranks) for slot, x in zip(self.program.slots, result, strict=True)}

    def cut(self, x: Any, layout: Layout) -> Ranked:
        return Ranked(parts(x, layout, self.program.mesh))

    def run(self, graph: fx.GraphModule, values: list[Any], watch: Watch | None = None) -> Any:
        with FieldMode(self.reference.field), active(self.program.mesh):
            return run_in_lockstep(self.program.mesh, graph, values, watch, self.reference.field)
