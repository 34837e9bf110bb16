"""What a person reads of a folded module: its program, its plan, what it needs and what was proved."""

from __future__ import annotations

from typing import Any

from torch import nn

from foldcc.codegen import Kernels, kernels_of
from foldcc.compiler import Compiler
from foldcc.errors import FoldError
from foldcc.inspect.summary import summary
from foldcc.ir.pipeline import Stages
from foldcc.ir.plan import Plan
from foldcc.ir.program import Program
from foldcc.mesh import FoldedMesh
from foldcc.programs import Programs
from foldcc.runtime.parameters import Places
from foldcc.verification.proof import Proof


class Reports(nn.Module):
    """Of the newest program, where nothing else is said."""

    mesh: FoldedMesh
    _compiler: Compiler
    _programs: Programs
    _places: Places

    def _get_name(self) -> str:
        """What a module's class is called; trainers look it up among those that they know."""
        return type(self._compiler.model).__name__

    def __repr__(self) -> str:
        from foldcc.inspect.module import described

        places = self._places
        return described(self._get_name(), self, self.mesh, places.layouts, places.plan.stages, len(self._programs))

    @property
    def program(self) -> Program:
        """The newest program, lowered."""
        return self._programs.newest.executable.program

    @property
    def programs(self) -> tuple[str, ...]:
        """The calls that programs are kept for, as text, the least recently used first; at most 16.

        A program is specialised to shapes, dtypes, Python values and modes; another call compiles another one. A number that
        the model only computes with becomes an input of the program when a second value is seen. What is evicted is
        compiled again when it is needed again.
        """
        return tuple(map(str, self._programs.kept.values()))

    @property
    def proof(self) -> Proof:
        """What was proved of the newest program when it was compiled, and what was not.

        Raises:
            FoldError: nothing was: with `verify=False`, or after passes of your own, `foldcc.verify` proves it.
        """
        proof = self._programs.newest.proof
        if proof is None:
            raise FoldError("The newest program was compiled without a proof.", instead="foldcc.verify(model)")
        return proof

    @property
    def stages(self) -> Stages:
        return self._programs.newest.stages

    @property
    def kernels(self) -> Kernels:
        """The Triton kernels of the newest program, by name, and what of it they cover; none if it runs as ATen."""
        return kernels_of(self.program, self._compiler.emission(self)[1])

    @property
    def plan(self) -> Plan:
        """Every choice of the newest program; printed, edited and parsed, it is what `parallelize(plan=)` takes."""
        return self.program.plan

    def collectives(self) -> Any:
        """Each collective of a step, or of one of its micro-batches: its axes, the bytes that a rank sends, its module."""
        from foldcc.inspect.collectives import collectives

        return collectives(self.stages)

    def memory(self) -> Any:
        """Bytes that a rank would hold under each policy of `zero` and `recompute`: a table, and a mapping by both.

        The newest program is compiled under each, which takes a moment; none of them runs.
        """
        return self._compiler.memory(self.stages)

    def summary(self) -> Any:
        """FLOPs, parameters and bytes of a rank against those of the whole model."""
        return summary(self.stages, self._programs.newest.executable)
