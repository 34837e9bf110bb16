"""Is the captured program what the module computes? The module itself is run over the field, as its authors wrote it.

Its own attention, masks and loop over experts run, operator by operator, on the elements that the captured program is run
on; nothing of capture or of our own nodes is used. Casts are the identity on both sides.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.random import fork_rng
from torch.utils import _pytree as pytree

from foldcc.capture.export import as_exported, capture
from foldcc.capture.functions import inlined
from foldcc.capture.observe import remove_hooks
from foldcc.capture.shrunk import shapes, shrunk
from foldcc.capture.transformers import as_written
from foldcc.capture.unchanged import unchanged
from foldcc.changed import changed
from foldcc.errors import FoldError
from foldcc.hooks import described, hooks_of
from foldcc.ir.program import Program
from foldcc.runtime.modes import traceable
from foldcc.taps import without_results
from foldcc.verification.drawn import Drawn
from foldcc.verification.field import Field
from foldcc.verification.formulas import Formulas, attend
from foldcc.verification.inputs import random_inputs
from foldcc.verification.mode import FieldMode
from foldcc.verification.proof import Difference, Proof
from foldcc.verification.reference import Reference, Undefined

ELEMENTS = 5_000_000  # of parameters and inputs, that are run
_MISSING = "the capture is not proved"
_HALF = "its parameters are float16, whose range models know as numbers, and elements of a field have none"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The module that a program was captured from, and how it was called.

    Attributes:
        arguments: by name; what takes the place of a tensor, or of a number that is an input of the program, is not looked at.
        training: of each module in the order of `modules()`, whether it was in train mode.
        grad: gradients were recorded.
        dtype: of the parameters.
        tracer: which it was captured with.
    """

    model: nn.Module
    arguments: Mapping[str, Any]
    training: Sequence[bool]
    grad: bool
    dtype: torch.dtype
    tracer: str

    def told(self) -> list[str]:
        """What the module computes depends on: its code, configuration, what its modules hold besides tensors, and the call."""
        classes = {type(m) for m in self.model.modules()}
        found = sorted(f"{c.__module__}.{c.__qualname__} {sha256(_source(c)).hexdigest()}" for c in classes)
        for path, module in self.model.named_modules():
            plain = {n: x for n, x in vars(module).items() if isinstance(x, (bool, int, float, str))}
            hooks = [hook if is_dataclass(hook) else described(hook) for _, _, hook in hooks_of(module)]
            found.append(f"{path} {type(module).__qualname__} {sorted(plain.items())} {hooks}")
        return [
            *found,
            f"{getattr(self.model, 'config', '')} {self.arguments} {self.training} {self.grad} {self.dtype} {self.tracer}",
        ]


def _source(cls: type) -> bytes:
    """The file that a class is in; of one that was typed at a prompt or read from a pipe, nothing that others could have."""
    path = Path(getattr(sys.modules.get(cls.__module__), "__file__", None) or "")
    return path.read_bytes() if path.is_file() else f"{cls} {os.getpid()} {id(cls)}".encode()


def against_the_module(
    proof: Proof, origin: Origin | None, captured: Program, buffers: Mapping[str, Tensor], fields: Sequence[Field]
) -> Proof:
    """A proof of a folded program, and whether the program that was captured is what its module computes."""
    if origin is None:
        return replace(proof, missing=(*proof.missing, f"{_MISSING}: it is not known which module it was captured from"))
    told = ""
    for field in fields:
        try:
            told, difference = _round(origin, captured, field, buffers)
        except Missing as error:
            return replace(proof, missing=(*proof.missing, str(error)))
        if difference is not None:
            return replace(proof, difference=difference)
    return replace(proof, proved=(*proof.proved, told))


def against_a_copy(proof: Proof, origin: Origin | None, captured: Program, fields: Sequence[Field]) -> Proof:
    """A proof of a program that is too large to run, and whether a small copy of its model is captured as it computes."""
    if origin is None:
        return against_the_module(proof, None, captured, {}, fields)
    try:
        copy, program = _copy(origin, captured)
    except (FoldError, RuntimeError, IndexError, TypeError, ValueError, KeyError, AttributeError) as error:  # of its own code
        return replace(proof, missing=(*proof.missing, str(Missing("there is no small copy of the model", error))))
    held = dict(copy.model.named_buffers(remove_duplicate=False))
    found = against_the_module(replace(proof, proved=()), copy, program, held, fields)
    layers = getattr(copy.model.config, "num_hidden_layers", None)
    where = (
        f"on a copy of the model with {layers} layers and small sizes" if layers else "on a copy of the model with small sizes"
    )
    return replace(found, proved=(*proof.proved, *(f"{line}, {where}" for line in found.proved)))


