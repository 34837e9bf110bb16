"""Stage: each call of a block runs on one pipeline stage, and a parameter is where the calls are that use it.

    block0(ids, embed); block1(x, w0); block1(x, w1); block2(x, head)        with pp=2: 0; 0; 1; 1

Stages are stretches of the main graph, cut so that the largest has as little to compute as can be, at what `plan/work.py` says
that operators cost. So the embedding and the head count with what they are. The plan says it of parameters, so that a program
for other inputs has each of them on the same stages: one that is used on several, such as a tied embedding, is on all of them.
What does not depend on samples alone follows from that; counts are computed on every stage that needs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import fx

from foldcc.errors import FoldError, listed
from foldcc.ir.pipeline import Pass
from foldcc.ir.plan import UnfitPlan
from foldcc.ir.program import Program
from foldcc.plan.work import Work


@dataclass(frozen=True, kw_only=True)
class StagePass(Pass):
    """Attributes:
    stages: of the pipeline.
    """

    requires = frozenset({"sharded"})
    provides = frozenset({"staged"})
    name = "stage"
    stages: int

    def run(self, program: Program) -> Program:
        names = {n: program.slot(n.name).names[0] for n in program.placeholders if program.slot(n.name).kind == "parameter"}
        calls = [c for c in program.calls if not _counts(program, c)]
        read = [[names[x] for x in c.all_input_nodes if x in names] for c in calls]
        said = {name: places for name, places in program.plan.stages.items() if name in names.values()}
        _check(said, self.stages)
        places = _followed(read, said) if said else self._cut(program, calls, read)
        there: dict[str, tuple[int, ...]] = {}
        for call, parameters, place in zip(calls, read, places, strict=True):
            call.meta["stage"] = place
            for name in parameters:
                there[name] = tuple(dict.fromkeys((*there.get(name, ()), place)))
        _check_updates(program)
        unused = {name: (0,) for name in names.values() if name not in there}
        stages = {**unused, **there, **said} if self.stages > 1 else {}
        return replace(program, plan=replace(program.plan, stages=stages))

    def _cut(self, program: Program, calls: Sequence[fx.Node], read: Sequence[Sequence[str]]) -> list[int]:
        """The stage of each call. One that reads no parameters stays with the one before it."""
        work, costs, group = Work(program, {}, {}), [0.0], []
        reads = False
        for call, parameters in zip(calls, read, strict=True):
            if reads and parameters:
                costs.append(0.0)
            reads = reads or bool(parameters)
            nodes = program.blocks[str(call.target)].graph.nodes
            costs[-1] += sum(work.of(n) for n in nodes if n.op == "call_function" and "rule" in n.meta)
            group.append(len(costs) - 1)
        if self.stages > len(costs):
            raise FoldError(
                f"{self.stages} pipeline stages of {len(costs)} blocks: each stage has one block at least.",
                blocks=listed(c.target for c in calls),
                valid=f"pp * stages_per_rank: 1 to {len(costs)}",
            )
        ends = _ends(costs, self.stages)
        return [next(s for s, end in enumerate(ends) if i < end) for i in group]


def _counts(program: Program, call: fx.Node) -> bool:
    """Whether a call computes what micro-batches share."""
    return any(n.meta.get("count") for n in program.blocks[str(call.target)].graph.nodes)


def _check(said: Mapping[str, tuple[int, ...]], stages: int) -> None:
    for name, places in said.items():
        if not places or max(places) >= stages:
            raise UnfitPlan(
                f"The plan has {name} on the stages {' '.join(map(str, places))}, and there are {stages}.",
                valid=f"0 to {stages - 1}",
            )


def _check_updates(program: Program) -> None:
    """A micro-batch reads of a buffer what the one before has left: on the stage that makes it, where they run in turn."""
    for i, name in program.updates.items():
        made, held = program.outputs[i], next(n for n in program.placeholders if n.name == name)
        by = made.args[0].meta.get("stage") if made.op == "call_function" else None
        read = [c.meta["stage"] for c in held.users if "stage" in c.meta]
        if any(stage != by for stage in read):
            raise FoldError(
                f"{program.told_output(i)} is updated on pipeline stage {by} and read on {listed(dict.fromkeys(read))}: of the "
                "next micro-batch, before this one has left what is to be read.",
                valid="a buffer of its own for each layer; a plan whose stages are cut elsewhere; pp=1",
            )


def _followed(read: Sequence[Sequence[str]], said: Mapping[str, tuple[int, ...]]) -> list[int]:
    """The stage of each call: the first one, not before that of the call before, on which all of its parameters are."""
    found: list[int] = []
    for parameters in read:
        before, known = found[-1] if found else 0, [n for n in parameters if n in said]
        shared = set.intersection(*(set(said[n]) for n in known)) if known else {before}
        later = [place for place in sorted(shared) if place >= before]
        if not later:
            raise UnfitPlan(
                f"A block reads {known[0]}, and from stage {before} on, none has all of the block's parameters.",
                stages="\n".join(f"{n}  {' '.join(map(str, said[n]))}" for n in known),
                valid="stages that ascend with the blocks",
            )
        found.append(later[0])
    return found


def _ends(costs: Sequence[float], stages: int) -> list[int]:
    """Where each stretch ends: the largest sum is as small as can be, and then the sum of their squares."""
    sums = [0.0, *accumulate(costs)]
    best = {i: (sums[i], sums[i] ** 2, [i]) for i in range(1, len(sums))}  # by its end, the best cut of a first stretch
    for stage in range(1, stages):
        longer = {}
        for i in range(stage + 1, len(sums)):
            last = {j: sums[i] - sums[j] for j in range(stage, i)}
            longer[i] = min((max(best[j][0], x), best[j][1] + x * x, [*best[j][2], i]) for j, x in last.items())
        best = longer
    return best[len(costs)][2]
