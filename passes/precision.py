"""Precision: what is computed in which dtype, as casts in the captured graph. The program's plan says it.

    y = linear(x, w)            becomes    y = linear(cast(x), cast(w))             x, w f32, y bf16
    z = x + y                   stays      z = x + y                                z f32
    e = exp(y)                  becomes    e = exp(cast(y))                         e f32

Products are computed in the plan's dtype. What treats each element alone, or moves elements, is computed in the widest dtype
that it is given; all else, such as sums, norms and losses, in float32 at least, and so are powers and exponentials. Products of
what depends on no parameter and on no floating-point input, such as positions and frequencies, stay as they are. Those whose
results choose and weigh experts have a dtype of their own.

A value is cast once, behind what computes it; a parameter or an input before each reader, so that layers stay alike.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from foldcc import ops
from foldcc.ir.node import argument, name_of, operands
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program
from foldcc.ir.rewrite import emit
from foldcc.ops.captured import captured_record
from foldcc.precision import Precision
from foldcc.rules import movement, pointwise
from foldcc.rules.kinds import PRODUCTS, WIDE, is_pointwise, is_view, named

aten = torch.ops.aten
# What computes no element from several others.
_MOVES = {*pointwise.RULES, *movement.RULES} | named("embedding flip glu index index_put index_select prelu repeat roll")
_ADDS = {"aten.scatter_add"}
_STRICT = {"aten.lerp"}  # element by element, and does not take operands of two dtypes


@dataclass(frozen=True, kw_only=True)
class PrecisionPass(Pass):
    requires = frozenset({"captured"})
    name = "precision"

    def run(self, program: Program) -> Program:
        if program.plan.precision is not None:
            kinds = {n: program.slot(n.name).kind for n in program.placeholders}
            learned = {n for n, kind in kinds.items() if kind in ("parameter", "input") and _is_float(n)}
            taps = {n for n, kind in kinds.items() if kind == "tap"}
            _Casts(program.plan.precision, program.graph.graph, learned, taps).run()
            program.graph.recompile()
        return program


class _Casts:
    """Inserts casts into a graph, from its beginning on.

    Attributes:
        learned: the values that depend on parameters or floating-point inputs.
        taps: the zeros that are added for hooks, in the dtype of what they are added to.
        made: the casts of values that are computed.
        other: the values whose dtype is not what it was.
    """

    def __init__(self, policy: Precision, graph: fx.Graph, learned: set[fx.Node], taps: set[fx.Node]):
        self.policy, self.graph, self.learned, self.taps = policy, graph, learned, taps
        self.routers = _routers(graph)
        self.made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.other: set[fx.Node] = set()

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            if any(x in self.learned for x in node.all_input_nodes):
                self.learned.add(node)
            for tap in self.taps.intersection(node.all_input_nodes):
                tap.meta["val"] = tap.meta["val"].to(_dtype(node.all_input_nodes[0]))
            casts = {x: self._cast(node, x, dtype) for x, dtype in self._wanted(node).items() if _dtype(x) != dtype}
            back = captured_record(node.target).returns
            like = _dtype(argument(node, back)) if back is not None else None
            for x, cast in casts.items():
                node.replace_input_with(x, cast)
            if casts or any(x in self.other for x in node.all_input_nodes):
                before, node.meta["val"] = node.meta["val"], _computed(node)
                if _dtypes(before) != _dtypes(node.meta["val"]):
                    self.other.add(node)
            if like is not None and like != _dtype(node):
                cast = self._cast(node.next, node, like)
                node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)

    def _wanted(self, node: fx.Node) -> Mapping[fx.Node, torch.dtype]:
        """The dtypes of operands."""
        known, name = captured_record(node.target), name_of(node.target)
        floats = [x for x in operands(node) if x is not None and _is_float(x)]
        if known.narrow:
            named = [x for name, x in known.arguments(node).items() if name in known.narrow]
            return {x: self.policy.compute for x in named if isinstance(x, fx.Node)}
        if name in PRODUCTS and any(x in self.learned for x in floats):
            dtype: torch.dtype = self.policy.router if node in self.routers else self.policy.compute
            return dict.fromkeys(floats, dtype)
        if node.target is operator.getitem or not floats:
            return {}
        alone = is_pointwise(node.target) or is_view(node.target) or name in _MOVES - _ADDS
        if name in WIDE or not alone or _overflows(node, min(torch.finfo(_dtype(x)).max for x in floats)):
            return {x: torch.promote_types(_dtype(x), torch.float32) for x in floats}
        if is_pointwise(node.target) and name not in _STRICT:
            return {}  # PyTorch promotes
        return dict.fromkeys(floats, reduce(torch.promote_types, map(_dtype, floats)))

    def _cast(self, before: fx.Node, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The value in another dtype: as it was before it was widened, where it was."""
        source = x.all_input_nodes[0] if x.target is aten._to_copy.default else x
        if _dtype(source) == dtype and torch.promote_types(dtype, _dtype(x)) == _dtype(x):
            return source
        cast = self.made.get((x, dtype))
        if cast is None:
            entering = x.op == "placeholder"
            place, about = (before, before) if entering else (x.next, x)
            cast = emit(place, aten._to_copy.default, x, about=about, dtype=dtype)
            self.learned |= {cast} if x in self.learned else set()
            self.made |= {} if entering else {(x, dtype): cast}
        return cast


def _routers(graph: fx.Graph) -> set[fx.Node]:
    """The products of which the choices and the weights of experts are made, without another product in between."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    for experts in graph.find_nodes(op="call_function", target=ops.experts_node):
        left = [argument(experts, "ids"), argument(experts, "weights")]
        while left:
            node = left.pop()
            if node in seen or captured_record(node.target).narrow:
                continue
            seen.add(node)
            if name_of(node.target) in PRODUCTS:
                found.add(node)
            else:
                left += node.all_input_nodes
    return found


def _overflows(node: fx.Node, most: float) -> bool:
    """Whether a number among the arguments has no place in a dtype, such as the least float32, which stands for a mask."""
    numbers = [x for x in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, float)]
    return any(most < abs(x) < float("inf") for x in numbers)


def _computed(node: fx.Node) -> object:
    """The fake value of a call, of its operands' as they are now."""
    target: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = next(x.fake_mode for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, FakeTensor))
    with mode, torch.no_grad():
        return target(*args, **kwargs)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _dtype(node: fx.Node) -> torch.dtype:
    found: torch.dtype = node.meta["val"].dtype
    return found


def _dtypes(value: object) -> list[object]:
    return [getattr(x, "dtype", None) for x in pytree.tree_leaves(value)]
