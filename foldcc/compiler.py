"""Compiling a call: captured, over numbers where it can be, and through the passes. No parameter is touched."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from foldcc.cache import run_or_read
from foldcc.call import Call, Told, without_digits
from foldcc.capture import capture
from foldcc.capture.counts import with_counts
from foldcc.capture.numbers import as_inputs
from foldcc.capture.numbers import watched as watched_numbers
from foldcc.capture.observe import Recorder
from foldcc.capture.transformers import checkpoints
from foldcc.capture.unchanged import in_dtypes, in_modes
from foldcc.capture.varying import Varying
from foldcc.codegen import Emit, kernels_of
from foldcc.codegen.source import unusable
from foldcc.errors import FoldError
from foldcc.hooks import watched
from foldcc.ir.plan import Plan, UnfitPlan
from foldcc.ir.program import Program
from foldcc.mesh import FoldedMesh
from foldcc.passes import Pass, Stages, check_types, for_kernels, in_micro_batches, in_stages, recomputing, run_passes
from foldcc.passes.average import Untold
from foldcc.programs import Kept
from foldcc.runtime.agreement import choices_of_first
from foldcc.runtime.executable import Executable
from foldcc.runtime.modes import Modes, compiling, one_at_a_time, traceable
from foldcc.runtime.pipeline import Pipelined
from foldcc.runtime.schedule import Pipelining
from foldcc.samples import refuse_attention_over_samples, sample_dims
from foldcc.taps import with_results
from foldcc.tree import elsewhere
from foldcc.varying import shapes_of
from foldcc.verification.origin import Origin


@dataclass(frozen=True)
class Compiler:
    """How the calls of a model are compiled.

    Attributes:
        model: an outline of the original. What is captured of it follows the modes, dtypes and device of the folded `tree`.
        there: the device that the original was on, and is captured for.
        whole: the mesh with its pipeline stages.
        mesh: of one pipeline stage.
        own: passes of a user's own, after the pipeline.
        pipelining: how calls are cut; None where they are not, and nothing else is different.
        batch_dims, tracer, kernels, plan, recompute, progress, dynamic, cache: see `parallelize`.
    """

    model: nn.Module
    mesh: FoldedMesh
    tracer: str
    kernels: str | ModuleType
    pipeline: tuple[Pass, ...]
    batch_dims: Mapping[str, int | None]
    progress: Callable[[str], None]
    there: torch.device
    whole: FoldedMesh
    plan: Plan = Plan()
    recompute: str | float | None = None
    own: tuple[Pass, ...] = ()
    pipelining: Pipelining | None = None
    dynamic: tuple[str, ...] = ()
    cache: bool = False

    def device(self, tree: nn.Module) -> torch.device:
        """Where programs run."""
        if not self.mesh.is_virtual:
            return torch.device(self.mesh.device_type)
        device = next(tree.parameters()).device  # where they are now, which `.to` may have changed
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def divided(self) -> bool:
        """Whether samples of a call are divided, over ranks or micro-batches."""
        return self.mesh.data_parallel > 1 or self.in_micro_batches

    @property
    def in_micro_batches(self) -> bool:
        """Whether calls are cut into several micro-batches."""
        return self.pipelining is not None and self.pipelining.micro_batches > 1

    def sample_dims(self, call: Call) -> dict[str, int | None]:
        return sample_dims(call.leaves, call.names, self.batch_dims, divided=self.divided)

    def micro_batches(self, call: Call) -> list[Call]:
        """What the programs of a call are called with."""
        if self.pipelining is None:
            return [call]
        return call.apart(self.pipelining.micro_batches, self.sample_dims(call), self.mesh)

    def executable(self, program: Program) -> Executable:
        if self.pipelining is None:
            return Executable(program)
        return Pipelined(program, self.whole, self.pipelining)

    def modes(self, tree: nn.Module) -> Modes:
        return Modes.now(self.device(tree))

    def emission(self, tree: nn.Module) -> tuple[tuple[Pass, ...], tuple[str, ...]]:
        """The pass that emits kernels, if any, and why there is none where one was to be expected."""
        if self.kernels == "aten" or (self.kernels == "auto" and self.device(tree).type != "cuda"):
            return (), ()
        if self.kernels == "auto" and (why := unusable()) is not None:
            return (), (f"{why}, so the program runs as ATen.",)
        return (Emit(edited=self.kernels if isinstance(self.kernels, ModuleType) else None),), ()

    @property
    def run(self) -> Callable[..., Stages]:
        """What runs passes."""
        return run_or_read if self.cache else run_passes

    def compile(self, whole: Call, tree: nn.Module, held: Plan, others: Iterable[Kept]) -> tuple[Kept, Kept | None]:
        """A program for a call, and the one whose place it takes: it has inputs for the numbers in which they differ.

        Args:
            whole: the call; the program is of one of its micro-batches.
            held: what is decided of parameters already.
            others: programs that are kept.
        """
        call = self.micro_batches(whole)[0]
        divided = self.divided
        batch_dims = self.sample_dims(call)
        self._check_autocast(tree)
        start = time.perf_counter()
        self.progress("capture")
        program, blind = self.captured(call, tree, batch_dims)
        numbers = {n: x for n, x in call.items() if n in blind}
        program, free, other = self._over_numbers(call, tree, program, numbers, others)
        seconds = time.perf_counter() - start
        stages = self._staged(whole, program, tree, held, seconds)
        with compiling():
            if divided and not self.batch_dims and (self.pipelining is not None or not self.mesh.is_virtual):
                refuse_attention_over_samples(stages["annotate"].program)
        key = call.key(tree, self.modes(tree), free)
        made = Kept(
            key,
            self.executable(stages[-1].program),
            stages,
            call.told(free),
            free,
            {} if free else numbers,
            watches=watched(tree),
            origin=self._origin(call, tree),
            shapes=shapes_of(call, self.mesh, batch_dims),
        )
        return made, other

    def _staged(self, whole: Call, program: Program, tree: nn.Module, held: Plan, seconds: float) -> Stages:
        """The stages of a captured program, which is of one micro-batch, if there are several."""
        passes = self._passes(tree)
        if self.pipelining is None or self.pipelining.micro_batches == 1:
            with compiling():
                return self._planned(program, passes, held, seconds)
        count = self.pipelining.micro_batches
        with suppress(Untold), compiling():  # by one micro-batch, and all samples need not be captured
            return self._planned(program, in_micro_batches(passes, count), held, seconds)
        beside, _ = self.captured(whole, tree, self.sample_dims(whole))
        with compiling():
            return self._planned(program, in_micro_batches(passes, count, beside), held, seconds)

    def _planned(self, program: Program, passes: Sequence[Pass], held: Plan, seconds: float) -> Stages:
        """The stages of a captured program with the choices of the plan, and those that are made of parameters already.

        The plan says all of the first program. Of another one, for other inputs or modes, it may say what is not there.
        """
        self.plan.check_for(program.name, str(self.mesh))
        held = Plan().with_parameters(held, {s.names[0] for s in program.slots})
        plan = self.plan.with_names({name: s.names[0] for s in program.slots for name in s.names}).with_parameters(held)
        run = partial(self.run, passes=passes, seconds=seconds, check=check_types, progress=self.progress)
        try:
            stages = run(replace(program, plan=plan))
            plan.check_made(stages[-1].program.plan)
        except UnfitPlan as error:
            if not held.parameters or plan == plan.only_parameters():
                raise
            warnings.warn(f"Of the plan, another program takes the layouts of parameters alone. {error}", stacklevel=2)
            stages = run(replace(program, plan=plan.only_parameters()))
            held.check_made(stages[-1].program.plan)
        return stages

    def compile_for(self, kept: Kept, wanted: tuple[bool, ...]) -> Kept:
        """A program of the same calls for the gradients of other outputs, through the same passes; it saves the same values."""
        known = {k.key: k.name for k in kernels_of(kept.executable.program).values()}
        passes = kept.stages.passes(after="differentiate")
        before = kept.stages[: len(kept.stages) - len(passes)]
        start = [replace(s, program=replace(s.program, wanted=wanted)) for s in before]
        with compiling():
            named = [replace(p, known=known) if isinstance(p, Emit) else p for p in passes]
            later = self.run(start[-1].program, named, check=check_types, progress=self.progress)
        stages = Stages([*start, *later[1:]], later.told)
        return replace(kept, executable=self.executable(stages[-1].program), stages=stages, proof=None, others={})

    def chosen_alike(self, made: Kept) -> Kept:
        """The program with the choices of rank 0: ranks with different ones would wait for each other without end."""
        plan = choices_of_first(self.whole, str(made.executable.program.plan))
        if plan is None:
            return made
        warnings.warn(
            "Ranks have made different choices, of other plans or on other machines: rank 0's are taken.", stacklevel=2
        )
        stages = made.stages.again(Plan.parse(plan), check=check_types)
        return replace(made, stages=stages, executable=self.executable(stages[-1].program))

    def under(self, stages: Stages, zero: int, policies: Sequence[str]) -> Iterator[Program]:
        """What these stages would end with, lowered, under another storage and each of some policies of what is kept."""
        lowered = stages.lowered
        start = lowered["dispatch"].program
        start = replace(start, plan=replace(start.plan, zero=zero, stored={}, kept={}, together={}, waits={}))
        passes = recomputing(lowered.passes(after="dispatch"), policies[0])
        with compiling():
            first = run_passes(start, passes, check=check_types)
            yield first[-1].program
            for policy in policies[1:]:
                passes = recomputing(first.passes(after="differentiate"), policy)
                yield run_passes(first["differentiate"].program, passes, check=check_types)[-1].program

    def _origin(self, call: Call, tree: nn.Module) -> Origin:
        return Origin(
            model=self.model,
            arguments=call.without_tensors(),
            training=[m.training for m in (tree.get_submodule(path) for path, _ in self.model.named_modules())],
            grad=torch.is_grad_enabled(),
            dtype=next(tree.parameters()).dtype,
            tracer=self.tracer,
        )

    def _passes(self, tree: nn.Module) -> tuple[Pass, ...]:
        emission, _ = self.emission(tree)
        pipeline = for_kernels(self.pipeline) if emission else self.pipeline
        if self.pipelining is not None:
            pipeline = in_stages(pipeline, self.pipelining.stages, in_two=self.pipelining.in_two)
        policy = "blocks" if self.recompute is None and tree.training and checkpoints(self.model) else self.recompute
        if policy is not None:
            pipeline = recomputing(pipeline, policy)
        return (*pipeline, *self.own, *emission)

    def memory(self, stages: Stages) -> Any:
        """What a rank would hold of a program under each policy."""
        from foldcc.inspect.pipeline import Policies, memory

        policies, found = ("none", "selective", "blocks"), {}
        with one_at_a_time():
            for zero in (0, 1, 3):
                programs = map(self.executable, self.under(stages, zero, policies))
                found.update({(zero, policy): memory(p) for policy, p in zip(policies, programs, strict=True)})
        return Policies(found)

    def _check_autocast(self, tree: nn.Module) -> None:
        there, device = self.there.type, self.device(tree)
        if self.plan.precision is not None and (casts := Modes.now(device).autocast) is not None:
            raise FoldError(
                f"The call is under autocast to {casts}, and the program's precision is {self.plan.precision}.",
                valid="the call outside of torch.autocast; or parallelize without precision, and autocast around calls",
            )
        if there != device.type and Modes.now(device).autocast is not None:
            raise FoldError(
                f"Autocast on {device.type} casts nothing of a model on {there}, so its casts cannot be captured.",
                valid=f"the model on {device.type} before parallelize, or parameters in the dtype that they are used in",
            )

    def captured(
        self, call: Call, tree: nn.Module, batch_dims: Mapping[str, int | None], varying: Varying | None = None
    ) -> tuple[Program, set[str]]:
        """The model's program for a call, and the numbers among its inputs that the model did not look at."""
        model = self.model
        kwargs = call.whole(self.mesh, batch_dims, self.there)
        watch: AbstractContextManager[set[str]] = watched_numbers(model) if self.tracer == "export" else nullcontext(set())
        with (
            traceable(),
            elsewhere(tree).on_meta(tree, model),
            in_modes(model, tree),
            in_dtypes(model, tree, self.there),
            watch as blind,
            warnings.catch_warnings(),
        ):
            # torch.export copies its own specifications in a way that it has deprecated.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            device, recorder = self.device(tree), Recorder(watched(tree))
            program = capture(
                model, (), kwargs, self.mesh, tracer=self.tracer, device=device, recorder=recorder, varying=varying
            )
        program = with_results(program.with_gradients(call.given_gradients(tree)), recorder)
        program = replace(program, batch_dims=batch_dims)
        if self.pipelining is not None:
            program = with_counts(program)
        return program, blind

    def _over_numbers(
        self, call: Call, tree: nn.Module, program: Program, numbers: Mapping[str, Any], others: Iterable[Kept]
    ) -> tuple[Program, frozenset[str], Kept | None]:
        """A captured program; over numbers, where one for other numbers is kept and only computes with them too.

        The program then takes the place of that one, and has these numbers as inputs.
        """
        for other in others:
            theirs = other.blind
            free = frozenset(n for n, x in numbers.items() if n in theirs and Told.of(theirs[n]) != Told.of(x))
            if not free or without_digits(other.key, call.names, free) != call.key(tree, self.modes(tree), free):
                continue
            paths = [n for n, x in call.items() if isinstance(x, Tensor) or n in free]
            pairs = {n: (numbers[n], theirs[n]) for n in free}
            found = as_inputs(program, other.stages[0].program, pairs, paths)
            if found is not None and self._is_over(call, tree, program, {n: numbers[n] for n in free}, paths):
                return found, free, other
        return program, frozenset(), None

    def _is_over(self, call: Call, tree: nn.Module, program: Program, numbers: Mapping[str, Any], paths: list[str]) -> bool:
        """Whether the model computes the same with numbers that are far from those that were seen.

        An index into a table is nothing that a number could tell; there it is an error, or gives something else.
        """
        far = {n: number + 1_000_003 + i for i, (n, number) in enumerate(numbers.items())}
        try:
            other, blind = self.captured(call.with_numbers(far), tree, program.batch_dims)
        except Exception:  # whatever the model raises for such a number, it looks at it
            return False
        pairs = {n: (numbers[n], far[n]) for n in far}
        return far.keys() <= blind and as_inputs(program, other, pairs, paths) is not None
