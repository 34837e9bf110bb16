"""Functions with a backward pass of their own, by a sum whose value is theirs and whose gradient is what their backward makes.

    y = F.apply(x)      becomes      y = F.forward(x).detach() + transposed(x - x.detach())

A backward pass is linear in the gradient that it is given, so the gradient of its transpose is itself. While a model is traced,
the pass is traced as well, of a mark that stands for the gradient; once the graph is there, the transpose is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import function as functions

from foldcc.errors import FoldError
from foldcc.ir.rewrite import inline, replace_node
from foldcc.ops.operator import LIBRARY

LIBRARY.define("tangent(Tensor y) -> Tensor")
LIBRARY.impl("tangent", torch.zeros_like, "CompositeExplicitAutograd")
LIBRARY.define("with_backward(Tensor y, Tensor tangent, Tensor[] x, Tensor[] grads) -> Tensor")
LIBRARY.impl("with_backward", lambda y, tangent, x, grads: y.clone(), "CompositeExplicitAutograd")
for _name in ("tangent", "with_backward"):
    torch.library.register_fake(f"foldcc::{_name}", lambda y, *_: torch.empty_like(y), lib=LIBRARY)


def _not_run(ctx: Any, grad: Tensor) -> Any:
    raise NotImplementedError("a mark of capture has no gradient")


torch.library.register_autograd("foldcc::with_backward", _not_run, lib=LIBRARY)  # so that its result is known to have one
_tangent, _with_backward = torch.ops.foldcc.tangent.default, torch.ops.foldcc.with_backward.default
_SAME = torch.ops.aten.detach.default  # inside a backward pass


class _Context:
    """What a function is given as `ctx`."""

    saved_tensors: tuple[Any, ...] = ()

    def __init__(self, needs: tuple[bool, ...]):
        self.needs_input_grad = needs
        self.constant: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.constant = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass

    def mark_dirty(self, *tensors: Tensor) -> None:
        raise FoldError("A torch.autograd.Function writes into its operand.", valid="one that returns another tensor")


def _applied(cls: Any, *args: Any) -> Any:
    ctx = _Context(tuple(isinstance(x, Tensor) and x.requires_grad for x in args))
    if cls.setup_context is functions.Function.setup_context:
        found = cls.forward(ctx, *args)
    else:
        found = cls.forward(*args)
        cls.setup_context(ctx, args, found)
    if not torch.is_grad_enabled() or not any(ctx.needs_input_grad):
        return found
    outputs = found if isinstance(found, tuple) else (found,)
    live = [isinstance(y, Tensor) and y.is_floating_point() and not any(y is c for c in ctx.constant) for y in outputs]
    tangents = [_tangent(y.detach()) if there else None for y, there in zip(outputs, live, strict=True)]
    grads = cls.backward(ctx, *tangents)
    grads = grads if isinstance(grads, tuple) else (grads,)
    pairs = [(x, g) for x, g, need in zip(args, grads, ctx.needs_input_grad, strict=True) if need and g is not None]
    xs, gs = [x for x, _ in pairs], [g for _, g in pairs]
    marked = tuple(y if t is None else _with_backward(y, t, xs, gs) for y, t in zip(outputs, tangents, strict=True))
    return marked if isinstance(found, tuple) else marked[0]


@contextmanager
def marked() -> Iterator[None]:
    """Functions that this thread applies inside this context are marked with what their backward passes make."""
    base: Any = functions._SingleLevelFunction  # where also an `apply` that was taken before looks
    here = get_ident()

    def apply(cls: Any, *args: Any) -> Any:
        inner = cls.__module__.startswith("torch.") or get_ident() != here
        return super(base, cls).apply(*args) if inner else _applied(cls, *args)

    base.apply = classmethod(apply)
    try:
        yield
    finally:
        del base.apply


def transpose(graph: fx.Graph) -> None:
    """Writes the sum in the place of each mark."""
    for node in graph.find_nodes(op="call_function", target=_with_backward):
        y, tangent, xs, grads = node.args
        behind = _behind(tangent, node)
        outer = list(dict.fromkeys(x for n in (*behind, *grads) for x in (n, *n.all_input_nodes) if x not in behind))
        found = [(x, g) for x, g in zip(xs, grads, strict=True) if g in behind]

        def sum_of(y: Tensor, *values: Tensor, given: Any = (outer, xs, behind, found, tangent)) -> Tensor:
            outer, xs, behind, found, tangent = given
            known = dict(zip((*outer, *xs), values, strict=True))
            zeros = [x - x.detach() for x in (known[x] for x, _ in found)]
            with torch.enable_grad():
                gradient = torch.zeros_like(y).requires_grad_()
                known[tangent] = gradient
                for n in behind[1:]:
                    args, kwargs = fx.map_arg((n.args, n.kwargs), known.__getitem__)
                    known[n] = args[0] if n.target is _SAME else n.target(*args, **kwargs)
                total = torch.stack([(known[g] * z).sum() for (_, g), z in zip(found, zeros, strict=True)]).sum()
            (there,) = torch.autograd.grad(total, gradient)
            return y.detach() + there

        replace_node(node, inline(node, sum_of, y, *outer, *xs) if found else y)
    for node in graph.find_nodes(op="call_function", target=_tangent):
        replace_node(node, inline(node, torch.zeros_like, node.args[0]))


def _behind(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes before `last` that are computed from `first`, in order, which is one of them."""
    found, node = {first: None}, first.next
    while node is not last:
        if not found.keys().isdisjoint(node.all_input_nodes):
            found[node] = None
        node = node.next
    return list(found)