def _copy(origin: Origin, captured: Program) -> tuple[Origin, Program]:
    """A small copy of a model as the origin of a program of its own, captured as the given one was."""
    if len(set(origin.training)) != 1:
        raise FoldError("Some of its modules are in train mode and others are not.")
    model, sizes = shrunk(origin.model)
    model.to(origin.dtype).train(origin.training[0])
    inputs = [
        (s.names[0], n.meta["val"]) for s, n in zip(captured.slots, captured.placeholders, strict=True) if s.kind == "input"
    ]
    smaller = shapes([tuple(x.shape) for _, x in inputs], sizes)
    given = {path: torch.zeros(shape, dtype=x.dtype) for (path, x), shape in zip(inputs, smaller, strict=True)}
    kwargs = pytree.tree_map_with_path(
        lambda path, x: given.get(pytree.keystr(path), x), dict(origin.arguments), is_leaf=lambda x: x is None
    )
    with traceable(), torch.set_grad_enabled(origin.grad), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        program = capture(model, (), kwargs, captured.mesh, tracer=origin.tracer, device=torch.device("cpu"))
    if (elements := sum(n.meta["val"].numel() for n in program.placeholders)) > ELEMENTS:
        raise FoldError(f"Of its configuration foldcc knows too few sizes: the copy has {elements} elements.")
    trained = {name for s in captured.slots if s.grad for name in s.names}
    return replace(origin, model=model, training=[m.training for m in model.modules()]), program.with_gradients(trained)


class Missing(FoldError):
    """A captured program cannot be held against its module."""

    def __init__(self, why: str, error: Exception | None = None):
        told = why if error is None else f"{why}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        super().__init__(f"{_MISSING}: {told}")


def _round(origin: Origin, captured: Program, field: Field, buffers: Mapping[str, Tensor]) -> tuple[str, Difference | None]:
    """What was compared, and where the two differ."""
    if origin.dtype == torch.float16:
        raise Missing(_HALF)
    captured = without_results(captured)
    field = replace(field, decisions={}, known={})
    generator = torch.Generator().manual_seed(field.seed)
    inputs = random_inputs(captured, field, buffers, generator, full_rows=True)
    inputs |= {s.name: torch.zeros_like(inputs[s.name]) for s in captured.slots if s.kind == "tap"}
    try:
        with Formulas(origin.dtype):
            reference = Reference(captured, field, inputs, generator)
    except Undefined as error:
        raise Missing("the captured program has no value on what was drawn", error) from None
    trained = [s.name for s in captured.slots if s.grad]
    wanted = {given: reference.gradients(trained, given) for given in reference.objectives()} if trained else {}
    module = Module(origin, captured, field, reference)
    module.run(list(wanted))
    return _told(reference, trained), module.outputs_compared() or module.gradients_compared(wanted)


def _told(reference: Reference, trained: Sequence[str] = ()) -> str:
    gradients = f" and the gradients of {len(trained)} parameters and inputs" if trained else ""
    what = f"{len(reference.outputs)} outputs{gradients}"
    return f"{what} of the captured program are those of the module itself, with its own attention, masks and experts"


