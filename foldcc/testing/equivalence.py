"""The law that folding keeps: the same loss, the same outputs and the same gradients as the model in one process."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

import torch
from torch import Tensor, nn
from torch.random import fork_rng
from torch.utils import _pytree as pytree

from foldcc.api import parallelize
from foldcc.errors import FoldError
from foldcc.mesh import FoldedMesh
from foldcc.module import FoldedModule
from foldcc.testing.draws import drawing_alike
from foldcc.testing.float64 import in_float64

# A gradient that is zero by algebra, such as that of a bias on all keys, is a sum of roundings on both sides. It counts as
# at least this part of the norm of all gradients, so that errors of 1e-14 of that norm are none.
_SMALL = 1e-4


@dataclass(frozen=True)
class Equivalence:
    """How far a folded model is from the original: relative errors, by norm.

    Attributes:
        outputs: of each floating-point output, by its path, such as `.loss`, and of each buffer that the forward updates.
        gradients: of each parameter's gradient, by the parameter's name; for a gradient below 1e-4 of the norm of all,
            relative to that.
    """

    outputs: dict[str, float]
    gradients: dict[str, float]

    @property
    def largest(self) -> float:
        return max([*self.outputs.values(), *self.gradients.values()])

    def __str__(self) -> str:
        worst = sorted(self.gradients.items(), key=lambda item: -item[1])[:5]
        lines = [f"{error:.1e}  output {path}" for path, error in self.outputs.items()]
        return "\n".join([*lines, *(f"{error:.1e}  gradient of {name}" for name, error in worst)])


def check_equivalence(
    model: nn.Module,
    mesh: FoldedMesh | str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = 1e-10,
    **options: Any,
) -> Equivalence:
    """Compares a model, folded on a virtual mesh, with itself in this process, both in float64.

    Both draw the same random numbers, where the model drops out or is noisy. The objective is the output's `loss` if it has
    one, else all floating-point outputs, each weighted by random numbers. A Transformers model loops over its experts in the
    comparison (`experts_implementation="eager"`), so that the two sides share no code of foldcc's. The model itself is left
    as it is.

    Args:
        mesh: a virtual mesh or its text, such as "dp=2,tp=2|ep=4".
        args, kwargs: the arguments of a call, by position and by name; tensors hold the global batch.
        tolerance: the largest relative error that passes.
        options: for `parallelize`.

    Raises:
        AssertionError: an output, an updated buffer or a gradient differs by more than `tolerance`, or is missing on one side.
        FoldError: `parallelize` refuses the model, or `args` is not a sequence.
    """
    if not isinstance(args, (tuple, list)):
        raise FoldError(f"args is a {type(args).__name__}, and holds the arguments by position.", valid="(x,), or kwargs={...}")
    mesh = FoldedMesh.parse(mesh) if isinstance(mesh, str) else mesh
    reference = copy.deepcopy(model).double()
    given, named = pytree.tree_map_only(Tensor, _in_double, (tuple(args), dict(kwargs or {})))
    with in_float64():
        folded = parallelize(reference, mesh, example_inputs=_together(reference, given, named), **options)
        result = compared(folded, reference, given, named)
    assert result.largest <= tolerance, f"folded on {mesh}, the model differs by more than {tolerance:g}:\n{result}"
    return result


def compared(folded: FoldedModule, reference: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Equivalence:
    """How far a folded model is from the original, which it was made of in float64 and whose gradients this fills.

    Raises:
        AssertionError: an output or a gradient is there on one side only.
    """
    for config in {id(c): c for m in reference.modules() if (c := getattr(m, "config", None)) is not None}.values():
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    with fork_rng(devices=[]):
        torch.manual_seed(0)
        with drawing_alike():
            wanted = _outputs(reference(*args, **kwargs))
            _objective(wanted).backward()
        torch.manual_seed(0)
        found = _outputs(folded(*args, **kwargs))
        assert wanted.keys() == found.keys(), f"outputs {sorted(found)} instead of {sorted(wanted)}"
        _objective(found).backward()
    outputs = {path: relative_error(found[path], wanted[path]) for path in wanted}
    for name in (folded.program.slot(slot).names[0] for slot in folded.program.updates.values()):
        mine, theirs = (m.get_buffer(name).double() for m in (folded, reference))
        outputs[f"buffer {name}"] = relative_error(mine, theirs)
    parameters = dict(folded.named_parameters())
    least = _SMALL * hypot(*(float(p.grad.norm()) for p in reference.parameters() if p.grad is not None))
    gradients = {}
    for name, parameter in reference.named_parameters():
        gradient = parameters[name].grad
        if (gradient is None) != (parameter.grad is None):
            raise AssertionError(f"{name} has a gradient on one side only, on {folded.mesh}")
        if gradient is not None and parameter.grad is not None:
            gradients[name] = relative_error(gradient, parameter.grad, least)
    return Equivalence(outputs, gradients)


def relative_error(found: Tensor, wanted: Tensor, least: float = 0.0) -> float:
    """`|found - wanted|` relative to `|wanted|`, or to `least` where that is larger, by the Euclidean norm.

    Where both are zero, `|found|`; infinite for a NaN.
    """
    error, size = (float(x.detach().double().norm()) for x in (found - wanted, wanted))
    value = error / max(size, least) if size or least else error
    return value if value == value else float("inf")


def _together(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | dict[str, Any]:
    """The arguments of a call in one, as `parallelize` takes them."""
    if args and kwargs:
        return {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
    return args or kwargs


def _in_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _outputs(result: Any) -> dict[str, Tensor]:
    leaves = pytree.tree_leaves_with_path(result)
    return {pytree.keystr(path): x for path, x in leaves if isinstance(x, Tensor) and x.is_floating_point()}


def _objective(outputs: dict[str, Tensor]) -> Tensor:
    losses = [x for path, x in outputs.items() if path.endswith(("loss", "['loss']")) and x.dim() == 0]
    if losses:
        return losses[0]
    random = torch.Generator().manual_seed(0)
    terms = [(x * torch.randn(x.shape, generator=random, dtype=x.dtype)).sum() for x in outputs.values()]
    return torch.stack(terms).sum()
