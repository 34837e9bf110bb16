"""Is the captured program what the module computes? The module itself is run over the field, as its authors wrote it.

Its own attention, masks and loop over experts run, operator by operator, on the elements that the captured program is run
on; nothing of capture or of our own nodes is used. Casts are the identity on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from foldcc.capture.export import as_exported
from foldcc.capture.transformers import as_written
from foldcc.capture.unchanged import unchanged
from foldcc.errors import FoldError
from foldcc.program import Program
from foldcc.verification.field import Field
from foldcc.verification.inputs import random_inputs
from foldcc.verification.mode import FieldMode, NoMeaning
from foldcc.verification.proof import Difference, Proof
from foldcc.verification.reference import Reference, Undefined

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
    """

    model: nn.Module
    arguments: Mapping[str, Any]
    training: Sequence[bool]
    grad: bool
    dtype: torch.dtype


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


class Missing(FoldError):
    """A captured program cannot be held against its module."""

    def __init__(self, why: str, error: Exception | None = None):
        told = why if error is None else f"{why}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        super().__init__(f"{_MISSING}: {told}")


def _round(
    origin: Origin, captured: Program, field: Field, buffers: Mapping[str, Tensor]
) -> tuple[str, Difference | None]:
    """What was compared, and where the two differ."""
    if origin.dtype == torch.float16:
        raise Missing(_HALF)
    field = replace(field, decisions={}, known={})
    generator = torch.Generator().manual_seed(field.seed)
    inputs = random_inputs(captured, field, buffers, generator, full_rows=True)
    try:
        with _Plain(origin.dtype):
            reference = Reference(captured, field, inputs, generator)
    except Undefined as error:
        raise Missing("it has no value on such masks as eager attention has", error) from None
    try:
        module = Module(origin, captured, field, inputs)
    except (FoldError, RuntimeError, IndexError, TypeError, ValueError) as error:  # of the model's own code
        raise Missing("the module does not run over a field", error) from None
    difference = module.outputs_compared(reference)
    trained = [s.name for s in captured.slots if s.grad]
    if difference is not None or not trained:
        return _told(reference), difference
    for given in reference.objectives():
        try:
            difference = module.gradients_compared(reference, trained, given)
        except (FoldError, RuntimeError) as error:
            raise Missing("the module's outputs are equal, its gradients do not run over a field", error) from None
        if difference is not None:
            break
    return _told(reference, trained), difference


def _told(reference: Reference, trained: Sequence[str] = ()) -> str:
    gradients = f" and the gradients of {len(trained)} parameters and inputs" if trained else ""
    what = f"{len(reference.outputs)} outputs{gradients}"
    return f"{what} of the captured program are those of the module itself, with its own attention, masks and experts"


