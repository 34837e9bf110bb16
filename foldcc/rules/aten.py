"""The rule of a call: from its operator's record, a line of a table, or a function of its shapes.

Each kind of operator has a file with its part of the table. A property test holds every rule against the real operator,
for every legal sharding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from foldcc.ir.node import argument, argument_or, name_of, operands
from foldcc.ops.captured import captured_record
from foldcc.rules import movement, pointwise, products, reductions
from foldcc.rules.kinds import is_pointwise
from foldcc.rules.notation import Derived, Notation, Rule, Shape, notation

RULES: dict[str, Notation | Derived] = {**products.RULES, **reductions.RULES, **movement.RULES, **pointwise.RULES}


def rule_of(node: Node) -> Rule | None:
    """The rule of a call of an ATen or foldcc operator, None if it has none."""
    inputs = [None if x is None else _shape(x.meta["val"]) for x in operands(node)]
    value = node.meta["val"]
    outputs = [_shape(v) for v in value] if isinstance(value, (tuple, list)) else [_shape(value)]
    return rule_for(node, inputs, outputs)


def rule_for(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    """The rule of a call whose operands and results have these shapes, None if it has none."""
    rule = _rule_for(node, inputs, outputs)
    if rule is None or 0 not in rule.sizes.values():
        return rule
    return replace(rule, whole=rule.whole | {x for x, n in rule.sizes.items() if n == 0})  # nothing to divide


def mixes_by_argument(node: Node) -> bool:
    """Whether an argument away from its usual value makes the operator mix what its line in a table keeps apart."""
    name = name_of(node.target)
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if name == "aten.embedding":
        return bool(argument(node, "scale_grad_by_freq"))  # its gradient counts the tokens of the whole batch
    if name == "aten.histc":
        return bool(argument(node, "min") == argument(node, "max"))  # the range is that of the whole data
    return len(argument_or(node, "normalized_shape") or ()) > 1  # a line for norms is about one dimension


def _rule_for(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    known = captured_record(node.target)
    found = notation(known.rule_of(node)) if known.rule else RULES.get(name_of(node.target))
    if isinstance(found, Notation):
        while inputs and inputs[-1] is None and len(inputs) > len(found.operands):
            inputs.pop()
        return None if mixes_by_argument(node) else found.rule(inputs, outputs)
    if found is None and is_pointwise(node.target):
        found = pointwise.pointwise
    return None if found is None else found(node, inputs, outputs)


def _shape(value: Any) -> Shape | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