class Module:
    """A module, run over a field on what a captured program was run on.

    Attributes:
        returned: the leaves of what it returns.
        updated: the buffers that the captured program updates, as the module leaves them.
        changed: a buffer that the module changes and the captured program does not, if there is one.
        gradients: of what is trained, for each choice of the outputs that are given a gradient.
    """

    def __init__(self, origin: Origin, captured: Program, field: Field, reference: Reference):
        self.origin, self.captured, self.field, self.reference = origin, captured, field, reference
        self.trained = [slot.name for slot in captured.slots if slot.grad]
        self.values = {n: x.clone().requires_grad_(n in self.trained) for n, x in reference.inputs.items()}
        self.returned: list[Any] = []
        self.updated: list[Tensor] = []
        self.changed: str | None = None
        self.spec: pytree.TreeSpec | None = None
        self.gradients: list[dict[str, Tensor]] = []
        self.drawn = Drawn()

    def run(self, objectives: Sequence[tuple[bool, ...]], look: Callable[[str, nn.Module], Any] | None = None) -> None:
        """Forward, and if that has the outputs that the captured program has, backward for each choice of outputs.

        Args:
            look: sets hooks on each module inside, for this run.
        """

        def both(model: nn.Module) -> None:
            try:
                with torch.set_grad_enabled(self.origin.grad):
                    self.returned, self.spec = pytree.tree_flatten(model(*args, **kwargs))
                self._check_drawn()
            except (FoldError, RuntimeError, IndexError, TypeError, ValueError) as error:  # of the model's own code
                raise Missing("the module does not run over a field", error) from None
            left = dict(model.named_buffers(remove_duplicate=False))
            self.updated = [left[slot.names[0]].detach().clone() for slot in updated]
            self.changed = next((n for n, x in kept.items() if _content(left[n]) != _content(x)), None)
            for slot in updated:  # a checkpoint runs forward again in the backward pass, of the state that there was
                held[slot.names[0]].data.copy_(self.values[slot.name])
            if self._differentiable():
                try:
                    self.gradients = [self._gradients(given) for given in objectives]
                except (FoldError, RuntimeError) as error:
                    raise Missing("its outputs are right, but the module's gradients do not run over a field", error) from None

        model, slots = self.origin.model, self.captured.slots
        held = {name: self.values[s.name] for s in slots if s.kind in ("parameter", "buffer") for name in s.names}
        complex_ones = {n for n, x in model.named_buffers(remove_duplicate=False) if x.is_complex()}
        held = {n: torch.view_as_complex(x) if n in complex_ones else x for n, x in held.items()}
        held = {**self._other_buffers(held), **held}
        updated = [self.captured.slot(name) for name in self.captured.updates.values()]
        kept = {s.names[0]: self.reference.inputs[s.name] for s in slots if s.kind == "buffer" and s not in updated}
        for slot in updated:
            held |= dict.fromkeys(slot.names, self.values[slot.name].clone())  # for it may be run again
        values = {s.names[0]: self.values[s.name] for s in slots if s.kind == "input"}
        args, kwargs = as_exported(model, (), self.origin.arguments)
        args, kwargs = pytree.tree_map_with_path(
            lambda path, x: values.get(pytree.keystr(path[1:]), x), (args, dict(kwargs)), is_leaf=lambda x: x is None
        )
        with self._running():  # a checkpoint reads parameters in the backward pass as well
            if look is not None:
                for path, inner in model.named_modules():
                    look(path, inner)
            functional_call(_Around(model), {f"model.{n}": x for n, x in held.items()}, (both,), tie_weights=False)

    def _check_drawn(self) -> None:
        """What nothing reads is not captured, and the numbers that are drawn behind it have other keys."""
        read = sum(s.kind == "key" for s in self.captured.slots)
        if self.drawn.count > read:
            raise Missing(f"the module draws random numbers {self.drawn.count} times, of which {read} are read")

    def _gradients(self, given: Sequence[bool]) -> dict[str, Tensor]:
        each = zip(self.outputs() or (), self.reference.tangents, given, strict=True)
        pairs = [(x, t) for x, t, there in each if there and t is not None]
        inputs = [self.values[n] for n in self.trained]
        found = torch.autograd.grad([x for x, _ in pairs], inputs, [t for _, t in pairs], allow_unused=True, retain_graph=True)
        return {n: g for n, g in zip(self.trained, found, strict=True) if g is not None}

    def _other_buffers(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Buffers that the captured program has none of."""
        buffers = self.origin.model.named_buffers(remove_duplicate=False)
        return {n: self.field.numbers(x) if x.is_floating_point() else x for n, x in buffers if n not in held and not x.is_meta}

    @contextmanager
    def _running(self) -> Iterator[None]:
        before = torch.get_default_dtype()
        model = self.origin.model
        with ExitStack() as stack:
            stack.enter_context(unchanged(model))
            remove_hooks(model)
            for module, training in zip(model.modules(), self.origin.training, strict=True):
                module.training = training
            stack.enter_context(as_written(model))
            stack.enter_context(inlined())
            plain = stack.enter_context(Formulas(self.origin.dtype))
            # A checkpoint calls functions in the backward pass, without the modes of functions.
            named = {"scaled_dot_product_attention": attend, "rms_norm": plain.rms_norm}
            stack.enter_context(changed(vars(torch.nn.functional), named))
            stack.enter_context(_Foreign(self.field))
            stack.enter_context(fork_rng(devices=[]))
            torch.manual_seed(self.field.seed)
            self.drawn = stack.enter_context(Drawn())
            torch.set_default_dtype(torch.float64)
            stack.callback(torch.set_default_dtype, before)
            yield

    def outputs(self) -> list[Tensor] | None:
        """What the module returns where the captured program has outputs; None if it returns something else."""
        literals = self.captured.literals
        if self.spec != self.captured.out_spec:
            return None
        if any(type(self.returned[i]) is not type(x) or self.returned[i] != x for i, x in literals.items()):
            return None
        found = [*(x for i, x in enumerate(self.returned) if i not in literals), *self.updated]
        alike = all(isinstance(x, Tensor) and x.shape == y.shape for x, y in zip(found, self.reference.outputs, strict=True))
        return found if alike else None

    def _differentiable(self) -> bool:
        found = self.outputs()
        return found is not None and [x.requires_grad for x in found] == [t is not None for t in self.reference.tangents]

    def outputs_compared(self) -> Difference | None:
        outputs = self.outputs()
        if outputs is None:
            return Difference(what="What is returned, or its shape,", rank=0, capture=True)
        if any(bool(x.detach().isnan().any()) for x in outputs):
            raise Missing("the module divides by zero on what was drawn")
        if self.changed is not None:
            return Difference(what=f"Buffer {self.changed}", rank=0, capture=True)
        for i, (x, y) in enumerate(zip(outputs, self.reference.outputs, strict=True)):
            if not torch.equal(x.detach(), y.detach()):
                return Difference(what=self.captured.told_output(i), rank=0, capture=True, node=self.first_unlike())
            if not self._differentiable():
                return Difference(what=f"Whether output {i} has a gradient", rank=0, capture=True)
        return None

    def gradients_compared(self, wanted: Mapping[tuple[bool, ...], Mapping[str, Tensor]]) -> Difference | None:
        for captured, found in zip(wanted.values(), self.gradients, strict=True):
            for name in self.trained:
                x, y = (g.get(name, torch.zeros_like(self.values[name]).detach()) for g in (found, captured))
                if bool((x.isnan() | y.isnan()).any()):
                    raise Missing("a derivative divides by zero on what was drawn")
                if not torch.equal(x, y):
                    called = self.captured.slot(name).names[0]
                    return Difference(what=f"The gradient of {called}", parameter=called, rank=0, capture=True)
        return None

    def first_unlike(self) -> str:
        """The first module that returns, and what it returns is no value of the captured program."""
        known = {_content(x) for x in self.reference.values.values() if isinstance(x, Tensor)}
        unlike: list[str] = []

        def look(path: str, module: nn.Module) -> None:
            def hook(module: nn.Module, args: Any, returned: Any) -> None:
                first = next((x for x in pytree.tree_leaves(returned) if isinstance(x, Tensor)), None)
                if not unlike and first is not None and _content(first) not in known:
                    unlike.append(f"{path} ({type(module).__name__})")

            if path:
                module.register_forward_hook(hook)

        self.run([], look)
        return next(iter(unlike), "")


def _content(x: Tensor) -> bytes:
    """A value, whatever its shape."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.detach().double().contiguous().numpy().tobytes()


class _Around(nn.Module):
    """Calls a function on a module; what a call of this module is given in place of parameters is there as long."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[nn.Module], None]) -> None:
        run(self.model)


class _Foreign(FieldMode):
    """Tensors that a module holds besides its parameters and buffers are no elements yet; elements are all float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self._element, (tuple(args), dict(kwargs or {})))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _element(self, x: Tensor) -> Tensor:
        return self.field.numbers(x) if x.is_floating_point() and x.dtype != torch.float64 else x
