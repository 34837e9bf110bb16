"""How parallel a program is, and what a rank needs: FLOPs and parameters against those of the whole model, and bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import torch

from foldcc.inspect.flops import global_flops, local_flops
from foldcc.inspect.memory import Memory, memory
from foldcc.inspect.pipeline import Pipeline, elements, pipeline
from foldcc.ir.pipeline import Stages
from foldcc.ir.program import Program
from foldcc.runtime.executable import Executable
from foldcc.runtime.pipeline import Pipelined

# What a module may compute beyond its share before it is listed.
_TOLERANCE = 1.01


@dataclass(frozen=True)
class Replicated:
    """A module of whose matrix products ranks compute the same.

    Attributes:
        module: its path, of the first layer when the layer repeats.
        copies: FLOPs of all ranks over FLOPs of the whole model, in this module.
        share: what the surplus adds to `Summary.flops_ratio`.
    """

    module: str
    copies: float
    share: float


@dataclass(frozen=True)
class Summary:
    """A training step in numbers.

    Attributes:
        mesh: as text.
        ranks: of the mesh.
        flops_per_rank: FLOPs of matrix products on one rank, forward and backward, with balanced routing; on the place of
            `pp` that has most.
        flops_total: those of the original model on one device.
        flops_again: of `flops_per_rank`, those of what the backward pass computes again.
        flops_ratio: FLOPs of all ranks over FLOPs of the model: 1 when nothing is computed twice.
        copies: the same without what the backward pass computes again: 1 when no two ranks compute the same.
        parameters_per_rank: parameter elements that one rank holds: the sum over parameters of its elements over the
            ranks of the axes that divide it.
        parameters_total: parameter elements of the model.
        replicated: modules that ranks compute more than once.
        uncounted: operators of other libraries, whose products are known in the backward pass alone.
        pipeline: what each place of `pp` does and holds, if calls are cut into stages or micro-batches.
    """

    mesh: str
    ranks: int
    flops_per_rank: int
    flops_total: int
    flops_again: int
    flops_ratio: float
    copies: float
    parameters_per_rank: int
    parameters_total: int
    replicated: tuple[Replicated, ...]
    uncounted: tuple[str, ...]
    pipeline: Pipeline | None
    _program: Program = field(repr=False, compare=False)

    @cached_property
    def memory(self) -> Memory:
        """Bytes that a rank holds; with pipeline stages, the one that holds most."""
        return memory(self._program) if self.pipeline is None else self.pipeline.fullest.memory

    def __str__(self) -> str:
        held = self.parameters_per_rank / self.parameters_total
        flops = _short(self.flops_per_rank), _short(self.flops_total), f"all ranks / model = {self.flops_ratio:.4f}"
        parameters = f"{self.parameters_per_rank:,}", f"{self.parameters_total:,}", f"rank / model = {held:.4f}"
        lines = [f"{self.mesh}: {self.ranks} ranks"]
        for what, (rank, model, ratio) in (("FLOPs of a step", flops), ("parameter elements", parameters)):
            lines.append(f"  {what:<18}  {rank} on a rank, {model} in the model; {ratio}")
        if self.flops_again:
            lines.append(f"  computed again in the backward pass: {_short(self.flops_again)} of those on a rank")
        if self.uncounted:
            lines.append(f"  not counted: {', '.join(self.uncounted)}")
        if self.replicated:
            lines.append("  computed by several ranks:")
            width = max(len(r.module) for r in self.replicated)
            lines += [f"    {r.module:<{width}}  x {r.copies:.2f}  adds {r.share:.2%}" for r in self.replicated]
        if self.pipeline is not None:
            lines += [str(self.pipeline), "bytes of the rank that holds most"]
        else:
            lines.append("bytes of a rank")
        return "\n".join([*lines, str(self.memory)])


def summary(stages: Stages, executable: Executable) -> Summary:
    """FLOPs and parameters of the newest program."""
    program, cut, mesh, calls = stages.lowered[-1].program, None, stages.lowered[-1].program.mesh, 1
    if isinstance(executable, Pipelined):
        cut, mesh, calls = pipeline(executable), executable.whole, executable.pipelining.micro_batches
    whole, mine, again = _flops(stages)
    ranks, total = program.mesh.world_size, sum(whole.values())
    replicated = [
        Replicated(module or program.name, ranks * mine[module] / flops, (ranks * mine[module] - flops) / total)
        for module, flops in whole.items()
        if flops and ranks * mine[module] > _TOLERANCE * flops
    ]
    layouts = program.layouts()
    held = [layouts[s.name] for s in program.slots if s.kind == "parameter"]
    most = None if cut is None else max(cut.places, key=lambda p: p.flops)
    return Summary(
        mesh=str(mesh),
        ranks=mesh.world_size,
        flops_per_rank=most.flops if most else sum(mine.values()) + again,
        flops_total=calls * total,
        flops_again=most.again if most else again,
        flops_ratio=ranks * (sum(mine.values()) + again) / total if total else 1.0,
        copies=ranks * sum(mine.values()) / total if total else 1.0,
        parameters_per_rank=max(p.parameters for p in cut.places) if cut else sum(elements(x.shape) for x in held),
        parameters_total=sum(elements(x.global_shape) for x in held),
        replicated=tuple(replicated),
        uncounted=_uncounted(stages["shard"].program),
        pipeline=cut,
        _program=program,
    )


def copies(stages: Stages) -> float | None:
    """`Summary.copies` of the newest program; None if there is something that is not counted."""
    whole, mine, _ = _flops(stages)
    if _uncounted(stages["shard"].program):
        return None
    total = sum(whole.values())
    return stages.lowered[-1].program.mesh.world_size * sum(mine.values()) / total if total else 1.0


def _flops(stages: Stages) -> tuple[Counter[str], Counter[str], int]:
    """Of the whole model and of one rank, of all pipeline stages, in one micro-batch; and what the latter computes again."""
    program = stages.lowered[-1].program
    return global_flops(stages["shard"].program), local_flops(program), sum(local_flops(program, again=True).values())


def _uncounted(program: Program) -> tuple[str, ...]:
    called = [n.target for _, n in program.nodes() if isinstance(n.target, torch._ops.OpOverload)]
    return tuple(dict.fromkeys(str(x) for x in called if x.namespace not in ("aten", "prims", "foldcc")))


def _short(count: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:.3f} {unit}FLOP"
    return f"{count:.0f} FLOP"
