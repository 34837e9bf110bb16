"""verify: is the folded program the captured one? Exactly, on random elements of a field, on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foldcc.errors import FoldError, require
from foldcc.ir.pipeline import Stages
from foldcc.ir.program import Program, told_outputs
from foldcc.layout import Shard
from foldcc.passes.split import Split
from foldcc.runtime.executable import Executable
from foldcc.verification import reduce
from foldcc.verification.compare import reading, summed, wrong_rank
from foldcc.verification.degree import bound
from foldcc.verification.field import Field
from foldcc.verification.folded import Folded
from foldcc.verification.inputs import random_inputs
from foldcc.verification.locate import locate_backward, locate_forward
from foldcc.verification.origin import ELEMENTS, against_a_copy, against_the_module
from foldcc.verification.proof import Difference, Proof
from foldcc.verification.ranks import OnRanks
from foldcc.verification.reference import Reference, Undefined
from foldcc.verification.same import first_not_captured, first_unlike
from foldcc.verification.wiring import wired_alike

if TYPE_CHECKING:
    from foldcc.module import FoldedModule

_CALLS = 1_000_000  # of operators, over all ranks
_MOST = 100_000_000  # of operators, over all ranks, that are run at all: some hours


def verify(
    model: FoldedModule, *, stage: str | None = None, rounds: int = 2, seed: int = 0, reduced: bool | None = None
) -> Proof:
    """Proves that a folded model computes what the original one computes, or says where it does not.

    The captured program and the folded program of every rank run forward and backward on random elements of the field
    of 2**31 - 1. Sums and products are exact; a function such as `sigmoid` is a keyed hash, so that equality means that
    the same was computed. Compared are every output, every parameter's gradient and the squared norm of all gradients,
    on every rank. See docs/verification.md.

    Args:
        model: from `parallelize`, on a virtual mesh or a real one; nothing is sent, all ranks run in this process.
        stage: of `model.stages`; unless said otherwise, the last one before kernels are emitted.
        rounds: how often, each time with new elements and new hashes.
        seed: of everything that is drawn; the same seed gives the same verdict.
        reduced: proves the same graph over smaller sizes, with two calls of each repeated block, and that it is the same
            graph; None does so for a program that is too large to run as it is.

    Raises:
        FoldError: an operator has no meaning over a field, the captured program does not run, sizes cannot be reduced, or
            there is no such stage.
    """
    if not isinstance(getattr(model, "stages", None), Stages):
        raise FoldError(f"model is a folded one, from parallelize, not the {type(model).__name__}.")
    require("rounds", rounds, Integral, "a whole number")
    if rounds < 1:
        raise FoldError(f"verify with rounds={rounds} would prove nothing.", valid="1 or more")
    stages = model.stages.lowered
    if stage is not None and stage not in [s.name for s in stages]:
        model.stages[stage]  # an error, if there is no such stage at all
        raise FoldError(f"Stage {stage} holds kernels, which have no meaning over a field.", valid=stages[-1].name)
    name = stage or stages[-1].name
    buffers = dict(model.named_buffers(remove_duplicate=False))
    fields = [Field(seed=seed + i) for i in range(rounds)]
    origin, captured = model._programs.newest.origin, stages["capture"].program
    if too_large(stages) if reduced is None else reduced:
        proof = prove_reduced(stages, reduce.reduced(stages), buffers, name, fields)
        return against_a_copy(proof, origin, captured, fields) if proof.ok else proof
    proof = prove(stages, buffers, stage=name, fields=fields)
    return against_the_module(proof, origin, captured, buffers, fields) if proof.ok else proof


def too_large(stages: Stages) -> bool:
    """Whether running a program on all virtual ranks would take minutes, or more memory than a small machine has."""
    program: Program = stages["capture"].program
    elements = sum(n.meta["val"].numel() for n in program.placeholders)
    return elements > ELEMENTS or stages[-1].after * program.mesh.world_size > _CALLS


def prove_reduced(stages: Stages, small: Stages, buffers: Mapping[str, Tensor], name: str, fields: Sequence[Field]) -> Proof:
    """`verify` of a program over smaller sizes, and that it is the same program; `small` may be on a mesh of fewer ranks."""
    name = from_shard(stages, name)
    stages, small = _cut(stages, name), _cut(small, name)
    operators, ranks = small[-1].after, small[-1].program.mesh.world_size
    if operators * ranks > _MOST:
        raise FoldError(
            f"The mesh is too large to verify: {operators} operators on each of {ranks} ranks, {operators * ranks} in all.",
            mesh=str(small[-1].program.mesh),
            valid=f"at most {_MOST // operators} ranks, for example with a smaller dp: every rank runs the same program",
        )
    proof = prove(small, buffers, stage=name, fields=fields)
    calls = len(stages["annotate"].program.calls)
    blocks = len(stages["annotate"].program.blocks)
    changed, unlike = first_not_captured(stages), first_unlike(stages, small, name)
    if proof.ok and changed is not None:
        return replace(proof, difference=Difference(what="A step of the captured program", rank=0, node=changed))
    if proof.ok and unlike is not None:
        what = "The full program has a node that the passes do not make of the sharded program: it"
        return replace(proof, difference=Difference(what=what, rank=0, node=unlike))
    if proof.ok and "differentiated" in stages[name].program.properties and not wired_alike(stages, name):
        what = f"The gradient that the main graph sums over {calls} calls"
        return replace(proof, difference=Difference(what=what, rank=0, node=f"main backward of stage {name}"))
    sizes = " ".join(f"{f.name}={n}" for f, n in small["shard"].program.sizes.items() if f in stages["shard"].program.sizes)
    mesh, fewer = stages[name].program.mesh, small[name].program.mesh
    argument = (
        *((f"proved on the mesh {fewer}, whose axes cross as those of {mesh} do",) if fewer != mesh else ()),
        f"proved over smaller sizes: {sizes}",
        f"each of {blocks} blocks of the full program has the same nodes, operands, axes and layouts; sizes and offsets differ",
        f"the {calls} calls of blocks in the main graphs are wired alike, forward and backward, whatever the blocks compute",
        "each operator does the same at every size of a factor, as its factor rule says",
    )
    return replace(proof, mesh=str(mesh), assumed=argument)


def from_shard(stages: Stages, name: str) -> str:
    """A stage of a reduced program: until `shard` there is nothing but the captured graph."""
    order = [s.name for s in stages]
    return max(name, "shard", key=order.index)


def prove(stages: Stages, buffers: Mapping[str, Tensor], *, stage: str, fields: Sequence[Field]) -> Proof:
    """`verify` over given fields, one for each round, and one more on extreme inputs where something went one way only."""
    captured: Program = stages["capture"].program
    program: Program = _cut(stages, stage)[stage].program
    executable = Executable(program) if "differentiated" in program.properties else None
    difference, proved, rounds = None, (), len(fields)
    for field in fields:
        difference, proved = _round(stages, program, executable, field, buffers)
        if difference is not None:
            break
    if difference is None and _undecided(fields):
        extreme = replace(fields[0], decisions={}, known={})
        try:
            difference, _ = _round(stages, program, executable, extreme, buffers, extreme=True)
            fields = [*fields, extreme]
        except Undefined:
            pass  # a mean over no token at all, say: what is undecided stays so, and the proof lists it
    return Proof(
        program=program.name,
        mesh=str(program.mesh),
        stage=stage,
        prime=fields[0].prime,
        rounds=rounds,
        bound=bound(captured, fields[0].prime, rounds),
        proved=proved,
        undecided=_undecided(fields),
        difference=difference,
    )


def _cut(stages: Stages, name: str) -> Stages:
    """The stages, one of joint graphs as `split` cuts it: as it is, nothing runs it."""
    program: Program = stages[name].program
    if "joint" not in program.properties or "differentiated" in program.properties:
        return stages
    cut = Split().run(program).with_property(*Split.provides)
    return Stages([replace(s, program=cut) if s.name == name else s for s in stages])


def _undecided(fields: Sequence[Field]) -> tuple[str, ...]:
    """What went one way only, in all rounds."""
    ways: dict[str, set[bool]] = {}
    for field in fields:
        for at, found in field.decisions.items():
            ways.setdefault(at, set()).update(found)
    return tuple(at for at, found in ways.items() if len(found) == 1)


def _round(
    stages: Stages,
    program: Program,
    executable: Executable | None,
    field: Field,
    buffers: Mapping[str, Tensor],
    *,
    extreme: bool = False,
) -> tuple[Difference | None, tuple[str, ...]]:
    captured: Program = stages["capture"].program
    given = stages[-1].program.wanted or (False,) * len(captured.outputs)
    generator = torch.Generator().manual_seed(field.seed)
    inputs = random_inputs(captured, field, buffers, generator, extreme=extreme)
    reference = Reference(captured, field, inputs, generator)
    try:
        run = Folded(executable, reference) if executable is not None else OnRanks(program, reference, given)
    except (RuntimeError, IndexError) as error:  # the captured program runs on the same inputs
        return Difference(what=f"The folded program does not run ({error}), so that it", rank=0), ()
    mesh = program.mesh
    for i, (values, wanted, layout) in enumerate(zip(run.outputs, reference.outputs, run.layouts, strict=True)):
        rank = wrong_rank(values, wanted.detach(), layout, mesh, field)
        if rank is not None:
            told = reading(values, wanted.detach(), layout, mesh, field)
            found = Difference(what=captured.told_output(i), rank=rank, reading=told)
            return (locate_forward(stages, run, found) if isinstance(run, Folded) else found), ()
    trained = [s.name for s in program.slots if s.grad]
    outputs = f"{len(run.outputs)} outputs, on each of {mesh.world_size} ranks"
    if not trained:
        return None, (outputs,)
    if not any(given):
        raise FoldError("No output of the model depends on a parameter through differentiable operators.")
    wanted_gradients = reference.gradients(trained, given)
    if any(bool(x.isnan().any()) for x in wanted_gradients.values()):
        raise Undefined("The captured program's derivative divides by zero.", prime=str(field.prime))
    found_gradients = run.gradients()
    difference = _gradients(program, found_gradients, wanted_gradients, field)
    if difference is not None:
        return (locate_backward(stages, run, difference) if isinstance(run, Folded) else difference), ()
    difference = _norm(program, found_gradients, wanted_gradients, field)
    if difference is not None:
        return difference, ()
    by = "" if all(given) else f" by {told_outputs(given)}"
    return None, (
        outputs,
        f"the gradients{by} of {len(trained)} {_called(program)}, on each of {mesh.world_size} ranks, after their reductions",
        "the squared norm of all gradients, every element counted once",
    )


def _called(program: Program) -> str:
    inputs = any(s.grad and s.kind == "input" for s in program.slots)
    return "parameters and inputs" if inputs else "parameters"


def _gradients(program: Program, found: Mapping[str, Any], wanted: Mapping[str, Tensor], field: Field) -> Difference | None:
    for slot, node in zip(program.slots, program.placeholders, strict=True):
        if not slot.grad:
            continue
        values, what = found[slot.name], f"The gradient of {slot.names[0]}"
        if slot.name not in wanted:
            each = values if isinstance(values, list) else [values]
            extra = next((r for r, x in enumerate(each) if x is not None and bool(x.any())), None)
            if extra is not None:
                return Difference(what=what, parameter=slot.names[0], rank=extra, reading="not zero, and should be")
            continue
        layout = node.meta["layout"].transposed if isinstance(values, list) else None
        rank = wrong_rank(values, wanted[slot.name], layout, program.mesh, field)
        if rank is not None:
            told = reading(values, wanted[slot.name], layout, program.mesh, field)
            return Difference(what=what, parameter=slot.names[0], rank=rank, reading=told)
    return None


def _norm(program: Program, found: Mapping[str, Any], wanted: Mapping[str, Tensor], field: Field) -> Difference | None:
    """The squared norm as clipping takes it: what a rank holds, summed over the axes that divide the parameter."""
    mesh = program.mesh
    totals = [torch.zeros((), dtype=torch.float64)] * mesh.world_size
    for slot, node in zip(program.slots, program.placeholders, strict=True):
        if slot.name in wanted:
            values = found[slot.name]
            axes = (
                [a for a, s in node.meta["layout"].states.items() if isinstance(s, Shard)] if isinstance(values, list) else []
            )
            each = torch.stack(list(values)) if isinstance(values, list) else values.unsqueeze(0)
            squares = field.sum(field.times(each, each).unsqueeze(-1).flatten(1), 1).expand(mesh.world_size)
            squares = summed(list(squares), mesh, axes, field)
            totals = [field.reduced(t + s) for t, s in zip(totals, squares, strict=True)]
    right = field.reduced(sum((field.sum(field.times(x, x)) for x in wanted.values()), torch.zeros((), dtype=torch.float64)))
    rank = next((r for r, total in enumerate(totals) if total != right), None)
    return None if rank is None else Difference(what="The squared norm of all gradients", rank=rank)
