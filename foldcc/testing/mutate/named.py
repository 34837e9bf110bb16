"""Mistakes in the gradients of parameters that are given by name.

A block that is called for several layers has one program, so what is planted for one layer's parameter is in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

import torch

from foldcc.errors import FoldError, listed
from foldcc.module import FoldedModule
from foldcc.testing.mutate.gradients import Gradient, followed, gradients, missing, not_summed, summed_again
from foldcc.testing.mutate.mutant import Mutant


def drop_reduction(model: FoldedModule, *, parameter: str, axis: str) -> FoldedModule:
    """The model in which gradients are not summed over an axis over which they should be.

    Args:
        parameter: a pattern for the names of parameters, such as "*.gate.weight".

    Raises:
        FoldError: no parameter matches, or none that does has a gradient that is summed over the axis.
    """
    found = _matching(model, parameter)
    if not any(axis in g.axes for g in found):
        raise FoldError(
            f"No gradient of {parameter!r} is summed over {axis}.",
            mesh=str(model.mesh),
            valid="\n".join(f"{g.parameters[0]}: {listed(g.axes)}" for g in found),
        )
    return _planted(model, [g for g in found if axis in g.axes], lambda m, g: not_summed(m, g, axis))


def reduce_again(model: FoldedModule, *, parameter: str, axis: str) -> FoldedModule:
    """The model in which gradients that are complete are summed over an axis, of either view, once more.

    Raises:
        FoldError: no parameter matches, or the mesh has no such axis.
    """
    model.mesh.size(axis)
    return _planted(model, _matching(model, parameter), lambda m, g: summed_again(m, g, axis))


def scale_gradient(model: FoldedModule, *, parameter: str, factor: float) -> FoldedModule:
    """The model in which gradients are `factor` times what they should be.

    Raises:
        FoldError: no parameter matches.
    """
    mul = torch.ops.aten.mul.Tensor
    told = f"is multiplied by {factor:g}"
    return _planted(model, _matching(model, parameter), lambda m, g: followed(m, g, "scale", told, mul, factor))


def drop_gradient(model: FoldedModule, *, parameter: str) -> FoldedModule:
    """The model in which parameters are left without a gradient.

    Raises:
        FoldError: no parameter matches.
    """
    return _planted(model, _matching(model, parameter), missing)


def _matching(model: FoldedModule, pattern: str) -> list[Gradient]:
    known = list(gradients(model.program))
    found = [g for g in known if any(fnmatch(name, pattern) for name in g.parameters)]
    if not found:
        names = [name for g in known for name in g.parameters]
        raise FoldError(f"No parameter with a gradient matches {pattern!r}.", valid="\n".join(names))
    return found


def _planted(model: FoldedModule, found: list[Gradient], make: Callable[[FoldedModule, Gradient], Mutant]) -> FoldedModule:
    for g in found:
        model = make(model, g).apply()
    return model
