"""Hooks on the modules inside a folded model: what a program returns for them, and how they are called with it.

A program computes without calling modules. So it returns what watched modules were called with and what they returned, and
gradients through them, and hooks are called with that: forward hooks after the forward, in the order in which the modules
ran, and backward hooks after the backward. Hooks observe; one that would change a value is an error that names it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from foldcc.errors import FoldError

CALLED = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
OPTIONS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_OBSERVE = "a hook that reads what it is given and returns None; what changes values belongs into the module's forward"


@dataclass(frozen=True)
class Watch:
    """What hooks of a module are called with.

    Attributes:
        path: the module's first name.
        kwargs: arguments by name as well.
        gradients: those of its positional arguments and of what it returns.
    """

    path: str
    kwargs: bool
    gradients: bool

    def __str__(self) -> str:
        more = [name for name, asked in {"arguments by name": self.kwargs, "gradients": self.gradients}.items() if asked]
        return f"{self.path} ({', '.join(more)})" if more else self.path


@dataclass(frozen=True)
class Result:
    """A tensor among a module's arguments or results: the program's result at this position."""

    position: int


@dataclass
class Seen:
    """One call of a watched module in the captured forward. Tensors stand as `Result`.

    Attributes:
        entering, leaving: the program's taps, whose gradients are those of the positional arguments, and of the results;
            None for what has no gradient.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    entering: list[str | None] = field(default_factory=list)
    leaving: list[str | None] = field(default_factory=list)


# Each call of a watched module twice, when it begins and when it ends, with whether it ends.
Events = Sequence[tuple[Seen, bool]]


def hooks_of(module: nn.Module) -> Iterator[tuple[str, int, Any]]:
    """The dict, key and function of each hook."""
    for held in CALLED:
        for key, hook in vars(module)[held].items():
            yield held, key, hook


def has_gradient_hook(parameter: Tensor) -> bool:
    """Whether something is called with a parameter's gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def is_the_models(hook: Any, own: set[int]) -> bool:
    """Hooks that are a part of what the model computes: methods of its modules, and what its library or foldcc registers."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    if isinstance(hook, types.MethodType) and id(hook.__self__) in own:
        return True
    where = getattr(hook, "__module__", None) or type(hook).__module__
    return where.startswith(("transformers.", "torch.nn.utils.", "torch.export.", "foldcc.capture.capacity"))


def described(hook: Any) -> str:
    name = getattr(hook, "__qualname__", None) or type(hook).__qualname__
    where = getattr(hook, "__module__", None)
    return f"{where}.{name}" if where else name


def named(path: str, module: nn.Module) -> str:
    return f"{path} ({type(module).__name__})" if path else f"The model ({type(module).__name__})"


def refuse_unobserving(path: str, module: nn.Module, held: str, key: int, hook: Any) -> None:
    """Raises for a hook of a submodule that asks for what a program does not have."""
    why = None
    if key in module._forward_hooks_always_called and held == "_forward_hooks":
        why = "is to be called when the forward raises (always_call=True)"
    elif held == "_backward_hooks" and module._is_full_backward_hook is False:
        why = "is of the kind that PyTorch has deprecated (register_backward_hook)"
    if why is not None:
        raise FoldError(
            f"{named(path, module)} has a {CALLED[held]}, {described(hook)}, which {why}. The folded model would not call it.",
            valid="register_forward_hook, register_forward_pre_hook and register_full_backward_hook, without always_call",
        )


def watched(tree: nn.Module) -> tuple[Watch, ...]:
    """The modules inside a folded model that bear hooks."""
    found = []
    for path, module in tree.named_modules():
        if path and any(vars(module)[held] for held in CALLED):
            kwargs = bool(module._forward_hooks_with_kwargs or module._forward_pre_hooks_with_kwargs)
            found.append(Watch(path, kwargs, bool(module._backward_hooks or module._backward_pre_hooks)))
    return tuple(found)


