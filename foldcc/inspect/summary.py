"""How parallel a program is, and what a rank needs: FLOPs and parameters against those of the whole model, and bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch

from foldcc.inspect.flops import global_flops, local_flops
from foldcc.inspect.memory import Memory, memory
from foldcc.ir.pipeline import Stages
from foldcc.ir.program import Program

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
        flops_per_rank: FLOPs of matrix products on one rank, forward and backward, with balanced routing.
        flops_total: those of the original model on one device.
        flops_again: of `flops_per_rank`, those of what the backward pass computes again.
        parameters_per_rank: parameter elements that one rank holds: the sum over parameters of its elements over the
            ranks of the axes that divide it.
        parameters_total: parameter elements of the model.
        replicated: modules that ranks compute more than once.
        uncounted: operators of other libraries, whose products are known in the backward pass alone.
    """

    mesh: str
    ranks: int
    flops_per_rank: int
    flops_total: int
    flops_again: int
    parameters_per_rank: int
    parameters_total: int
    replicated: tuple[Replicated, ...]
    uncounted: tuple[str, ...]
    _program: Program = field(repr=False, compare=False)

    @cached_property
    def memory(self) -> Memory:
        """Bytes that a rank holds."""
        return memory(self._program)

    @property
    def flops_ratio(self) -> float:
        """FLOPs of all ranks over FLOPs of the model: 1 when nothing is computed twice."""
        return self.flops_per_rank * self.ranks / self.flops_total if self.flops_total else 1.0

    @property
    def copies(self) -> float:
        """The same without what the backward pass computes again: 1 when no two ranks compute the same."""
        return self.flops_ratio - self.flops_again * self.ranks / self.flops_total if self.flops_total else 1.0

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
        return "\n".join([*lines, "bytes of a rank", str(self.memory)])


def summary(stages: Stages) -> Summary:
    """FLOPs and parameters of the newest program."""
    program = stages.lowered[-1].program
    whole, mine = global_flops(stages["shard"].program), local_flops(program)
    again = sum(local_flops(program, again=True).values())
    ranks = program.mesh.world_size
    total = sum(whole.values())
    replicated = [
        Replicated(module or program.name, ranks * mine[module] / flops, (ranks * mine[module] - flops) / total)
        for module, flops in whole.items()
        if flops and ranks * mine[module] > _TOLERANCE * flops
    ]
    return Summary(
        mesh=str(program.mesh),
        ranks=ranks,
        flops_per_rank=sum(mine.values()) + again,
        flops_total=total,
        flops_again=again,
        parameters_per_rank=_parameters(program, local=True),
        parameters_total=_parameters(program, local=False),
        replicated=tuple(replicated),
        uncounted=_uncounted(stages["shard"].program),
        _program=program,
    )


def _uncounted(program: Program) -> tuple[str, ...]:
    called = [n.target for _, n in program.nodes() if isinstance(n.target, torch._ops.OpOverload)]
    return tuple(dict.fromkeys(str(x) for x in called if x.namespace not in ("aten", "prims", "foldcc")))


def _parameters(program: Program, *, local: bool) -> int:
    layouts = program.layouts()
    held = [layouts[s.name] for s in program.slots if s.kind == "parameter"]
    return sum(math.prod(int(n) for n in (x.shape if local else x.global_shape)) for x in held)


def _short(count: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:.3f} {unit}FLOP"
    return f"{count:.0f} FLOP"