class Module:
    """A module, run forward over a field.

    Attributes:
        returned: the leaves of what it returns.
    """

    def __init__(self, origin: Origin, captured: Program, field: Field, inputs: Mapping[str, Tensor]):
        self.origin, self.captured, self.field = origin, captured, field
        trained = {slot.name for slot in captured.slots if slot.grad}
        self.values = {slot.name: inputs[slot.name].clone().requires_grad_(slot.name in trained) for slot in captured.slots}
        self.returned, self.spec = self._run()

    def _run(self) -> tuple[list[Any], pytree.TreeSpec]:
        model, slots = self.origin.model, self.captured.slots
        held = {name: self.values[s.name] for s in slots if s.kind in ("parameter", "buffer") for name in s.names}
        held = {**self._other_buffers(held), **held}
        values = {s.names[0]: self.values[s.name] for s in slots if s.kind == "input"}
        args, kwargs = as_exported(model, (), self.origin.arguments)
        args, kwargs = pytree.tree_map_with_path(lambda path, x: values.get(pytree.keystr(path[1:]), x), (args, dict(kwargs)))
        with self._running(), torch.set_grad_enabled(self.origin.grad):
            returned = functional_call(model, held, args, kwargs, tie_weights=False)
        leaves, spec = pytree.tree_flatten(returned)
        return leaves, spec

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
            for module, training in zip(model.modules(), self.origin.training, strict=True):
                module.training = training
            stack.enter_context(as_written(model))
            stack.enter_context(_Plain(self.origin.dtype))
            stack.enter_context(_Foreign(self.field))
            torch.set_default_dtype(torch.float64)
            stack.callback(torch.set_default_dtype, before)
            yield

    def tensors(self) -> list[Tensor] | None:
        """What the module returns where the captured program has outputs; None if it returns something else."""
        literals = self.captured.literals
        if self.spec != self.captured.out_spec:
            return None
        if any(type(self.returned[i]) is not type(x) or self.returned[i] != x for i, x in literals.items()):
            return None
        found = [x for i, x in enumerate(self.returned) if i not in literals]
        return found if all(isinstance(x, Tensor) for x in found) else None

    def outputs_compared(self, reference: Reference) -> Difference | None:
        outputs = self.tensors()
        if outputs is None:
            return Difference(what="What is returned besides tensors", rank=0, capture=True)
        if any(bool(x.detach().isnan().any()) for x in outputs):
            raise Missing("the module divides by zero on what was drawn")
        for i, (x, y, tangent) in enumerate(zip(outputs, reference.outputs, reference.tangents, strict=True)):
            if not torch.equal(x.detach(), y.detach()):
                return Difference(what=f"Output {i}", rank=0, capture=True, node=self.first_unlike(reference))
            if x.requires_grad != (tangent is not None):
                return Difference(what=f"Whether output {i} has a gradient", rank=0, capture=True)
        return None

    def gradients_compared(self, reference: Reference, trained: Sequence[str], given: Sequence[bool]) -> Difference | None:
        wanted = reference.gradients(trained, given)
        outputs = self.tensors()
        assert outputs is not None
        pairs = [(x, t) for x, t in zip(outputs, reference.tangents, strict=True) if t is not None]
        pairs = [pair for pair, there in zip(pairs, given, strict=True) if there]
        with self._running():
            found = torch.autograd.grad(
                [x for x, _ in pairs],
                [self.values[n] for n in trained],
                [t for _, t in pairs],
                allow_unused=True,
                retain_graph=True,
            )
        for name, x in zip(trained, found, strict=True):
            y = wanted.get(name)
            x, y = (torch.zeros_like(self.values[name]) if g is None else g for g in (x, y))
            if not torch.equal(x, y):
                called = self.captured.slot(name).names[0]
                return Difference(what=f"The gradient of {called}", parameter=called, rank=0, capture=True)
        return None

    def first_unlike(self, reference: Reference) -> str:
        """The first module that returns, and what it returns is no value of the captured program."""
        known = {_content(x) for x in reference.values.values() if isinstance(x, Tensor)}
        unlike: list[str] = []

        def look(path: str, module: nn.Module) -> Any:
            def hook(module: nn.Module, args: Any, returned: Any) -> None:
                first = next((x for x in pytree.tree_leaves(returned) if isinstance(x, Tensor)), None)
                if not unlike and first is not None and _content(first) not in known:
                    unlike.append(f"{path} ({type(module).__name__})")

            return module.register_forward_hook(hook)

        handles = [look(path, m) for path, m in self.origin.model.named_modules() if path]
        try:
            self._run()
        finally:
            for handle in handles:
                handle.remove()
        return next(iter(unlike), "")


def _content(x: Tensor) -> bytes:
    """A value, whatever its shape."""
    return x.detach().double().contiguous().numpy().tobytes()


class _Foreign(FieldMode):
    """Tensors that a module holds besides its parameters and buffers are no elements yet; elements are all float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self._element, (tuple(args), dict(kwargs or {})))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _element(self, x: Tensor) -> Tensor:
        return self.field.numbers(x) if x.is_floating_point() and x.dtype != torch.float64 else x


_ATTENTION = (torch.nn.functional.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)


class _Plain(TorchFunctionMode):
    """Of an operator that has several implementations the formula, on both sides: one of attention's takes the scale apart.

    What depends on the type of an operand depends on the type of the parameters, for elements have no other.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _ATTENTION:
            return _attend(*args, **kwargs)
        if func is torch.rms_norm:
            return self._rms_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _rms_norm(self, input: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return torch.rms_norm(input, shape, weight, torch.finfo(self.dtype).eps if eps is None else eps)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p:
        raise NoMeaning(_ATTENTION[1], " with dropout")
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None:
        allowed = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if allowed else scores + attn_mask
    return torch.ops.aten._safe_softmax.default(scores, -1) @ v
