"""Rules for operators that treat each element alone, and for those that make elements."""

from __future__ import annotations

from torch.fx import Node

from foldcc.ir.node import argument_or, name_of
from foldcc.rules.kinds import EMPTY, FILLS, SAME, named
from foldcc.rules.notation import Derived, Notation, Pattern, Rule, Shape, build, names, notation


def pointwise(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    """Dimensions broadcast; what is linear passes terms of a sum on."""
    (out,) = outputs
    assert out is not None
    name, letters = name_of(node.target), names("d", len(out))
    patterns: list[Pattern | None] = []
    for shape in inputs:
        if shape is None:
            patterns.append(None)
            continue
        tail = list(zip(letters, out, strict=True))[len(out) - len(shape) :]
        patterns.append(tuple(x if n == m else () for n, (x, m) in zip(shape, tail, strict=True)))
    tensors = [i for i, s in enumerate(inputs) if s is not None]
    linear: list[list[int]] = []
    if name == "aten._to_copy" and not node.meta["val"].dtype.is_floating_point:
        linear = []  # rounding a term is not rounding the sum
    elif name in (SAME | {"aten._to_copy", "aten.neg"}):
        linear = [[0]]
    elif name == "aten.mul":
        linear = [[i] for i in tensors]
    elif name == "aten.div":
        linear = [[0]] if argument_or(node, "rounding_mode") is None else []
    elif name in ("aten.add", "aten.sub") and len(tensors) == 2:
        linear = [[0, 1]]
    elif name == "aten.where" and len(tensors) == 3:
        linear = [[1, 2]]
    return build(patterns, [letters], [*inputs, out], linear=linear)


def _fill(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    (out,) = outputs
    assert out is not None
    # The tensor argument, if any, gives only dtype and device.
    empty: list[Pattern | None] = [None for _ in inputs]
    return build(empty, [names("d", len(out))], [*[None for _ in inputs], out])


def _arange(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    return build([], [(("n",),)], [outputs[0]], whole={"n"})


# Of all others PyTorch says itself that they are pointwise.
RULES: dict[str, Notation | Derived] = {
    "foldcc.share": notation("... -> ... ; linear 0"),
    **dict.fromkeys(
        SAME | named("_to_copy copy dropout pow bitwise_not neg mul div floor_divide add sub where masked_fill fill"), pointwise
    ),
    **dict.fromkeys(EMPTY | set(FILLS), _fill),
    **dict.fromkeys(named("zeros_like ones_like full_like empty_like"), pointwise),
    "aten.arange": _arange,
}
