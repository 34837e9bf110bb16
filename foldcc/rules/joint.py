"""Rules for the operators of differentiated graphs: what tracing, differentiation and dispatch write, on one rank.

The notation is that of `foldcc.rules.notation`, read for local values: a letter that is divided over an axis and in no
result is summed, and the result is a term of a sum. The rules of `foldcc.rules.aten` hold here as well; what stands here is
added to them, or read more carefully, because a divided dimension may have size 1 on a rank.

A value without a pattern, such as a mask, is not followed. Rows that stand in order of the experts are `(e r)`: they are
divided over ep with the experts, and over edp as rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import sympy
import torch
from torch.fx import Node

from foldcc.ir.node import argument, argument_or, name_of, operands
from foldcc.rules.aten import mixes_by_argument, rule_for
from foldcc.rules.kinds import COUNTED, FILLS, RESHAPES, filled_with, named
from foldcc.rules.kinds import CREATORS as ALWAYS
from foldcc.rules.notation import Derived, Letters, Notation, Pattern, Rule, Shape, dimensions, names, notation
from foldcc.rules.observed import observed_linear, observed_reads
from foldcc.rules.products import convolved

# A letter with this mark is followed only by a factor that has size 1 on a rank, so that its place in a view is not certain.
UNIT = "'"

_HEADS, _KEYS, _VALUES, _OUT, _LSE = "b (g r) q d", "b g k d", "b g k e", "b (g r) q e", "b (g r) q"
_ATTENTION = f"{_HEADS}, {_KEYS}, {_VALUES} -> {_OUT}, {_LSE}"
_GRADS = f"{_HEADS}, {_KEYS}, {_VALUES} ; linear 0"
# Blocks of queries and of keys are divided alike.
_STATE, _BLOCK = "b (g r) s e, b (g r) s one", "b (g r) s d, b g s d, b g s e, b s"
_NORM = "... [h], ... [h], ... one, ... one, [h], [h] -> ... [h], [h], [h] ; linear 0"

TABLE = {
    name: notation(text)
    for name, text in {
        "aten.addmm": "n, m k, k n -> m n ; linear 1 | 2 ; add 0",
        "aten.baddbmm": "b m n, b m k, b k n -> b m n ; linear 1 | 2 ; add 0",
        "aten.embedding": "[vocab] h, ... -> ... h ; linear 0",  # rows of other ranks are masked later: V or P
        "aten.embedding_dense_backward": "... h, ... -> [vocab] h ; linear 0",
        "aten.nll_loss_forward": "t [v], t, [v] -> t",
        "aten.nll_loss_backward": "t, t [v], t, [v] -> t [v] ; linear 0",
        "aten.native_dropout": "... -> ..., ... ; linear 0",
        "aten.native_dropout_backward": "..., ... -> ... ; linear 0",
        "aten.native_layer_norm_backward": _NORM,
        "aten._fused_rms_norm": "... [h], [h] -> ... [h], ... one",
        "aten._fused_rms_norm_backward": "... [h], ... [h], ... one, [h] -> ... [h], [h] ; linear 0",
        "aten._scaled_dot_product_flash_attention_for_cpu": _ATTENTION,
        "aten._scaled_dot_product_flash_attention": _ATTENTION,
        "aten._scaled_dot_product_efficient_attention": _ATTENTION,
        "aten._scaled_dot_product_cudnn_attention": _ATTENTION,
        "aten._scaled_dot_product_flash_attention_for_cpu_backward": f"{_OUT}, {_ATTENTION.replace(' ->', ',')} -> {_GRADS}",
        "aten._scaled_dot_product_flash_attention_backward": f"{_OUT}, {_ATTENTION.replace(' ->', ',')} -> {_GRADS}",
        "aten._scaled_dot_product_cudnn_attention_backward": f"{_OUT}, {_ATTENTION.replace(' ->', ',')} -> {_GRADS}",
        "aten._scaled_dot_product_efficient_attention_backward": (
            f"{_OUT}, {_HEADS}, {_KEYS}, {_VALUES}, mask, {_OUT}, {_LSE} -> {_GRADS}"
        ),
        "foldcc.attend_block": f"{_BLOCK}, {_STATE}, b (g r) s one -> {_STATE}, b (g r) s one",
        "foldcc.attend_block_backward": (
            f"{_STATE}, {_BLOCK}, b (g r) s one -> b (g r) s d, b g s d, b g s e, {_STATE} ; linear 0 1"
        ),
        "foldcc.either": ", ..., ... -> ... ; linear 1 2",
        "foldcc.permute": "t h, t -> t h ; linear 0",
        "foldcc.gather_rows": "t h, t -> t h ; linear 0",
        **{f"foldcc.{name}": "t h, c -> t h ; linear 0" for name in ("leading", "extended", "spread", "collected")},
        "foldcc.unpermute": "t h, t, t k -> t h ; linear 0 | 2",
        "foldcc.unpermute_weights": "t h, t h, t, t k -> t k ; linear 0 | 1",
        "foldcc.by_expert": "r h, [c] -> r, [e]",
        "foldcc.expert_of_row": "(e r) h, e -> (e r)",
    }.items()
}
_TRANSPOSED = {
    "foldcc.grouped_linear": ("(e r) k, e n k, e -> (e r) n ; linear 0 | 1", "(e r) k, e k n, e -> (e r) n ; linear 0 | 1"),
    "foldcc.grouped_outer": ("(e r) k, (e r) n, e -> e n k ; linear 0 | 1", "(e r) k, (e r) n, e -> e k n ; linear 0 | 1"),
}
GROUPED = {name: tuple(map(notation, texts)) for name, texts in _TRANSPOSED.items()}

# Results that do not depend on the numbers of any operand.
CREATORS = ALWAYS | {"aten.fill"}
# Linear, and so passing on terms of a sum, with dimensions that nothing follows.
_OPAQUE = named("repeat as_strided diagonal diagonal_backward unfold unfold_backward")
# Groups of operands in which an operator is linear, where the rule that it has does not say so.
_LINEAR: dict[str, tuple[frozenset[int], ...]] = {
    "aten.scatter_add": (frozenset({0, 2}),),
    "aten.scatter": (frozenset({0, 2}),),
    "aten.rsub": (frozenset({0, 1}),),
    "aten.masked_fill": (frozenset({0}),),
}


def joint_rule(node: Node) -> Rule | None:
    """The rule of a call in a differentiated graph, None if nothing is known about the operator."""
    name = name_of(node.target)
    inputs = [None if x is None else shape_of(x.meta["val"]) for x in operands(node)]
    value = node.meta["val"]
    outputs = [shape_of(v) for v in value] if isinstance(value, (tuple, list)) else [shape_of(value)]
    if name in CREATORS:
        return _created(name, outputs)
    if name in DERIVED:
        return DERIVED[name](node, inputs, outputs)
    if name in GROUPED:
        return _written(GROUPED[name][argument(node, "transposed")], inputs, outputs)
    if mixes_by_argument(node):
        linear = (frozenset({0}),) if name.endswith("_backward") else ()
        return replace(_unknown(inputs, outputs), linear=linear)
    if name in TABLE:
        return _written(TABLE[name], inputs, outputs)
    rule = None if name in _OPAQUE else rule_for(node, inputs, outputs)
    if name in _LINEAR:
        linear = _LINEAR[name] if _adds(name, node, inputs) else ()
        return None if rule is None else replace(rule, linear=linear)
    if name in _OPAQUE or name.endswith(("_backward", "_backward_data")):
        # The derivative of any operator is linear in the gradient that it is given, its first operand.
        found = replace(rule or _unknown(inputs, outputs), linear=(frozenset({0}),))
        return found if rule is not None else replace(found, reads=(observed_reads(node),) * len(outputs))
    if rule is None and (seen := observed_linear(node)):
        return replace(_unknown(inputs, outputs), linear=seen)
    return rule


def _adds(name: str, node: Node, inputs: list[Shape | None]) -> bool:
    """Whether the arguments leave an operator of `_LINEAR` linear: a number that is put in is no term of a sum."""
    if name == "aten.rsub":
        return len(inputs) == 2
    if name == "aten.scatter" and argument_or(node, "reduce") is not None:
        return False
    return name == "aten.scatter_add" or argument_or(node, "value") in (None, 0)


def is_zero(node: Node) -> bool:
    """Whether a call makes nothing but zeros, which are terms of any sum and parts of any value."""
    name = name_of(node.target)
    return filled_with(node) == 0 if name in FILLS else name == "aten.fill" and argument(node, "value") == 0


def shape_of(value: Any) -> Shape | None:
    """A tensor's shape with a number for each size that is data: a large one, equal for equal sizes only."""
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(n if isinstance(n, int) else _number(n.node.expr) for n in value.shape)


