"""FoldedModule: parameters by name, one compiled program for each kind of call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from foldcc.call import Call
from foldcc.checkpoints.files import number_of_bytes
from foldcc.checkpoints.storing import store
from foldcc.compiler import Compiler
from foldcc.errors import FoldError
from foldcc.hooks import call_backward, call_forward, told, watched
from foldcc.inspect.summary import copies
from foldcc.ir.plan import Plan
from foldcc.ir.program import told_outputs
from foldcc.mesh import FoldedMesh
from foldcc.passes import Pass, Stages, check_types, run_passes
from foldcc.programs import Kept, Programs
from foldcc.reports import Reports
from foldcc.resizing import resized
from foldcc.runtime.accumulation import MAY_WAIT, Accumulation
from foldcc.runtime.agreement import agree_on_call, agree_on_gradients, agree_on_start, on_one_rank, told_by_all
from foldcc.runtime.checkpoint import as_laid_out, refuse_overwritten, store_boxes, watch_optimizers
from foldcc.runtime.executable import Executable
from foldcc.runtime.keys import draw_keys
from foldcc.runtime.left_behind import notice_optimizers
from foldcc.runtime.modes import compiling, one_at_a_time
from foldcc.runtime.parameters import Places, Unset, as_unset, fill_unsaved, refuse_unset, still_unset
from foldcc.runtime.pipeline import Pipelined
from foldcc.runtime.schedule import Pipelining
from foldcc.runtime.wires import counted_elsewhere
from foldcc.tree import (
    Attributes,
    Elsewhere,
    copy_tree,
    drop_removed,
    inherit_hooks,
    of_the_original,
    outline,
    refuse_hooks,
    still_tied,
)
from foldcc.verification.compiled import prove_compiled
from foldcc.verification.schedule import prove_schedule
from foldcc.wrappers import AsksFirst

_SHARED = {"mesh", "_compiler"}  # by copies of a folded module
_itself = torch.compiler.disable(reason="a folded module is a compiled program already, with its own cache by shape")


class FoldedModule(Reports):
    """A model that runs in parallel. It is called like the original and returns the same type of output.

    Parameters keep their names and global shapes: full tensors on a virtual mesh, DTensors otherwise.

    Attributes:
        mesh: the FoldedMesh.
        stages: every pass of the newest program: its name, time, and the program after it.
    """

    mesh: FoldedMesh
    _ddp_params_and_buffers_to_ignore = AsksFirst("DistributedDataParallel", "the folded model as it is")
    _is_accelerate_prepared = AsksFirst(
        "Accelerate", "foldcc.trainers.accelerate.Accelerator(mesh), or foldcc.trainers.transformers.Trainer"
    )

    def __init__(
        self,
        model: nn.Module,
        mesh: FoldedMesh,
        *,
        tracer: str,
        kernels: str | ModuleType,
        pipeline: tuple[Pass, ...],
        verified: bool,
        progress: Callable[[str], None],
        batch_dims: Mapping[str, int | None] | None = None,
        check_ranks: bool = True,
        plan: Plan | None = None,
        recompute: str | float | None = None,
        pipelining: Pipelining | None = None,
        dynamic: tuple[str, ...] = (),
        cache: bool = False,
    ):
        super().__init__()
        vars(self).update(mesh=mesh, training=model.training)
        self._compiler = Compiler(
            model=outline(model),
            mesh=mesh.stage,
            whole=mesh,
            tracer=tracer,
            kernels=kernels,
            pipeline=pipeline,
            batch_dims=dict(batch_dims or {}),
            progress=progress,
            there=next(model.parameters()).device,
            plan=plan or Plan(),
            recompute=recompute,
            pipelining=pipelining,
            dynamic=dynamic,
            cache=cache,
        )
        self._programs = Programs()
        self._places = Places(mesh.stage)
        self._structure: tuple[str, str] | None = None  # of example_inputs
        self._verified = verified
        self._check_ranks = check_ranks and not mesh.is_virtual
        self._started = False
        self._keeps = False  # gradients unreduced, inside no_sync
        self._unset: Unset = {}
        self._elsewhere = Elsewhere()
        refuse_hooks(model)
        copy_tree(model, self, mesh.stage)
        self._inherited = inherit_hooks(model, self)
        self._attributes = Attributes(self)
        self.register_state_dict_post_hook(store_boxes)
        notice_optimizers(model, self)
        if not mesh.is_virtual:
            watch_optimizers(*mesh.stage.of_tensors.values())

    @_itself
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self._agreed(args, kwargs)
        parts = self._compiler.micro_batches(call)
        kept = self._find(parts[0])
        if kept is None:
            self._compile(call)
            kept = self._find(parts[0])
            assert kept is not None
        program, executable = kept.executable.program, kept.executable
        first = {slot.name: slot.names[0] for slot in program.slots}
        held = self._places.held(self, first.values())
        state = {i: held[first[name]] for i, name in program.updates.items()}
        if self._check_ranks and not self._started:
            layouts = [node.meta["layout"] for node in executable.outputs]
            buffers = {first[name]: (state[i], layouts[i]) for i, name in program.updates.items()}
            agree_on_start(self.mesh, call.tensors(), {**self._places.of(self), **buffers})
            self._started = True
        device, draws = self._compiler.device(self), sum(s.kind == "key" for s in program.slots)
        keys = draw_keys(len(parts) * draws, self.mesh, device)
        values = [kept.values(part, held, keys, device) for part in parts]
        others = partial(self._for_gradients, kept)
        for name in self._elsewhere.counted:  # of this module's own parameters, which may have been copied or replaced
            counted_elsewhere(self.get_parameter(name))
        seen_ahead, seen_back = executable.events
        after = partial(call_backward, self, seen_back, executable.no_gradient) if program.observed else None
        outputs, seen = executable.in_micro_batches(values, others, after)
        with torch.no_grad():
            for i, buffer in state.items():
                buffer.copy_(outputs[i])
        for each in seen:
            call_forward(self, seen_ahead, each)
        return program.returned(outputs)

    def _agreed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call, where nothing speaks against it, and on real ranks all of them are about to run the same program."""
        try:
            drop_removed(self._inherited)
            self._attributes.check(self)
            if not self._check_ranks:
                self._elsewhere.check(self)
            refuse_unset(self, self._unset)
            call = Call.of(self._compiler.model, args, kwargs)
            call.check_structure(self._structure)
        except Exception as error:
            if self._check_ranks:
                agree_on_call(self.mesh, "", error=error)
            raise
        if self._check_ranks:
            mode = "training" if self.training else "evaluation"
            hooks = f", with hooks{told(watches, all=True)}" if (watches := watched(self)) else ""
            run, own = f"{call} in {mode}{self._compiler.modes(self)}{hooks}", self._elsewhere.to_tell(self)
            if self._elsewhere.is_news(agree_on_call(self.mesh, run, call.tensors(), own=str(own))):
                self._elsewhere.hear(told_by_all(self.mesh, own))
        return call

    def _find(self, call: Call) -> Kept | None:
        modes = self._compiler.modes(self)
        return self._programs.find(lambda free: call.key(self, modes, free))

    def _compile(self, call: Call, *, fixed: bool = False) -> None:
        with one_at_a_time():
            made, replaced = resized(self._compiler, self._programs, call, self), None
            if made is None:
                made, replaced = self._compiler.compile(call, self, self._places.plan, self._programs.kept.values())
                with compiling():
                    made = self._proved(self._compiler.chosen_alike(made))
            with compiling():
                self._places.take(self, made.executable.program)
                if isinstance(made.executable, Pipelined) and not self.mesh.is_virtual:
                    made.executable.keep_own(self, self._elsewhere)
            self._programs.keep(made, replaced)
        if not made.resized and (found := copies(self.stages)) is not None:
            self._programs.announce_copies(found)
        if fixed:
            self._structure = call.structure

    def _proved(self, made: Kept) -> Kept:
        if not self._verified:
            return made
        self._compiler.progress("verify")
        buffers = dict(self.named_buffers(remove_duplicate=False))
        proof = on_one_rank(self.mesh, partial(prove_compiled, made.stages.lowered, buffers, made.origin))
        if isinstance(made.executable, Pipelined):
            told = prove_schedule(made.executable.pipelining, backward=made.executable.trains)
            proof = replace(proof, proved=(*proof.proved, told))
        return replace(made, proof=proof)

    def _for_gradients(self, kept: Kept, wanted: tuple[bool, ...]) -> tuple[Executable, Accumulation]:
        """What runs a backward pass that is given the gradients of these outputs, and what waits to be reduced with them."""
        waits = MAY_WAIT and not self.mesh.is_virtual and self._compiler.pipelining is None
        accumulation = Accumulation(self.mesh, dict(self.named_parameters()) if waits else {}, self._keeps and waits)
        if self._check_ranks:
            agree_on_gradients(self.mesh, f"{told_outputs(wanted)}{accumulation}")
        if wanted == kept.executable.program.wanted:
            return kept.executable, accumulation
        with one_at_a_time():
            other = self._programs.find_other(kept, wanted)
            if other is None:
                other = self._compiler.compile_for(kept, wanted)
                with compiling():
                    other = self._proved(other)
                self._programs.keep_other(other, kept)
        return other.executable, accumulation

    def take_any_structure(self) -> None:
        """From now on calls need not have the structure of `example_inputs`; each other one is a program of its own."""
        self._structure = None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """As of `DistributedDataParallel`: backward passes in this context leave gradients unreduced, and the first one outside
        of it adds its own and reduces them all, once.

            for i, batch in enumerate(batches):
                with model.no_sync() if i + 1 < len(batches) else nullcontext():
                    model(**batch).loss.backward()

        In between, `.grad` is a DTensor of terms of a sum (`Partial`) in the layout in which the program uses the parameter. It
        adds up over programs of different shapes, its `full_tensor()` is the right gradient, and `zero_grad` drops it. With
        `zero=1` to `3` a rank then holds whole gradients, not its share. What needs no reduction is in `.grad` as ever. On a
        virtual mesh, in micro-batches, with hooks on gradients and with PyTorch 2.11, each backward pass reduces them.
        """
        before, self._keeps = self._keeps, True
        try:
            yield
        finally:
            self._keeps = before

    def with_passes(self, *passes: Pass) -> FoldedModule:
        """The same module, with the same parameters, its newest program rewritten by passes of your own.

        They run after the last stage, before kernels are emitted, and become stages themselves; types are checked after
        each. So they do in every program that the returned module compiles later. This module is left as it is.
        """
        stages, (emission, _) = self.stages.lowered, self._compiler.emission(self)
        later = run_passes(stages[-1].program, [*passes, *emission], check=check_types)
        stages = Stages([*stages, *list(later)[1:]])
        other = copy.copy(self)
        other._compiler = replace(self._compiler, own=(*self._compiler.own, *passes))
        other._programs = self._programs.rewritten(stages, self._compiler.executable(stages[-1].program))
        return other

    # --- what the original has besides ---

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_compiler" not in vars(self) or name.startswith("__"):
                raise
        return of_the_original(self._compiler.model, self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and inspect.unwrap(getattr(value, "__func__", value)) is not inspect.unwrap(type(self).forward):
            raise FoldError(
                "The forward of a folded model is its program, and another one would run the modules instead.",
                forward=f"{value.__module__}.{value.__qualname__}",
                valid="the other forward on the model before parallelize; a loss that the model returns",
            )
        known = name in vars(self) or name.startswith("_") or hasattr(type(self), name)
        held = name in self._modules or name in self._parameters or name in self._buffers
        original = None if known or held else self._compiler.model
        if original is not None:
            Attributes.refuse(original, name)
        super().__setattr__(name, value)

    # --- values that are given afterwards, or taken away ---

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Writes weights and configuration as the model's library does, for `from_pretrained` and `foldcc.load_pretrained`.

        Of one of PEFT's, the adapter. Collective. No rank holds more than one tensor whole, and what stood there stays until
        all is written.
        """
        store(self, Path(folder), most=number_of_bytes(max_shard_size))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        for name in self._elsewhere.names:
            state.pop(prefix + name, None)
        refuse_overwritten(self, state, prefix)
        as_laid_out(self, state, prefix, assign=bool(metadata.get("assign_to_params_buffers")))
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def to_empty(self, *, device: Any, recurse: bool = True) -> FoldedModule:
        """As of any module. Buffers that no state dict holds are the original's where it has their values.

        Where the original is on meta they are to be set before the next call, which is an error otherwise.
        """
        super().to_empty(device=device, recurse=recurse)
        self._unset = as_unset(self, fill_unsaved(self, self._compiler.model))
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedModule:
        unset = still_unset(self, self._unset)
        with still_tied(self):
            super()._apply(fn, recurse)
        self._unset = as_unset(self, unset)
        return self

    # --- copies ---

    def __copy__(self) -> FoldedModule:
        new = type(self).__new__(type(self))
        vars(new).update(vars(self))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedModule:
        """Parameters of its own, and the same programs: they are given parameters in each call."""
        drop_removed(self._inherited)
        self._attributes.check(self)
        new = memo[id(self)] = type(self).__new__(type(self))
        for name, x in vars(self).items():
            if name not in ("_attributes", "_inherited", "_unset"):
                vars(new)[name] = x if name in _SHARED else copy.deepcopy(x, memo)
        new._attributes, new._inherited = Attributes(new), []
        new._unset = as_unset(new, still_unset(self, self._unset))
        return new

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: nobody to report progress to, and buffers without values by name."""
        drop_removed(self._inherited)
        self._attributes.check(self)
        state = {name: x for name, x in vars(self).items() if name not in ("_attributes", "_inherited")}
        return {
            **state,
            "_compiler": replace(self._compiler, progress=quiet),
            "_unset": still_unset(self, self._unset),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_state, (type(self._compiler.model),), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._unset = as_unset(self, state["_unset"])
        if not self.mesh.is_virtual:
            watch_optimizers(*self.mesh.stage.of_tensors.values())
        self._attributes, self._inherited = Attributes(self), []


_CLASSES: dict[type[nn.Module], type[FoldedModule]] = {}


def called_like(original: type[nn.Module]) -> type[FoldedModule]:
    """The class of the folded modules of a class, whose forward has the signature of the original's.

    Trainers read off it which columns of a data set are arguments, and which of them are labels.
    """

    @_itself
    def forward(self: FoldedModule, *args: Any, **kwargs: Any) -> Any:
        return FoldedModule.forward(self, *args, **kwargs)

    if original not in _CLASSES:
        vars(forward)["__signature__"] = inspect.signature(original.forward)
        members = {"forward": forward, "__module__": FoldedModule.__module__}
        _CLASSES[original] = type("FoldedModule", (FoldedModule,), members)
    return _CLASSES[original]


def _without_state(original: type[nn.Module]) -> FoldedModule:
    cls = called_like(original)
    return cls.__new__(cls)


def quiet(name: str) -> None:
    """Progress that nobody follows."""
