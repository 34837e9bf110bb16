"""What a tracer does not keep of a forward pass: backward passes of functions, gradients of foreign tensors, counts.

A tracer keeps the forward pass alone of a function that has a backward pass of its own.
Reentrant gradient checkpointing is one: its backward pass is that of the function that it runs, which is what is captured.
What is kept for the backward pass, a program decides. Of any other, `backwards.py` keeps the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from foldcc.capture.backwards import marked
from foldcc.changed import changed
from foldcc.errors import FoldError

_DYNAMOS = type(torch.ops.higher_order.autograd_function_apply)  # what Dynamo makes of such a function


class _Counted(TorchFunctionMode):
    """Inside it, `bincount` makes as many counts as it is told to make at least, where else the largest number decides.

    A number beyond them is an error when the program runs.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_counts if func in (torch.bincount, Tensor.bincount) else func)(*args, **(kwargs or {}))


def _counts(input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    if minlength == 0:
        raise FoldError(
            "The largest number in a tensor decides how many counts torch.bincount makes, and a program has one shape of each.",
            valid="minlength=, as many numbers as there are",
        )
    if weights is not None and weights.requires_grad:
        raise FoldError("torch.bincount has no gradient for its weights, and these require one.", valid="weights.detach()")
    if weights is None:
        terms = torch.ones_like(input, dtype=torch.int64)
    else:
        terms = weights.to(weights.dtype if weights.dtype == torch.float32 else torch.float64)
    return terms.new_zeros(minlength).scatter_add(0, input.long(), terms)


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
    """Checkpointed functions are captured as what they compute, others with their own backward passes.

    The caller removes the hook that looks for gradients of what is no parameter.
    """
    if tracer == "export":
        model.register_forward_hook(lambda module, args, returned: _refuse_foreign(module, returned))
    call = _DYNAMOS.__call__
    with inlined(), marked() if tracer == "export" else nullcontext(), _Counted():
        _DYNAMOS.__call__ = _refuse if torch.is_grad_enabled() else call
        try:
            yield
        finally:
            _DYNAMOS.__call__ = call


def _refuse_foreign(model: nn.Module, returned: Any) -> None:
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


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise FoldError(
        "The model computes with a torch.autograd.Function, whose own backward pass Dynamo does not keep.",
        valid='capture="export"; operators of PyTorch, from which the same gradient follows',
    )
