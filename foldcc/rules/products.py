"""Rules for products: a letter that both factors have and the result does not is summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Node

from foldcc.ir.node import argument, argument_or, name_of
from foldcc.rules.kinds import CONVOLUTIONS
from foldcc.rules.notation import Derived, Letters, Notation, Pattern, Rule, Shape, build, names, notation


def convolved(node: Node, x: Shape, weight: Shape) -> tuple[tuple[Pattern, Pattern, Pattern, Pattern], set[str]] | None:
    """Patterns of a convolution's operand, weight, bias and result, and what must be whole; places mix, samples do not."""
    rank = len(weight) - 2
    if len(x) not in (rank + 1, rank + 2):
        return None
    batch = (("b",),) * (len(x) - rank - 1)
    places, taps, found = names("s", rank), names("k", rank), names("r", rank)
    whole = {x for pattern in (places, taps, found) for (x,) in pattern}
    channels, outputs, inner = ("i",), ("o",), ("i",)
    if argument(node, "groups") != 1:
        inner, whole = ("within",), whole | {"i", "o", "within"}
    first = (outputs, inner, *taps)
    if argument_or(node, "transposed") or "transpose" in name_of(node.target):
        first = (inner, outputs, *taps)
        if argument(node, "groups") != 1:
            first = (channels, inner, *taps)
    return ((*batch, channels, *places), first, (outputs,), (*batch, outputs, *found)), whole


def _convolution(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    x, weight = inputs[0], inputs[1]
    assert x is not None and weight is not None
    known = convolved(node, x, weight)
    if known is None:
        return None
    (first, second, bias, result), whole = known
    biased = len(inputs) > 2 and inputs[2] is not None
    rest: list[Pattern | None] = [bias if biased else None] * len(inputs[2:])
    rule = build([first, second, *rest], [result], [*inputs, outputs[0]], whole=whole, linear=[[0], [1]])
    return replace(rule, add=frozenset({2} if biased else ()))


def _matmul(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    """Batches of `m k, k n -> m n`, where a vector has no m or no n and batch dimensions broadcast."""
    x, y, out = inputs[0], inputs[1], outputs[0]
    assert x is not None and y is not None and out is not None
    own = [("m",)] * (len(x) > 1) + [("n",)] * (len(y) > 1)
    batch = names("b", len(out) - len(own))
    shared = out[: len(batch)]

    def pattern(shape: Shape, last: Sequence[Letters]) -> Pattern:
        outer = shape[: len(shape) - len(last)]
        start = len(batch) - len(outer)
        return (*(b if n == m else () for b, n, m in zip(batch[start:], outer, shared[start:], strict=True)), *last)

    first = pattern(x, [("m",), ("k",)][-len(x) :])
    second = pattern(y, [("k",), ("n",)][: len(y)])
    return build([first, second], [(*batch, *own)], [x, y, out], linear=[[0], [1]])


RULES: dict[str, Notation | Derived] = {
    "aten.mm": notation("m k, k n -> m n ; linear 0 | 1"),
    "aten.bmm": notation("b m k, b k n -> b m n ; linear 0 | 1"),
    "aten.addmm": notation("n, m k, k n -> m n ; add 0"),
    "aten.linear": notation("... k, n k, n -> ... n ; linear 0 | 1 ; add 2"),
    "aten.matmul": _matmul,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    "aten.max_pool2d": notation("... [h] [w] -> ... [y] [x]"),
    "aten.avg_pool2d": notation("... [h] [w] -> ... [y] [x] ; linear 0"),
}