def told(watches: Sequence[Watch], *, all: bool = False) -> str:
    """As a person reads it."""
    if not watches:
        return " on no module"
    shown = len(watches) if all else 4
    names = ", ".join(map(str, watches[:shown]))
    return f" on {names}{f' and {len(watches) - shown} more' if len(watches) > shown else ''}"


def call_forward(tree: nn.Module, events: Events, outputs: Sequence[Tensor]) -> None:
    """Calls the forward hooks, with what a program returned."""

    def value(x: Any) -> Any:
        return pytree.tree_map(lambda leaf: outputs[leaf.position] if isinstance(leaf, Result) else leaf, x)

    for seen, ends in events:
        module = tree.get_submodule(seen.path)
        args, kwargs, output = value(seen.args), value(seen.kwargs), value(seen.output)
        given: tuple[Any, ...]
        if ends:
            with_kwargs, given = module._forward_hooks_with_kwargs, (args, output)
            hooks: Mapping[int, Any] = module._forward_hooks
        else:
            with_kwargs, given = module._forward_pre_hooks_with_kwargs, (args,)
            hooks = module._forward_pre_hooks
        for key, hook in list(hooks.items()):
            more = (args, kwargs, *given[1:]) if key in with_kwargs else given
            kind = CALLED["_forward_hooks" if ends else "_forward_pre_hooks"]
            _call(seen.path, module, kind, hook, more, allowed=given[-1])


def call_backward(
    tree: nn.Module, events: Events, zeros: Callable[[int], Tensor], gradients: Mapping[str, Tensor | None]
) -> None:
    """Calls the backward hooks of the modules through which a gradient came, with the gradients of the program's taps.

    As in PyTorch, where one argument has a gradient, those of other tensors are zeros; without any they are None.

    Args:
        zeros: like the program's result at a position.
    """
    for seen, ends in reversed(events):
        module = tree.get_submodule(seen.path)
        leaving = tuple(None if name is None else gradients[name] for name in seen.leaving)
        if all(x is None for x in leaving):
            continue
        entering = _entering(seen, zeros, gradients)
        given = (leaving,) if ends else (entering, leaving)
        hooks = module._backward_pre_hooks if ends else module._backward_hooks
        for hook in list(hooks.values()):
            kind = CALLED["_backward_pre_hooks" if ends else "_backward_hooks"]
            _call(seen.path, module, kind, hook, given, allowed=given[0])


def _entering(seen: Seen, zeros: Callable[[int], Tensor], gradients: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    found = []
    for x, name in zip(seen.args, seen.entering, strict=True):
        gradient = None if name is None else gradients[name]
        if gradient is None and isinstance(x, Result) and any(seen.entering):
            gradient = zeros(x.position)
        found.append(gradient)
    return tuple(found)


def _call(path: str, module: nn.Module, kind: str, hook: Callable[..., Any], given: Sequence[Any], allowed: Any) -> None:
    """Calls a hook, and raises where it would change something: returning what it was given changes nothing."""
    leaves = pytree.tree_leaves(given)
    versions = [x._version if isinstance(x, Tensor) else None for x in leaves]
    returned = hook(module, *given)
    what = None
    if returned is not None and returned is not allowed and not _same(returned, allowed):
        what = "returned something"
    elif not _same(pytree.tree_leaves(given), leaves):
        what = "put something else into what it was given"
    elif versions != [x._version if isinstance(x, Tensor) else None for x in leaves]:
        what = "changed a tensor in place"
    if what is not None:
        raise FoldError(
            f"The {kind} {described(hook)} on {named(path, module)} {what}, and the program has computed without it.",
            valid=_OBSERVE,
        )


def _same(x: Any, y: Any) -> bool:
    (mine, spec), (theirs, other) = pytree.tree_flatten(x), pytree.tree_flatten(y)
    return spec == other and all(a is b for a, b in zip(mine, theirs, strict=True))
