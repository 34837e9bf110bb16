"""Rules for differentiated graphs against the real operators: divide a letter, run on each half, and join as the rule says."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from foldcc import ops
from foldcc.ir.node import operands
from foldcc.ops.experts import grouped_outer, unpermute_weights
from foldcc.rules.joint import CREATORS, UNIT, joint_rule
from foldcc.rules.notation import Pattern, Rule

aten = torch.ops.aten


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def ids(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


ORDER = torch.randperm(6)
COUNTS = torch.tensor([2, 0, 4])
# A call, and the letters that are not divided: rows that indices point at, and what an operator needs whole, or more of.
CALLS: dict[str, tuple[tuple[Any, ...], str]] = {
    "addmm": ((aten.addmm.default, real(4), real(2, 6), real(6, 4)), ""),
    "embedding": ((aten.embedding.default, real(6, 4), ids(6, 2, 4)), ""),
    "embedding_dense_backward": ((aten.embedding_dense_backward.default, real(2, 6, 4), ids(6, 2, 6), 6, -1, False), ""),
    "_softmax_backward_data": ((aten._softmax_backward_data.default, real(2, 4), real(2, 4), -1, torch.float64), ""),
    "nll_loss_backward": ((aten.nll_loss_backward.default, real(4), real(4, 6), ids(6, 4), None, 0, -100, real()), ""),
    "native_layer_norm_backward": (
        (aten.native_layer_norm_backward.default, real(2, 4, 6), real(2, 4, 6), [6], real(2, 4, 1), real(2, 4, 1), real(6),
         real(6), [True, True, True]), "one",
    ),
    "permute": ((ops.permute.overload, real(6, 4), ORDER, 1), "t"),
    "gather_rows": ((ops.gather_rows.overload, real(6, 4), ORDER, 1), "t"),
    "unpermute": ((ops.unpermute.overload, real(6, 4), ORDER, real(3, 2)), "t k"),
    "unpermute_weights": ((unpermute_weights.overload, real(3, 4), real(6, 4), ORDER, real(3, 2)), "t k"),
    "leading": ((ops.leading.overload, real(6, 4), torch.tensor([1, 3])), "t c"),
    "extended": ((ops.extended.overload, real(4, 4), torch.tensor([1, 3]), 6), "t c"),
    "spread": ((ops.spread.overload, real(6, 4), COUNTS, 4), "t c"),
    "collected": ((ops.collected.overload, real(12, 4), COUNTS, 6), "t c"),
    "grouped_linear": ((ops.grouped_linear.overload, real(6, 4), real(3, 2, 4), COUNTS, False), "e r"),
    "grouped_linear transposed": ((ops.grouped_linear.overload, real(6, 4), real(3, 4, 2), COUNTS, True), "e r"),
    "grouped_outer": ((grouped_outer.overload, real(6, 4), real(6, 2), COUNTS, False), "e r"),
    "grouped_outer transposed": ((grouped_outer.overload, real(6, 4), real(6, 2), COUNTS, True), "e r"),
    "index": ((aten.index.Tensor, real(2, 6), [None, ORDER]), "d1"),
    "index_select": ((aten.index_select.default, real(2, 6), 1, ORDER), "d1"),
    "index_add": ((aten.index_add.default, real(2, 6), 1, ORDER, real(2, 6)), "d1 r"),
    "scatter_add": ((aten.scatter_add.default, real(4, 6), 1, ids(6, 4, 2), real(4, 2)), ""),
    "flip": ((aten.flip.default, real(2, 4), [1]), ""),
    "flip from the end": ((aten.flip.default, real(2, 4), [-1]), ""),
    "roll": ((aten.roll.default, real(4, 2), [1], [-2]), ""),
    "roll of all": ((aten.roll.default, real(4, 2), [1]), ""),
    "cumsum from the end": ((aten.cumsum.default, real(4, 2), -2), ""),
    "shifted pad": ((aten.constant_pad_nd.default, real(2, 4, 6), [0, 0, 1, -1]), ""),
    "slice_backward": ((aten.slice_backward.default, real(4, 2), [4, 4], 1, 0, 4, 2), "d0 d1"),
    "select_backward": ((aten.select_backward.default, real(4, 2), [4, 3, 2], -2, 1), "d0 d1"),
    "select_scatter": ((aten.select_scatter.default, real(4, 3, 2), real(4, 2), -2, 1), ""),
    "slice_scatter": ((aten.slice_scatter.default, real(4, 6), real(4, 3), -1, 0, 6, 2), ""),
    "convolution": (
        (aten.convolution.default, real(4, 2, 6), real(4, 2, 3), real(4), [1], [1], [1], False, [0], 1), "",
    ),
    "convolution_backward": (
        (aten.convolution_backward.default, real(4, 4, 6), real(4, 2, 6), real(4, 2, 3), [4], [1], [1], [1], False, [0], 1,
         [True, True, True]), "r0",
    ),
    "convolution_backward in groups": (
        (aten.convolution_backward.default, real(4, 4, 6), real(4, 4, 6), real(4, 1, 3), None, [1], [1], [1], False, [0], 4,
         [True, True, False]), "r0 i",  # of channels, a rank's call says how many groups it has
    ),
    "cumsum": ((aten.cumsum.default, real(2, 4), 1), ""),
}  # fmt: skip


def traced(call: tuple[Any, ...]) -> fx.Node:
    """The call as a node of a graph whose placeholders hold its tensors."""
    graph = fx.Graph()

    def held(x: Any) -> Any:
        if isinstance(x, list):
            return [held(y) for y in x]
        if not isinstance(x, Tensor):
            return x
        node = graph.placeholder("x")
        node.meta["val"] = x
        return node

    target, *args = call
    node = graph.call_function(target, tuple(map(held, args)))
    node.meta["val"] = target(*args)
    return node


def cut(x: Tensor, pattern: Pattern | None, letter: str, half: int) -> Tensor:
    for d, dim in enumerate(pattern or ()):
        if letter in dim:
            x = x.chunk(2, d)[half].contiguous()
    return x


def on_half(node: fx.Node, rule: Rule, letter: str, half: int) -> list[Tensor]:
    tensors = {x: rule.operands[i] if i < len(rule.operands) else None for i, x in enumerate(operands(node)) if x is not None}
    once = {x for i, x in enumerate(operands(node)) if half and i in rule.add and rule.summed(letter)}
    args = fx.map_arg(node.args, lambda n: cut(n.meta["val"], tensors[n], letter, half) * (n not in once))
    found = node.target(*args)  # type: ignore[operator]
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("name", CALLS)
def test_a_divided_letter_is_in_the_result_or_summed(name: str) -> None:
    call, kept = CALLS[name]
    node = traced(call)
    rule = joint_rule(node)
    assert rule is not None
    letters = {x for p in rule.operands for dim in p or () for x in dim} - rule.whole - set(kept.split())
    whole = node.meta["val"] if isinstance(node.meta["val"], tuple) else (node.meta["val"],)
    for letter in letters:
        halves = [on_half(node, rule, letter, i) for i in range(2)]
        for i, (pattern, expected, parts) in enumerate(zip(rule.results, whole, zip(*halves, strict=True), strict=False)):
            read = [p for n, p in enumerate(rule.operands) if not rule.reads or n in rule.reads[i]]
            if expected is None:
                continue
            dims = [d for d, dim in enumerate(pattern or ()) if letter in dim]
            divided = any(letter in dim for p in read for dim in p or ())
            joined = torch.cat(parts, dims[0]) if dims else operator.add(*parts) if divided else parts[0]
            torch.testing.assert_close(joined, expected, msg=f"{name} {letter}")


def test_channels_that_are_convolved_alone_are_in_the_gradient_as_they_are_in_the_operand() -> None:
    rule = joint_rule(traced(CALLS["convolution_backward in groups"][0]))
    assert rule is not None and rule.results[0] is not None
    result, operand, _ = rule.operands
    assert result is not None and operand is not None
    assert rule.results[0][1] == result[1] == operand[1] and rule.whole.isdisjoint(result[1])


@pytest.mark.parametrize("name", [n for n in CALLS if n != "embedding"])
def test_terms_of_a_sum_pass_where_the_rule_says_that_it_is_linear(name: str) -> None:
    node = traced(CALLS[name][0])
    rule = joint_rule(node)
    assert rule is not None and rule.linear
    for group in rule.linear:
        group = group | rule.add
        chosen = {x for i, x in enumerate(operands(node)) if i in group}

        def run(part: float, chosen: set[Any] = chosen) -> list[Tensor]:
            found = node.target(*fx.map_arg(node.args, lambda n: n.meta["val"] * part if n in chosen else n.meta["val"]))
            return list(found) if isinstance(found, tuple) else [found]

        sums = [None if x is None else x + y for x, y in zip(run(0.25), run(0.75), strict=True)]
        for i, (found, expected) in enumerate(zip(sums, run(1.0), strict=True)):
            if expected is not None and (not rule.reads or group & rule.reads[i]) and (rule.reads or i == 0):
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("source", "target", "to"), [
    ((2, 16, 32), (32, 32), [{0}, {0}, {1}]),
    ((32, 32), (2, 16, 32), [{0, 1}, {2}]),
    ((2, 16, 8), (2, 16, 1, 8), [{0}, {1}, {3}]),
    ((8,), (1, 8, 1), [{1}]),
    ((6, 4), (4, 6), [{0, 1}, {1}]),
])  # fmt: skip
def test_a_view_follows_each_dimension(source: tuple[int, ...], target: tuple[int, ...], to: list[set[int]]) -> None:
    rule = joint_rule(traced((aten.view.default, real(*source), list(target))))
    assert rule is not None and rule.operands[0] is not None and rule.results[0] is not None
    for dim, expected in zip(rule.operands[0], to, strict=True):
        letters = {x for x in dim if not x.endswith(UNIT)}
        assert {d for d, found in enumerate(rule.results[0]) if letters & set(found)} == expected


@pytest.mark.parametrize("call", [
    (aten.rsub.Scalar, real(2, 4), 1),
    (aten.scatter.value, real(4, 6), 1, ids(6, 4, 2), 1.5),
    (aten.masked_fill.Scalar, real(4), ids(2, 4).bool(), 2.0),
    (aten.constant_pad_nd.default, real(4), [1, 1], 2.0),
    (aten._to_copy.default, real(4).mul(4).long()),
], ids=lambda c: str(c[0]))  # fmt: skip
def test_a_number_that_is_put_in_or_a_rounding_is_no_term_of_a_sum(call: tuple[Any, ...]) -> None:
    rule = joint_rule(traced(call))
    assert rule is not None and not any(0 in group for group in rule.linear)


def test_a_norm_of_two_dimensions_keeps_no_dimension_apart() -> None:
    x, one = real(4, 2, 6), real(4, 1, 1)
    call = (aten.native_layer_norm_backward.default, x, x, [2, 6], one, one, None, None, [True, False, False])
    rule = joint_rule(traced(call))
    assert rule is not None and all(p is None for p in (*rule.operands, *rule.results))


def test_what_is_created_depends_on_no_operand() -> None:
    node = traced((aten.ones_like.default, real(2, 4)))
    rule = joint_rule(node)
    assert "aten.ones_like" in CREATORS and rule is not None and rule.operands == ()
