"""What a call is: its arguments by name, flattened, and what of them a program is specialised to."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from foldcc.capture.numbers import as_tensor
from foldcc.errors import FoldError, divides
from foldcc.hooks import watched
from foldcc.mesh import FoldedMesh
from foldcc.runtime.modes import Modes
from foldcc.tree import elsewhere

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Told:
    """An input as a person reads it, and what kind of thing it is."""

    kind: str
    text: str

    @staticmethod
    def of(x: Any) -> Told:
        if isinstance(x, Tensor):
            return Told("tensor", f": {str(x.dtype).removeprefix('torch.')}{list(x.shape)}")
        return Told("number" if isinstance(x, (int, float)) and not isinstance(x, bool) else "flag", f"={x!r}")

    @staticmethod
    def any(x: Any) -> Told:
        return Told("number", f": any {type(x).__name__}")

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Call:
    """The leaves of a call, their paths, such as `['input_ids']`, and their structure."""

    leaves: list[Any]
    names: list[str]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        signature = inspect.signature(model.forward)
        bound = signature.bind(*args, **kwargs).arguments
        named: dict[str, Any] = {}
        for name, value in bound.items():
            kind = signature.parameters[name].kind
            if kind == inspect.Parameter.VAR_POSITIONAL:
                raise FoldError(f"The forward of {type(model).__name__} takes *{name}; pass arguments by name.")
            named.update(value if kind == inspect.Parameter.VAR_KEYWORD else {name: value})
        paths, spec = pytree.tree_flatten_with_path(named)
        return cls([x for _, x in paths], [pytree.keystr(p) for p, _ in paths], spec)

    def items(self) -> Iterator[tuple[str, Any]]:
        return zip(self.names, self.leaves, strict=True)

    def tensors(self) -> dict[str, Tensor]:
        return {n: x for n, x in self.items() if isinstance(x, Tensor)}

    def inputs(self, free: Collection[str], device: torch.device) -> Iterator[Tensor]:
        """What a program takes: tensors, and the numbers that are inputs of it."""
        for name, x in self.items():
            if name in free:
                yield as_tensor(x, device)
            elif isinstance(x, Tensor):
                yield x

    def told(self, free: Collection[str] = ()) -> dict[str, Told]:
        return {n: Told.any(x) if n in free else Told.of(x) for n, x in self.items()}

    def __str__(self) -> str:
        return ", ".join(f"{name}{told}" for name, told in self.told().items())

    @property
    def structure(self) -> tuple[str, str]:
        """What is a tensor and what is not, and the names, as a person reads them."""
        return f"{self.spec} {list(self.tensors())}", ", ".join(self.names)

    def check_structure(self, compiled: tuple[str, str] | None) -> None:
        """With example_inputs, the structure of a call is theirs."""
        if compiled is not None and self.structure != compiled:
            raise FoldError(
                f"The model is called with {self.structure[1]}, and was compiled for another structure of inputs.",
                compiled=compiled[1],
                valid="the structure of example_inputs; without example_inputs, any",
            )

    def key(self, tree: nn.Module, modes: Modes, free: Collection[str] = ()) -> Key:
        """What a program is specialised to. Python numbers by type and digits, for True == 1 and 0.0 == -0.0.

        Args:
            tree: the folded module, whose modes, dtypes and `requires_grad` count.
            free: numbers that are inputs of the program, which is specialised to their types alone.
        """
        told = tuple(
            (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else (type(x), None if n in free else repr(x))
            for n, x in self.items()
        )
        training = tuple(m.training for m in tree.modules())
        others = {n: state.dtype for n, state in elsewhere(tree).names.items()}
        held = (*tree.named_parameters(remove_duplicate=False), *tree.named_buffers(remove_duplicate=False))
        dtypes = frozenset((others | {n: x.dtype for n, x in held}).items())
        return (str(self.spec), told, training, dtypes, modes, self.given_gradients(tree), watched(tree))

    def given_gradients(self, tree: nn.Module) -> frozenset[str]:
        """The parameters and inputs that require a gradient, by name; none where gradients are switched off."""
        if not torch.is_grad_enabled():
            return frozenset()
        held = (*tree.named_parameters(remove_duplicate=False), *self.tensors().items())
        trained = {n for n, state in elsewhere(tree).names.items() if state.trained}
        return frozenset(name for name, x in held if x.requires_grad) | trained

    def with_numbers(self, numbers: Mapping[str, Any]) -> Call:
        return replace(self, leaves=[numbers.get(n, x) for n, x in self.items()])

    def without_tensors(self) -> dict[str, Any]:
        """The arguments by name; a tensor is None, so that none is kept."""
        left = [None if isinstance(x, Tensor) else x for x in self.leaves]
        arguments: dict[str, Any] = pytree.tree_unflatten(left, self.spec)
        return arguments

    def apart(self, count: int, batch_dims: Mapping[str, int | None], mesh: FoldedMesh) -> list[Call]:
        """The call in micro-batches: of each, the samples that stand at the same place among those of a data-parallel rank."""
        if count == 1:
            return [self]
        ranks, axes = mesh.passed, "*".join(mesh.samples)
        for name, x in self.tensors().items():
            if (dim := batch_dims[name]) is not None:
                each = divides("samples", x.shape[dim], axes, ranks, input=name, valid=f"multiples of {ranks * count}")
                divides("samples of a rank", each, "micro_batches", count, input=name)

        def part(x: Any, dim: int | None, i: int) -> Any:
            return x if dim is None else x.unflatten(dim, (ranks, count, -1)).select(dim + 1, i).flatten(dim, dim + 1)

        return [replace(self, leaves=[part(x, batch_dims.get(n), i) for n, x in self.items()]) for i in range(count)]

    def whole(self, mesh: FoldedMesh, batch_dims: Mapping[str, int | None], device: torch.device) -> dict[str, Any]:
        """The arguments by name, with stand-ins of global shapes for tensors."""
        found = [x if not isinstance(x, Tensor) else _whole(n, x, mesh, batch_dims[n], device) for n, x in self.items()]
        arguments: dict[str, Any] = pytree.tree_unflatten(found, self.spec)
        return arguments


def _whole(name: str, x: Tensor, mesh: FoldedMesh, samples: int | None, device: torch.device) -> Tensor:
    ranks, shape = mesh.data_parallel, list(x.shape)
    if 0 in shape:
        raise FoldError(f"Input {name} is empty: its shape is {shape}.")
    if samples is not None and mesh.is_virtual:
        axes = "*".join(mesh.samples)
        divides("samples", shape[samples], axes, ranks, input=name, mesh=str(mesh), valid=f"multiples of {ranks}")
    elif samples is not None:
        shape[samples] *= ranks
    return torch.zeros(shape, dtype=x.dtype, device=device)


def without_sizes(key: Key) -> Key:
    """The key of a call, as if tensors of other sizes were the same."""
    spec, told, *rest = key
    return (spec, tuple((len(x[0]), x[1]) if isinstance(x[0], tuple) else x for x in told), *rest)


def without_digits(key: Key, names: list[str], free: Collection[str]) -> Key:
    """The key of a call with these names, as if some of its numbers were inputs."""
    spec, told, *rest = key
    if len(told) != len(names):
        return key
    return (spec, tuple((x[0], None) if n in free else x for n, x in zip(names, told, strict=True)), *rest)
