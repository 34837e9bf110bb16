"""FoldedModule: parameters by name, one compiled program for each kind of call."""

from __future__ import annotations

import copy
import inspect
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from foldcc.capture import capture
from foldcc.capture.numbers import as_inputs, as_tensor, watched
from foldcc.capture.unchanged import in_dtypes, in_modes
from foldcc.codegen import Emit, Kernels, kernels_of
from foldcc.codegen.source import unusable
from foldcc.errors import FoldError, NotFolded, divides, listed
from foldcc.layout import Layout
from foldcc.mesh import FoldedMesh
from foldcc.passes import Pass, Stages, check_types, run_passes
from foldcc.passes.differentiate import Differentiate
from foldcc.passes.shard import ShardPass
from foldcc.program import Program
from foldcc.runtime.agreement import agree_on_call, agree_on_start
from foldcc.runtime.checkpoint import as_laid_out, refuse_overwritten, store_boxes, watch_optimizers
from foldcc.runtime.executable import Executable
from foldcc.runtime.groups import create_groups
from foldcc.runtime.modes import Modes, compiling, traceable
from foldcc.runtime.placement import cut, placements
from foldcc.samples import refuse_attention_over_samples, sample_dims
from foldcc.tree import Attributes, copy_tree, of_the_original, refuse_hooks, unsaved_buffers
from foldcc.verification import first_broken

KEPT = 16  # programs of a module
# What copies of a folded module share: the original, and what nothing changes.
_SHARED = {"mesh", "_held", "_tracer", "_kernels", "_pipeline", "_own", "_notes", "_progress", "_newest"}
_ADVICE = {
    "tensor": "A program is specialised to the shapes and dtypes of its inputs: pad them to few different shapes.",
    "number": "A program is specialised to Python numbers: pass one that varies as a tensor without dimensions.",
    "flag": None,
}


@dataclass(frozen=True)
class _Told:
    """An input as a person reads it, and what kind of thing it is."""

    kind: str
    text: str

    @staticmethod
    def of(x: Any) -> _Told:
        if isinstance(x, Tensor):
            return _Told("tensor", f": {str(x.dtype).removeprefix('torch.')}{list(x.shape)}")
        return _Told("number" if isinstance(x, (int, float)) and not isinstance(x, bool) else "flag", f"={x!r}")

    @staticmethod
    def any(x: Any) -> _Told:
        return _Told("number", f": any {type(x).__name__}")

    def __str__(self) -> str:
        return self.text


