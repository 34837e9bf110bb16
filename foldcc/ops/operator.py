"""One record per operator: its meaning, types, transpose, simulation and cost, registered with `torch.library`.

    retype = operator("retype(Tensor x, str axes, str src, str dst) -> Tensor", meaning=..., types=..., eager=..., ...)

The record is the only place where something is known about an operator. `torch.export`, AOTAutograd and Inductor see an
ordinary operator of the namespace `foldcc`; the simulator and the reports read the record back with `record(target)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foldcc.errors import FoldError

LIBRARY = torch.library.Library("foldcc", "DEF")
_RECORDS: dict[Any, Operator] = {}


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What is known about one operator of the namespace `foldcc`.

    Attributes:
        overload: the registered operator, `torch.ops.foldcc.<name>.default`.
        meaning: one sentence.
        eager: what it does on one rank, in plain PyTorch.
        issue: starts that, and gives what waits for it and leaves the result; None when there is nothing to wait for.
        types: the change of type on the axes named by the argument `axes`, for example `"V -> R"`, or `""` when the
            operator acts on each rank alone.
        transpose: `(grad, *arguments) -> gradient of each tensor argument`; None for a function without a gradient.
        simulate: `(arguments of every rank of a group) -> results of every rank`; None when ranks do not communicate.
        sent: `(elements of the first argument on a rank, elements of the result, ranks of a group) -> elements that one
            rank sends`; None when nothing is sent.
        moves: each element of the result is one of a rank's first argument.
        again: a backward pass asks for the result once more, instead of keeping it.
        overlaps: ranks have elements in common, so that the results are no parts of a dimension.
    """

    overload: Any
    meaning: str
    eager: Callable[..., Any]
    issue: Callable[..., Callable[[], Any]] | None
    types: str
    transpose: Callable[..., Any] | None
    simulate: Callable[[list[tuple[Any, ...]]], list[Any]] | None
    sent: Callable[[Any, Any, int], Any] | None
    moves: bool
    again: bool = False
    overlaps: bool = False

    @property
    def name(self) -> str:
        return self.overload._schema.name.split("::")[1]

    @property
    def adds(self) -> bool:
        """Whether the result is a sum of what the ranks of an axis have."""
        return self.types.startswith("P ->")

    @property
    def communicates(self) -> bool:
        return self.simulate is not None and self.sent is not None

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def arguments(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name, defaults filled in."""
        return by_name(self.overload, args, kwargs)


def operator(
    schema: str,
    *,
    meaning: str,
    types: str = "",
    eager: Callable[..., Any] | None = None,
    issue: Callable[..., Callable[[], Any]] | None = None,
    shape: Callable[..., Any],
    transpose: Callable[..., Any] | None = None,
    simulate: Callable[[list[tuple[Any, ...]]], list[Any]] | None = None,
    sent: Callable[[Any, Any, int], Any] | None = None,
    moves: bool = False,
    again: bool = False,
    overlaps: bool = False,
) -> Operator:
    """Registers `foldcc::<schema>` and returns its record. `eager` runs on one rank, `shape` on fake tensors.

    What is issued is waited for at once, where `eager` does not say something else.
    """
    name = schema.split("(")[0]
    if eager is None:
        assert issue is not None
        start = issue

        def eager(*args: Any) -> Any:
            return start(*args)()

    LIBRARY.define(schema)
    LIBRARY.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"foldcc::{name}", shape, lib=LIBRARY)
    if transpose is None:
        without_gradient(name)
    else:

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
            ctx.save_for_backward(*tensors)
            ctx.rest = [None if isinstance(x, torch.Tensor) else x for x in inputs]
            ctx.holes = [isinstance(x, torch.Tensor) for x in inputs]

        def backward(ctx: Any, *grads: Any) -> Any:
            tensors = iter(ctx.saved_tensors)
            arguments = [next(tensors) if hole else x for hole, x in zip(ctx.holes, ctx.rest, strict=True)]
            found = transpose(*grads, *arguments)
            found = iter(found if isinstance(found, tuple) else (found,))
            return tuple(next(found, None) if hole else None for hole in ctx.holes)

        torch.library.register_autograd(f"foldcc::{name}", backward, setup_context=setup, lib=LIBRARY)
    found = Operator(
        overload=getattr(torch.ops.foldcc, name).default,
        meaning=meaning,
        eager=eager,
        issue=issue,
        types=types,
        transpose=transpose,
        simulate=simulate,
        sent=sent,
        moves=moves,
        again=again,
        overlaps=overlaps,
    )
    _RECORDS[found.overload] = found
    return found


def by_name(overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in."""
    given = dict(zip((a.name for a in overload._schema.arguments), args, strict=False)) | dict(kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in overload._schema.arguments}


def positional(overload: Any, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Arguments by name as the positional ones of a call, as few as need be said."""
    schema = [a for a in overload._schema.arguments if not a.kwarg_only]
    given = [arguments.get(a.name, a.default_value) for a in schema]
    while given and given[-1] == schema[len(given) - 1].default_value and schema[len(given) - 1].has_default_value():
        given.pop()
    return tuple(given)


def without_gradient(name: str) -> None:
    """Makes a gradient that is asked of an operator an error, where PyTorch would warn and leave it out."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise FoldError(f"A gradient was asked of foldcc.{name}, which has none.")

    torch.library.register_autograd(f"foldcc::{name}", refuse, lib=LIBRARY)


def record(target: Any) -> Operator | None:
    """The record of an fx node's target, or None for an operator that is not ours."""
    return _RECORDS.get(target)


def records() -> tuple[Operator, ...]:
    """Every operator of the family, in the order of definition."""
    return tuple(_RECORDS.values())
