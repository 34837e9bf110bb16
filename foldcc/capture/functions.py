"""What autograd does in a forward pass and a tracer does not keep: backward passes of functions, gradients of foreign tensors.

A tracer keeps the forward pass alone of a function that has a backward pass of its own.
Reentrant gradient checkpointing is one: its backward pass is that of the function that it runs, which is what is captured.
What is kept for the backward pass, a program decides. Any other is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from foldcc.changed import changed
from foldcc.errors import FoldError

_DYNAMOS = type(torch.ops.higher_order.autograd_function_apply)  # what Dynamo makes of such a function


class _Inlined:
    @staticmethod
    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def inlined() -> Iterator[None]:
    """Reentrant checkpoints are what they compute inside this context."""
    with changed(vars(checkpoint), {"CheckpointFunction": _Inlined}):
        yield


@contextmanager
def adapted(model: nn.Module, tracer: str) -> Iterator[None]:
    """Checkpointed functions are captured as what they compute, and a gradient through any other function is an error.

    The caller removes the hook that sees to it.
    """
    if tracer == "export":
        model.register_forward_hook(lambda module, args, returned: _refuse_through(module, returned))
    call = _DYNAMOS.__call__
    with inlined():
        _DYNAMOS.__call__ = _refuse if torch.is_grad_enabled() else call
        try:
            yield
        finally:
            _DYNAMOS.__call__ = call


def _refuse_through(model: nn.Module, returned: Any) -> None:
    """Goes through the backward pass that autograd has recorded. Parameters and inputs are fake tensors in it."""
    left = [x.grad_fn for x in pytree.tree_leaves(returned) if isinstance(x, Tensor)]
    seen = set()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [n for n, _ in node.next_functions]
            leaf = getattr(node, "variable", None)
            if leaf is not None and not isinstance(leaf, FakeTensor):
                raise FoldError(
                    f"The forward of {type(model).__name__} uses a tensor of shape {list(leaf.shape)} that requires a gradient "
                    "and is no parameter of it, so it would not be trained.",
                    valid="an nn.Parameter as an attribute of a module; modules in an nn.ModuleList or nn.ModuleDict",
                )
            if isinstance(node, BackwardCFunction):
                cls: Any = getattr(node, "_forward_cls", type(node))
                if not cls.__module__.startswith("torch."):
                    raise _refusal(f"{cls.__module__}.{cls.__qualname__}")


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise _refusal("a torch.autograd.Function")


def _refusal(what: str) -> FoldError:
    return FoldError(
        f"The model computes with {what}, whose own backward pass cannot be captured.",
        valid="operators of PyTorch, from which the same gradient follows; or the call under torch.no_grad, without one",
    )
