"""Rules for operators that mix the elements of a dimension: sums, softmax, choices, norms."""

from __future__ import annotations

from torch.fx import Node

from foldcc.ir.node import argument_or
from foldcc.rules.kinds import named
from foldcc.rules.notation import Derived, Notation, Pattern, Rule, Shape, build, names, notation
from foldcc.rules.pointwise import pointwise


def dims_of(node: Node, rank: int) -> set[int]:
    """The dimensions that a call is about: all where it names none."""
    dims = argument_or(node, "dim")
    if dims is None or dims == []:
        return set(range(rank))
    return {d % max(rank, 1) for d in ([dims] if isinstance(dims, int) else dims)}


def _reduced(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    """sum and mean: linear, so that a reduced dimension may be sharded and leaves a partial result."""
    (source,) = inputs
    assert source is not None
    letters, dims = names("d", len(source)), dims_of(node, len(source))
    keep = argument_or(node, "keepdim")
    result = tuple(() if i in dims else x for i, x in enumerate(letters) if keep or i not in dims)
    return build([letters], [result], [source, outputs[0]], linear=[[0]])


def _along(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    """softmax, topk, sort, cumprod, amax …: one dimension must be whole; the others are independent of each other."""
    if len(inputs) == 2:  # the larger of two tensors
        return pointwise(node, inputs, outputs)
    (source,) = inputs
    assert source is not None
    letters, dims = names("d", len(source)), dims_of(node, len(source))
    whole = {letters[i][0] for i in dims}
    results: list[Pattern | None] = []
    for out in outputs:
        assert out is not None
        if len(out) < len(source):
            results.append(tuple(x for i, x in enumerate(letters) if i not in dims))
            continue
        made = [x if n == m else ("top_k",) for x, n, m in zip(letters, out, source, strict=True)]
        results.append(tuple(() if out[i] == 1 else x for i, x in enumerate(made)))
    whole |= {"top_k"} if any("top_k" in d for r in results for d in r or ()) else set()
    wishes = {"top_k": "k"}
    return build([letters], results, [source, *outputs], whole=whole, wishes=wishes)


_ALONG = """softmax log_softmax _softmax _log_softmax _safe_softmax topk sort argsort cumprod amax amin argmax max min any all
prod"""
RULES: dict[str, Notation | Derived] = {
    "aten.histc": notation("... -> [experts]"),
    "aten.rms_norm": notation("... [h], [h] -> ... [h]"),
    "aten.layer_norm": notation("... [h], [h], [h] -> ... [h]"),
    "aten.native_layer_norm": notation("... [h], [h], [h] -> ... [h], ... one, ... one"),
    **dict.fromkeys(named("sum mean"), _reduced),
    **dict.fromkeys(named(_ALONG), _along),
}
