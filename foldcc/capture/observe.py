"""What hooks on modules are called with, marked while the model is captured; see `foldcc/taps.py` for what becomes of it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from foldcc.errors import FoldError, listed
from foldcc.hooks import Result, Seen, Watch, hooks_of, is_the_models, named
from foldcc.ops.operator import LIBRARY

LIBRARY.define("observed(Tensor x) -> Tensor")
LIBRARY.impl("observed", lambda x: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("foldcc::observed", lambda x: torch.empty_like(x), lib=LIBRARY)
observed = torch.ops.foldcc.observed.default

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.Size)


@dataclass
class Recorder:
    """What watched modules were called with while the model was captured, each tensor with a mark in the graph.

    Attributes:
        watches: the watched modules.
        marks: the marked tensors, which the captured forward returns besides.
        asked: what a tap is asked for: (call, it is a result, its position there), by the mark's position.
    """

    watches: tuple[Watch, ...] = ()
    events: list[tuple[Seen, bool]] = field(default_factory=list)
    marks: list[Tensor] = field(default_factory=list)
    asked: dict[int, tuple[Seen, bool, int]] = field(default_factory=dict)

    def clear(self) -> None:
        self.events.clear()
        self.marks.clear()
        self.asked.clear()

    def mark(self, x: Tensor) -> tuple[Tensor, Result]:
        self.marks.append(observed(x))
        return self.marks[-1], Result(len(self.marks) - 1)

    def taken(self, what: str, x: Any) -> Any:
        """The value with a `Result` for each tensor."""

        def leaf(y: Any) -> Any:
            if isinstance(y, Tensor):
                return self.mark(y)[1]
            if isinstance(y, (int, float)) and not isinstance(y, bool):
                return y + 0  # a plain number; one that is watched tells that it was looked at
            if not isinstance(y, _PLAIN):
                raise FoldError(
                    f"{what} holds a {type(y).__name__}, which hooks on this module cannot be given.",
                    valid="hooks on modules that take and return tensors, numbers and strings, in tuples, lists and dicts",
                )
            return y

        return pytree.tree_map(leaf, x)

    def tapped(self, seen: Seen, ends: bool, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The values as the model goes on with them, and with a `Result` for each tensor; taps stand where tensors do."""
        new, kept = [], []
        for i, x in enumerate(values):
            if isinstance(x, Tensor) and x.is_floating_point():
                x, at = self.mark(x)
                self.asked[at.position] = (seen, ends, i)
                kept.append(at)
            else:
                kept.append(self.taken(seen.path, x))
            new.append(x)
        (seen.leaving if ends else seen.entering).extend([None] * len(values))
        return tuple(new), tuple(kept)


def remove_hooks(model: nn.Module) -> None:
    """Removes the hooks that are no part of the model, which nothing but values is for; the caller restores them."""
    own = {id(m) for m in model.modules()}
    for module in model.modules():
        for held, key, hook in list(hooks_of(module)):
            if not is_the_models(hook, own):
                del vars(module)[held][key]


@contextmanager
def observing(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """The model returns marks of what watched modules see beside what it returns.

    The caller restores hooks and `forward`.
    """
    watches = recorder.watches
    for watch in watches:
        _observe(model.get_submodule(watch.path), watch, recorder)
    if watches:
        forward = model.forward

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            recorder.clear()  # a tracer may run the forward more than once
            return forward(*args, **kwargs), list(recorder.marks)

        vars(model)["forward"] = call
    yield
    called = {seen.path for seen, _ in recorder.events}
    missed = [named(w.path, m) for w in watches if (m := model.get_submodule(w.path)) and w.path not in called and _runs(m)]
    if missed:
        warnings.warn(
            f"The captured forward does not call {listed(missed)}, so hooks there are not called: what calls it in the "
            "original, such as a loop over experts, is one operator here.",
            stacklevel=2,
        )


def _runs(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _observe(module: nn.Module, watch: Watch, recorder: Recorder) -> None:
    open_calls: list[Seen | None] = []  # None: traced on its own, for an operator that is given a function
    what = named(watch.path, module)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(isinstance(x, fx.Proxy) for x in pytree.tree_leaves((args, kwargs))):
            open_calls.append(None)
            return None
        seen = Seen(watch.path, (), {})
        open_calls.append(seen)
        recorder.events.append((seen, False))
        if watch.gradients:
            args, seen.args = recorder.tapped(seen, False, args)
        else:
            seen.args = recorder.taken(f"An argument of {what}", args)
        if watch.kwargs:
            seen.kwargs = recorder.taken(f"An argument of {what}", kwargs)
        return args, kwargs

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        seen = open_calls.pop()
        if seen is None:
            return None
        recorder.events.append((seen, True))
        if not watch.gradients or not isinstance(output, (Tensor, tuple)):
            if watch.gradients:
                warnings.warn(
                    f"{what} returns a {type(output).__name__}, and PyTorch calls backward hooks of modules that return a "
                    "tensor or a tuple of tensors only.",
                    stacklevel=2,
                )
            seen.output = recorder.taken(f"What is returned by {what}", output)
            return None
        if isinstance(output, Tensor):
            (new,), (seen.output,) = recorder.tapped(seen, True, (output,))
            return new
        new, seen.output = recorder.tapped(seen, True, tuple(output))
        if hasattr(output, "_fields"):
            new, seen.output = type(output)(*new), type(output)(*seen.output)
        return new

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)