class FoldedModule(nn.Module):
    """A model that runs in parallel. It is called like the original and returns the same type of output.

    Parameters keep their names and global shapes: full tensors on a virtual mesh, DTensors otherwise.

    Attributes:
        mesh: the FoldedMesh.
        stages: every pass of the newest program: its name, time, and the program after it.
    """

    mesh: FoldedMesh

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
    ):
        super().__init__()
        vars(self).update(mesh=mesh, training=model.training)
        self._held = (model,)  # in a tuple, for it is no submodule: its parameters are not this module's
        self._tracer = tracer
        self._kernels = kernels
        self._pipeline = pipeline
        self._own: tuple[Pass, ...] = ()  # of with_passes
        self._batch_dims = dict(batch_dims or {})
        self._check_ranks = check_ranks and not mesh.is_virtual
        self._started = False
        self._notes: tuple[str, ...] = ()
        self._verified = verified
        self._progress = progress
        self._programs: dict[Any, tuple[Executable, Stages]] = {}  # the least recently used first
        self._calls: dict[Any, dict[str, _Told]] = {}  # what each was compiled for: the inputs, as a person reads them
        self._blind: dict[Any, dict[str, Any]] = {}  # the numbers of its call that the model does not look at
        self._free: list[frozenset[str]] = []  # numbers that are inputs of a program
        self._announced: set[str] = set()
        self._newest: Any = None
        self._structure: str | None = None
        self._structure_names = ""
        self._layouts: dict[str, Layout] = {}
        self._placements: dict[str, tuple[Placement, ...]] = {}
        refuse_hooks(model)
        copy_tree(model, self, mesh)
        self._attributes = Attributes(self)
        self._unset: dict[str, tuple[Tensor, int]] = {}  # buffers that to_empty left without values
        self.register_state_dict_post_hook(store_boxes)
        if not mesh.is_virtual:
            watch_optimizers(mesh.attention, mesh.moe)

    @torch.compiler.disable(reason="a folded module is a compiled program already, with its own cache by shape")
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec, names = self._agreed(args, kwargs)
        key, free = self._find(leaves, spec, names)
        if key not in self._programs:
            self._compile(leaves, spec, names)
            key, free = self._find(leaves, spec, names)
        executable, _ = self._programs[key] = self._programs.pop(key)
        program = executable.program
        if self._check_ranks and not self._started:
            self._check_start(leaves, names)
        numbers = [as_tensor(x, self._device()) if n in free else x for n, x in zip(names, leaves, strict=True)]
        inputs = iter(x for x in numbers if isinstance(x, Tensor))
        held = {
            **dict(self.named_parameters(remove_duplicate=False)),
            **dict(self.named_buffers(remove_duplicate=False)),
        }
        values = []
        for slot in program.slots:
            if slot.kind == "input":
                values.append(next(inputs))
            elif slot.kind == "constant":
                values.append(program.constants[slot.name])
            else:
                values.append(self._local(slot.names[0], held[slot.names[0]]))
        return program.returned(executable(values))

    def with_passes(self, *passes: Pass) -> FoldedModule:
        """The same module, with the same parameters, its newest program rewritten by passes of your own.

        They run after the last stage, before kernels are emitted, and become stages themselves; types are checked after
        each. So they do in every program that the returned module compiles later. This module is left as it is.
        """
        stages = self.stages.lowered
        later = run_passes(stages[-1].program, [*passes, *self._emission()], check=check_types)
        other = copy.copy(self)
        other._own = (*self._own, *passes)
        other._programs = {self._newest: (Executable(later[-1].program), Stages([*stages, *list(later)[1:]]))}
        other._calls = {self._newest: self._calls[self._newest]}
        return other

    # --- what a person reads ---

    @property
    def program(self) -> Program:
        """The newest program, lowered."""
        return self._current()[0].program

    @property
    def programs(self) -> tuple[str, ...]:
        """The calls that programs are kept for, as text, the least recently used first; at most 16.

        A program is specialised to shapes, dtypes, Python values and modes; another call compiles another one. A number that
        the model only computes with becomes an input of the program when a second value is seen. What is evicted is
        compiled again when it is needed again.
        """
        return tuple(", ".join(f"{name}{told}" for name, told in self._calls[key].items()) for key in self._programs)

    @property
    def stages(self) -> Stages:
        return self._current()[1]

    @property
    def kernels(self) -> Kernels:
        """The Triton kernels of the newest program, by name, and what of it they cover; none if it runs as ATen."""
        return kernels_of(self.program, self._notes)

    def collectives(self) -> Any:
        """Each collective of a training step: its axis, the bytes that a rank sends, and the module that it serves."""
        from foldcc.inspect.collectives import collectives

        return collectives(self.stages)

    def summary(self) -> Any:
        """FLOPs and parameters of a rank against those of the whole model."""
        from foldcc.inspect.summary import summary

        return summary(self.stages)

    def _current(self) -> tuple[Executable, Stages]:
        if self._newest is None:
            raise FoldError("Nothing is compiled yet.", valid="pass example_inputs to parallelize, or call the model once")
        return self._programs[self._newest]

    # --- what the original has besides ---

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_held" not in vars(self) or name.startswith("__"):
                raise
        return of_the_original(self._held[0], self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        known = name in vars(self) or name.startswith("_") or hasattr(type(self), name)
        held = name in self._modules or name in self._parameters or name in self._buffers
        if not known and not held and hasattr(self._held[0], name):
            raise NotFolded(
                f"{name} is an attribute of {type(self._held[0]).__name__}, whose forward may read it; programs would not.",
                valid="the change on the original model, before parallelize",
            )
        super().__setattr__(name, value)

    # --- values that are given afterwards ---

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        refuse_overwritten(self, state, prefix)
        as_laid_out(self, state, prefix, assign=bool(metadata.get("assign_to_params_buffers")))
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def to_empty(self, *, device: Any, recurse: bool = True) -> FoldedModule:
        """As of any module. Buffers that no state dict holds are the original's where it has their values.

        Where the original is on meta they are to be set before the next call, which is an error otherwise.
        """
        super().to_empty(device=device, recurse=recurse)
        originals = dict(self._held[0].named_buffers(remove_duplicate=False))
        for name, buffer in unsaved_buffers(self):
            original = originals.get(name)
            if original is not None and not original.is_meta:
                buffer.copy_(original)
        self._mark_unset({n for n, b in unsaved_buffers(self) if n not in originals or originals[n].is_meta})
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedModule:
        unset = self._still_unset()
        super()._apply(fn, recurse)
        self._mark_unset(unset)
        return self

    def _mark_unset(self, names: Collection[str]) -> None:
        self._unset = {name: (b, b._version) for name, b in unsaved_buffers(self) if name in names and not b.is_meta}

    def _still_unset(self) -> list[str]:
        now = dict(unsaved_buffers(self)) if self._unset else {}
        return [name for name, (b, version) in self._unset.items() if now.get(name) is b and b._version == version]

    # --- copies ---

    def __copy__(self) -> FoldedModule:
        new = type(self).__new__(type(self))
        vars(new).update(vars(self))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedModule:
        """Parameters of its own, and the same programs: they are given parameters in each call."""
        self._attributes.check(self)
        new = memo[id(self)] = type(self).__new__(type(self))
        for name, x in vars(self).items():
            if name in ("_attributes", "_unset"):
                continue
            if name in ("_programs", "_calls", "_blind", "_free", "_layouts", "_placements", "_announced"):
                vars(new)[name] = copy.copy(x)
            else:
                vars(new)[name] = x if name in _SHARED else copy.deepcopy(x, memo)
        new._attributes = Attributes(new)
        new._mark_unset(self._still_unset())
        return new

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: no program, for calls compile them again, and nobody to report progress to."""
        self._attributes.check(self)
        state = {name: x for name, x in vars(self).items() if name != "_attributes"}
        return {
            **state,
            "_programs": {},
            "_calls": {},
            "_blind": {},
            "_free": [],
            "_newest": None,
            "_progress": quiet,
            "_unset": self._still_unset(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark_unset(state["_unset"])
        if not self.mesh.is_virtual:
            watch_optimizers(self.mesh.attention, self.mesh.moe)
        self._attributes = Attributes(self)

    # --- compiling ---

    def _passes(self) -> list[Pass]:
        emission = self._emission()
        found: list[Pass] = []
        for p in (*self._pipeline, *self._own, *emission):
            if isinstance(p, ShardPass):
                p = replace(p, kept=self._layouts)
            elif isinstance(p, Differentiate):
                p = replace(p, for_kernels=bool(emission))
            found.append(p)
        return found

    def _emission(self) -> tuple[Pass, ...]:
        self._notes = ()
        if self._kernels == "aten" or (self._kernels == "auto" and self._device().type != "cuda"):
            return ()
        if self._kernels == "auto" and (why := unusable()) is not None:
            self._notes = (f"{why}, so the program runs as ATen.",)
            return ()
        return (Emit(edited=self._kernels if isinstance(self._kernels, ModuleType) else None),)

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], pytree.TreeSpec, list[str]]:
        """The leaves of a call, all arguments by name, their structure, and their paths."""
        signature = inspect.signature(self._held[0].forward)
        bound = signature.bind(*args, **kwargs).arguments
        named: dict[str, Any] = {}
        for name, value in bound.items():
            kind = signature.parameters[name].kind
            if kind == inspect.Parameter.VAR_POSITIONAL:
                raise FoldError(f"The forward of {type(self._held[0]).__name__} takes *{name}; pass arguments by name.")
            named.update(value if kind == inspect.Parameter.VAR_KEYWORD else {name: value})
        paths, spec = pytree.tree_flatten_with_path(named)
        return [x for _, x in paths], spec, [pytree.keystr(p) for p, _ in paths]

    def _agreed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], pytree.TreeSpec, list[str]]:
        """`_bind`, where nothing speaks against a call, and on real ranks all of them are about to run the same program."""
        if not self._check_ranks:
            self._check_tree()
            return self._bind(args, kwargs)
        try:
            self._check_tree()
            bound = self._bind(args, kwargs)
            self._check_structure(*bound)
        except Exception as error:
            agree_on_call(self.mesh, "", error)
            raise
        leaves, _, names = bound
        call = ", ".join(f"{name}{_Told.of(x)}" for name, x in zip(names, leaves, strict=True))
        mode = "training" if self.training else "evaluation"
        agree_on_call(self.mesh, f"{call} in {mode}{Modes.now(self._device())}")
        return bound

    def _check_tree(self) -> None:
        self._attributes.check(self)
        if unset := self._still_unset():
            raise FoldError(
                f"Buffer {unset[0]} has no values: to_empty left it as it was allocated, and no state dict holds it.",
                valid="folded.get_buffer(name).copy_(value) with the values of a model that was not built on meta",
                buffers=listed(unset),
            )

    def _check_start(self, leaves: list[Any], names: list[str]) -> None:
        """The samples and the weights of the first step."""
        parameters = {n: self._local(n, p) for n, p in self.named_parameters()}
        agree_on_start(
            self.mesh,
            {n: x for n, x in zip(names, leaves, strict=True) if isinstance(x, Tensor)},
            {n: (parameters[n], layout) for n, layout in self._layouts.items() if n in parameters},
        )
        self._started = True

    def _find(self, leaves: list[Any], spec: pytree.TreeSpec, names: list[str]) -> tuple[Any, frozenset[str]]:
        """The key of a call, and the numbers that are inputs of its program."""
        for free in self._free:
            key = self._key(leaves, spec, names, free)
            if key in self._programs:
                return key, free
        return self._key(leaves, spec, names), frozenset()

    def _key(
        self, leaves: list[Any], spec: pytree.TreeSpec, names: list[str], free: frozenset[str] = frozenset()
    ) -> tuple[Any, ...]:
        """What a program is specialised to. Python numbers by type and digits, for True == 1 and 0.0 == -0.0.

        Args:
            free: numbers that are inputs of the program, which is specialised to their types alone.
        """
        told = tuple(
            (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else (type(x), None if n in free else repr(x))
            for n, x in zip(names, leaves, strict=True)
        )
        modes = tuple(m.training for m in self.modules())
        dtypes = tuple(x.dtype for x in (*self.parameters(), *self.buffers()))
        return (str(spec), told, modes, dtypes, Modes.now(self._device()), self._given_gradients(leaves, names))

    def _given_gradients(self, leaves: list[Any], names: list[str]) -> frozenset[str]:
        """The parameters and inputs that require a gradient, by name; none where gradients are switched off."""
        if not torch.is_grad_enabled():
            return frozenset()
        parameters = (name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad)
        inputs = (name for name, x in zip(names, leaves, strict=True) if isinstance(x, Tensor) and x.requires_grad)
        return frozenset([*parameters, *inputs])

    def _compile(self, leaves: list[Any], spec: pytree.TreeSpec, names: list[str], *, fixed: bool = False) -> None:
        structure = self._check_structure(leaves, spec, names)
        divided = self.mesh.size("dp") > 1
        batch_dims = sample_dims(leaves, names, self._batch_dims, divided=divided)
        self._check_autocast()
        start = time.perf_counter()
        self._progress("capture")
        program, blind = self._captured(leaves, spec, names, batch_dims)
        key, program, free = self._over_numbers(leaves, spec, names, program, blind)
        seconds = time.perf_counter() - start
        with compiling():
            stages = run_passes(program, self._passes(), seconds=seconds, check=check_types, progress=self._progress)
            if divided and not self.mesh.is_virtual and not self._batch_dims:
                refuse_attention_over_samples(stages["annotate"].program)
            self._take_places(stages[-1].program)
        executable = Executable(stages[-1].program)
        told = {n: _Told.any(x) if n in free else _Told.of(x) for n, x in zip(names, leaves, strict=True)}
        self._keep(key, (executable, stages), told)
        if self._verified:
            self._progress("verify")
            with compiling():
                first_broken(self).raise_if_failed()
        if fixed:
            self._structure, self._structure_names = structure, ", ".join(names)

    def _captured(
        self, leaves: list[Any], spec: pytree.TreeSpec, names: list[str], batch_dims: Any
    ) -> tuple[Program, set[str]]:
        """The model's program for a call, and the numbers among its inputs that the model did not look at."""
        kwargs, held = pytree.tree_unflatten(self._global(leaves, names, batch_dims), spec), self._held[0]
        watch: AbstractContextManager[set[str]] = watched(held) if self._tracer == "export" else nullcontext(set())
        with traceable(), in_modes(held, self), in_dtypes(held, self), watch as blind, warnings.catch_warnings():
            # torch.export copies its own specifications in a way that it has deprecated.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            program = capture(held, (), kwargs, self.mesh, tracer=self._tracer, device=self._device())
        return replace(program.with_gradients(self._given_gradients(leaves, names)), batch_dims=batch_dims), blind

    def _over_numbers(
        self, leaves: list[Any], spec: pytree.TreeSpec, names: list[str], program: Program, blind: set[str]
    ) -> tuple[Any, Program, frozenset[str]]:
        """A captured program's key; over numbers, where one for other numbers is kept and only computes with them too.

        The program then takes the place of that one, and has these numbers as inputs.
        """
        key = self._key(leaves, spec, names)
        numbers = {n: x for n, x in zip(names, leaves, strict=True) if n in blind}
        self._blind[key] = numbers
        for other in self._programs:
            theirs = self._blind.get(other, {})
            free = frozenset(n for n, x in numbers.items() if n in theirs and _Told.of(theirs[n]) != _Told.of(x))
            if not free or _over(other, names, free) != _over(key, names, free):
                continue
            paths = [n for n, x in zip(names, leaves, strict=True) if isinstance(x, Tensor) or n in free]
            pairs = {n: (numbers[n], theirs[n]) for n in free}
            found = as_inputs(program, self._programs[other][1][0].program, pairs, paths)
            if found is not None and self._is_over(leaves, spec, names, program, pairs, paths):
                del self._programs[other], self._calls[other], self._blind[other]
                if free not in self._free:
                    self._free.append(free)
                return self._key(leaves, spec, names, free), found, free
        return key, program, frozenset()

    def _is_over(
        self,
        leaves: list[Any],
        spec: pytree.TreeSpec,
        names: list[str],
        program: Program,
        pairs: Mapping[str, tuple[Any, Any]],
        paths: list[str],
    ) -> bool:
        """Whether the model computes the same with numbers that are far from those that were seen.

        An index into a table is nothing that a number could tell; there it is an error, or gives something else.
        """
        far = {n: (number, number + 1_000_003 + i) for i, (n, (number, _)) in enumerate(pairs.items())}
        tried = [far[n][1] if n in far else x for n, x in zip(names, leaves, strict=True)]
        try:
            other, blind = self._captured(tried, spec, names, program.batch_dims)
        except Exception:  # whatever the model raises for such a number, it looks at it
            return False
        return far.keys() <= blind and as_inputs(program, other, far, paths) is not None

    def _check_structure(self, leaves: list[Any], spec: pytree.TreeSpec, names: list[str]) -> str:
        """The structure of a call; with example_inputs it is theirs."""
        structure = f"{spec} {[n for n, x in zip(names, leaves, strict=True) if isinstance(x, Tensor)]}"
        if self._structure is not None and structure != self._structure:
            raise FoldError(
                f"The model is called with {', '.join(names)}, and was compiled for another structure of inputs.",
                compiled=self._structure_names,
                valid="the structure of example_inputs; without example_inputs, any",
            )
        return structure

    def _keep(self, key: Any, made: tuple[Executable, Stages], call: dict[str, _Told]) -> None:
        """Stores a program under its key, says once why there is another one, and evicts the least recently used."""
        others = [c for k in self._programs if (c := self._calls[k]).keys() == call.keys()]
        changed = min(([n for n in call if call[n] != other[n]] for other in others), key=len, default=[])
        for name in changed[:1]:
            was = next(other[name] for other in others if other[name] != call[name])
            advice = _ADVICE[call[name].kind]
            if advice is not None:
                what = f"Another program was compiled, for {name}{call[name]} instead of {name}{was}. "
                self._announce(call[name].kind, what + advice)
        self._programs[key] = made
        self._calls[key] = call
        self._newest = key
        while len(self._programs) > KEPT:
            evicted = next(iter(self._programs))
            del self._programs[evicted], self._calls[evicted]
            self._blind.pop(evicted, None)
            self._announce(
                "eviction",
                f"{KEPT} programs are kept, and another call was compiled: from now on, the least recently used is dropped, "
                "and compiled again when it is needed. model.programs lists them.",
            )

    def _announce(self, cause: str, text: str) -> None:
        if cause not in self._announced:
            self._announced.add(cause)
            warnings.warn(text, stacklevel=2)

    def _check_autocast(self) -> None:
        there, device = next(self._held[0].parameters()).device.type, self._device()
        if there != device.type and Modes.now(device).autocast is not None:
            raise FoldError(
                f"Autocast on {device.type} casts nothing of a model on {there}, so its casts cannot be captured.",
                valid=f"the model on {device.type} before parallelize, or parameters in the dtype that they are used in",
            )

    def _local(self, name: str, held: Tensor) -> Tensor:
        """What this rank holds of a parameter or buffer."""
        if held.is_meta:
            raise FoldError(
                f"{name} is on meta and has no values.",
                valid='folded.to_empty(device="cpu"), then load_state_dict or an initialisation of your own',
            )
        layout = self._layouts.get(name)
        if layout is not None and self.mesh.is_virtual == isinstance(held, DTensor):
            raise FoldError(
                f"Parameter {name} was replaced by {'a DTensor' if self.mesh.is_virtual else 'a plain tensor'}.",
                mesh=str(self.mesh),
                valid="copying into it: folded.load_state_dict, or with torch.no_grad(): parameter.copy_(value)",
            )
        if not isinstance(held, DTensor):
            return held
        if layout is not None and held.placements != self._placements[name]:
            raise FoldError(
                f"Parameter {name} was laid out anew, as {held.placements}.",
                valid=f"{self._placements[name]}, which its programs are compiled for",
            )
        return held.to_local(grad_placements=held.placements)

    def _device(self) -> torch.device:
        if not self.mesh.is_virtual:
            return torch.device(self.mesh.device_type)
        device = next(self.parameters()).device  # where they are now, which `.to` may have changed
        return torch.device("cpu") if device.type == "meta" else device

    def _global(self, leaves: list[Any], names: list[str], batch_dims: Mapping[str, int | None]) -> list[Any]:
        """Stand-ins for the inputs with global shapes, on the model's device."""
        dp = self.mesh.size("dp")
        device = next(self._held[0].parameters()).device
        found: list[Any] = []
        for x, name in zip(leaves, names, strict=True):
            if not isinstance(x, Tensor):
                found.append(x)
                continue
            shape = list(x.shape)
            if 0 in shape:
                raise FoldError(f"Input {name} is empty: its shape is {shape}.")
            d = batch_dims[name]
            if d is not None:
                if self.mesh.is_virtual:
                    divides("samples", shape[d], "dp", dp, input=name, mesh=str(self.mesh), valid=f"multiples of {dp}")
                else:
                    shape[d] *= dp
            found.append(torch.zeros(shape, dtype=x.dtype, device=device))
        return found

    def _take_places(self, program: Program) -> None:
        """Puts each parameter into its layout, the first time that it has one."""
        layouts = {s.names[0]: n.meta["layout"] for s, n in zip(program.slots, program.placeholders, strict=True)}
        kinds = {s.names[0]: s.kind for s in program.slots}
        for name, layout in layouts.items():
            if kinds[name] != "parameter" or name in self._layouts:
                continue
            self._layouts[name] = layout
            self._placements[name] = tuple(placements(layout, self.mesh))
            if not self.mesh.is_virtual:
                self._distribute(name, layout)
        if not self.mesh.is_virtual:
            create_groups(self.mesh, _axes_used(program))

    def _distribute(self, name: str, layout: Layout) -> None:
        """Leaves this rank its part of a parameter. It stays the same object, so an optimizer may hold it already."""
        parameter = self.get_parameter(name)
        assert isinstance(parameter, DTensor)
        local = cut(parameter.to_local().detach(), layout, self.mesh, dist.get_rank()).clone()
        side = self.mesh.attention if layout.view == "attention" else self.mesh.moe
        there = self._placements[name]
        whole = DTensor.from_local(local, side, there, run_check=False, shape=parameter.shape, stride=parameter.stride())
        torch.utils.swap_tensors(parameter, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _over(key: tuple[Any, ...], names: list[str], free: frozenset[str]) -> tuple[Any, ...]:
    """A key without the digits of some numbers."""
    spec, told, *rest = key
    if len(told) != len(names):
        return key
    return (spec, tuple((x[0], None) if n in free else x for n, x in zip(names, told, strict=True)), *rest)


def quiet(name: str) -> None:
    """Progress that nobody follows."""


def _axes_used(program: Program) -> list[str]:
    from foldcc.ops import record

    found = set()
    for graph in (program.graph, program.backward):
        for block in graph.children() if graph is not None else ():
            assert isinstance(block, GraphModule)
            for node in block.graph.nodes:
                known = record(node.target)
                if known is not None and known.simulate is not None:
                    found.add(known.arguments(node.args, dict(node.kwargs))["axes"])
    return sorted(found)