@lru_cache
def _number(expression: sympy.Expr) -> int:
    return int(expression.subs({s: int.from_bytes(s.name.encode(), "big") for s in expression.free_symbols}))


def _unknown(inputs: Sequence[Any], outputs: Sequence[Any]) -> Rule:
    return Rule(tuple(None for _ in inputs), tuple(None for _ in outputs), {})


def _written(table: Notation, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    """A line of the table for operands of these ranks; sizes do not matter."""
    whole: set[str] = set()

    def patterns(texts: Sequence[str], shapes: Sequence[Shape | None]) -> tuple[Pattern | None, ...]:
        ranks = [None if s is None else len(s) for s in shapes]
        padded = [*texts, *[None for _ in ranks[len(texts) :]]]
        return tuple(_pattern(t, r, whole) for t, r in zip(padded, ranks, strict=False))

    operands_, results = patterns(table.operands, inputs), patterns(table.results, outputs)
    return Rule(operands_, results, {}, frozenset(whole), table.linear, table.add)


def _pattern(text: str | None, rank: int | None, whole: set[str]) -> Pattern | None:
    found = None if text is None or rank is None else dimensions(text, rank, whole)
    return found if found is not None and len(found) == rank else None


def _created(name: str, outputs: list[Shape | None]) -> Rule:
    letters = names("d", len(outputs[0] or ()))
    return Rule((), (letters,), {}, frozenset(x for (x,) in letters if name in COUNTED))  # not one number everywhere


def _view(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    """Where each dimension of the operand may be in the result, for a factor of it and for one of size 1."""
    source, target = inputs[0], outputs[0]
    assert source is not None and target is not None
    spans, places = _spans(source), _spans(target)
    left: list[Letters] = []
    right: list[list[str]] = [[] for _ in target]
    whole = set()
    for i, (start, stop) in enumerate(spans):
        own, unit = f"d{i}", f"d{i}{UNIT}"
        within = [j for j, (a, b) in enumerate(places) if max(a, start) < min(b, stop)]
        points = [j for j, (a, b) in enumerate(places) if a == b and start <= a <= stop]
        if start == stop and not points:
            points = [j for j, (a, b) in enumerate(places) if a <= start <= b]
        for letter, found in ((own, within), (unit, points)):
            for j in found:
                right[j].append(letter)
        left.append((*((own,) if start < stop else ()), *((unit,) if points else ())))
        if not left[i]:
            left[i] = (own,)
            whole.add(own)
    return Rule((tuple(left),), (tuple(map(tuple, right)),), {}, frozenset(whole), (frozenset({0}),))


def _spans(shape: Shape) -> list[tuple[int, int]]:
    """For each dimension, between which products of the sizes after it, counted from the end of memory order, it stands."""
    sizes = list(accumulate(reversed(shape), lambda a, b: a * b, initial=1))[::-1]
    return [(-outer, -inner) for outer, inner in zip(sizes, sizes[1:], strict=False)]


def _index(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    """x[:, rows]: one dimension's entries in another order, or some of them."""
    indices = node.args[1]
    given = [d for d, x in enumerate(indices) if x is not None]
    source = inputs[0]
    if source is None or len(given) != 1 or len(inputs[1 + given[0]] or ()) != 1:
        return None
    letters = names("d", len(source))
    row = (letters[given[0]],)
    others = tuple(row if d == given[0] else None for d in range(len(indices)))
    return Rule((letters, *others), (letters,), {}, frozenset(), (frozenset({0}),))


def _index_select(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    source = inputs[0]
    assert source is not None
    letters = names("d", len(source))
    return Rule((letters, (letters[argument(node, "dim")],)), (letters,), {}, frozenset(), (frozenset({0}),))


def _index_add(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    """Rows are added where they belong: each is one of several `r` of an `e`."""
    base = inputs[0]
    assert base is not None
    letters, dim = names("d", len(base)), argument(node, "dim") % len(base)
    rows = tuple((*x, "r") if d == dim else x for d, x in enumerate(letters))
    return Rule((letters, (rows[dim],), rows), (letters,), {}, frozenset(), (frozenset({0, 2}),), add=frozenset({0}))


def _index_put(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    base, indices = inputs[0], node.args[1]
    given = [d for d, x in enumerate(indices) if x is not None]
    linear = (frozenset({0, len(inputs) - 1}),)
    if base is None or len(given) != 1 or len(inputs[1 + given[0]] or ()) != 1:
        return replace(_unknown(inputs, outputs), linear=linear)
    letters = names("d", len(base))
    rows = tuple((*x, "r") if d == given[0] else x for d, x in enumerate(letters))
    others = tuple((rows[d],) if d == given[0] else None for d in range(len(indices)))
    return Rule((letters, *others, rows), (letters,), {}, frozenset(), linear)


def _slice(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    """A slice, or its gradient in its place and zero elsewhere. What is divided was sliced in each of its blocks."""
    part = inputs[0]
    assert part is not None
    return Rule((names("d", len(part)),), (names("d", len(part)),), {}, linear=(frozenset({0}),))


def _softmax(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    """What a softmax mixes is whole, in its derivative too, which is linear in the gradient."""
    source = inputs[0]
    assert source is not None
    letters = names("d", len(source))
    linear = (frozenset({0}),) if name_of(node.target).endswith("_backward_data") else ()
    mixed = frozenset(letters[argument(node, "dim")] if letters else ())
    return Rule(tuple(letters for _ in inputs), (letters,), {}, mixed, linear)


def _convolution_backward(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    """The gradients of the operand, of the weight and of the bias, each from the gradient and what it is multiplied by."""
    x, weight = inputs[1], inputs[2]
    assert x is not None and weight is not None
    known = convolved(node, x, weight)
    if known is None:
        return replace(_unknown(inputs, outputs), linear=(frozenset({0}),))
    (first, second, bias, result), whole = known
    if 1 < argument(node, "groups") == x[1 - len(weight)] == weight[0]:  # each channel alone, and a rank has several
        second, bias, result = (tuple(("i",) if d == ("o",) else d for d in p) for p in (second, bias, result))
        whole = whole - {"i"}
    results = tuple(p if s is not None else None for p, s in zip((first, second, bias), outputs, strict=True))
    linear, reads = tuple(frozenset({i}) for i in range(3)), (frozenset({0, 2}), frozenset({0, 1}), frozenset({0}))
    places = {x for dim in result[2 - len(weight) :] for x in dim}  # divided where ranks are given what stands before theirs
    return Rule((result, first, second), results, {}, frozenset(whole - places), linear, reads=reads)


def _select_backward(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    part, out = inputs[0], outputs[0]
    assert part is not None and out is not None
    letters, dim = names("d", len(part)), argument(node, "dim") % len(out)
    return Rule((letters,), ((*letters[:dim], ("new",), *letters[dim:]),), {}, frozenset({"new"}), (frozenset({0}),))


def _turned(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    """flip, roll and cumsum: linear, and mixing the entries of the given dimensions, or of all."""
    source = inputs[0]
    assert source is not None
    letters, dims = names("d", len(source)), argument_or(node, "dims") or range(len(source))
    if name_of(node.target) == "aten.cumsum":
        dims = [argument(node, "dim")]
    return Rule((letters,), (letters,), {}, frozenset(x for d in dims for x in letters[d]), (frozenset({0}),))


DERIVED: dict[str, Derived] = {
    **dict.fromkeys(RESHAPES, _view),
    "aten.index": _index,
    "aten.index_select": _index_select,
    "aten.index_add": _index_add,
    **dict.fromkeys(named("index_put _unsafe_index_put"), _index_put),
    **dict.fromkeys(named("flip roll cumsum"), _turned),
    **dict.fromkeys(named("slice slice_backward"), _slice),
    "aten.select_backward": _select_backward,
    **dict.fromkeys(named("_safe_softmax _softmax_backward_data _log_softmax_backward_data"), _softmax),
    "aten.convolution_backward": _convolution_backward,
}
