"""Types: after every pass, each operator must be legal for the types of its operands on every mesh axis.

    operands                         result
    all I                            I           every rank computes the same, and so will their gradients
    R, and no gradient on the rest   R           the same, with gradients that are terms of a sum
    V or R, at least one V           V, or P     or P where a divided dimension is summed
    P where the operator is linear   P           and R elsewhere
    I among R, V or P                an error    its gradient would miss a reduction

A collective changes the type as its record says, and nothing else does. This is a second account of what `shard` chose and
`dispatch` and `localize` wrote: it knows nothing of strategies.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from foldcc.errors import FoldError
from foldcc.ir.node import operands
from foldcc.ir.program import Program, where
from foldcc.layout import INVARIANT, PARTIAL, REPLICATED, VARYING, Layout, letter
from foldcc.ops import captured_record, record
from foldcc.ops.layout import cross_fold, reshard
from foldcc.plan.strategies import placed_operands
from foldcc.rules.notation import Rule
from foldcc.types.joint import check_directions, check_joint
from foldcc.types.sums import check_sums


def check_types(program: Program) -> None:
    """Checks every node of a program that has layouts.

    Raises:
        FoldError: an operator is not legal for its operands' types; with the operator, its operands and their layouts.
    """
    if "emitted" in program.properties:
        return  # kernels stand for nodes that were checked
    check_sums(program)
    if "differentiated" in program.properties:
        check_directions(program)
        return
    if "joint" in program.properties:
        check_joint(program)
        return
    for _, node in program.nodes():
        if node.op == "call_function" and isinstance(node.meta.get("layout"), Layout):
            _check(node)


def _check(node: fx.Node) -> None:
    result: Layout = node.meta["layout"]
    read = node.args[0] if node.target is operator.getitem else node  # a tuple has no layout, what is taken from it has
    sources = [x for x in read.all_input_nodes if isinstance(x.meta.get("layout"), Layout)]
    if not _differentiable(node) or node.target in (reshard, cross_fold):
        return
    given = operands(node)
    sources = [x for x in sources if x not in {given[i] for i in placed_operands(node)}]
    for axis in result.states:
        if not _legal(node, axis, sources):
            raise _ill_typed(node, axis, sources)


def _differentiable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return bool(node.meta.get("grad")) and (not isinstance(value, torch.Tensor) or value.is_floating_point())


def _legal(node: fx.Node, axis: str, sources: list[fx.Node]) -> bool:
    result = letter(node.meta["layout"].states[axis])
    types = [letter(x.meta["layout"].states.get(axis, INVARIANT)) for x in sources]
    known = record(node.target)
    if known is not None and "axes" in (arguments := known.arguments(node.args, dict(node.kwargs))):
        if axis in arguments["axes"].split(","):
            source, _, target = known.types.partition("->")
            before, after = (arguments.get(t.strip(), t.strip()) for t in (source, target))
            moved = [t for x, t in zip(sources, types, strict=True) if x is node.args[0]]
            return result == after and (not before or all(t == before for t in moved))
    elif known is not None:
        return True  # an operator of one rank, on rows that are its own
    mixed = {t for x, t in zip(sources, types, strict=True) if t != INVARIANT or _differentiable(x)}
    if not mixed:
        return True
    if mixed == {INVARIANT}:
        return result == INVARIANT
    if INVARIANT in mixed:
        return False
    if PARTIAL in mixed:
        return result == PARTIAL and _linear(node, axis)
    if any(d.ends_sum for d in captured_record(node.target).divisions):
        return result in (VARYING, INVARIANT)
    return result in ((VARYING, PARTIAL) if VARYING in mixed else (REPLICATED, VARYING))


def _linear(node: fx.Node, axis: str) -> bool:
    """Whether the operator is linear in the operands that are partial, taken together."""
    rule: Rule | None = node.meta.get("rule")
    if rule is None:
        return True  # written by a pass in place of an operator that was checked
    partial = {
        i
        for i, x in enumerate(operands(node))
        if x is not None and letter(x.meta["layout"].states.get(axis, INVARIANT)) == PARTIAL
    }
    return any(partial - rule.add == group - rule.add for group in rule.linear) or partial <= rule.add


def _ill_typed(node: fx.Node, axis: str, sources: list[fx.Node]) -> FoldError:
    told = ", ".join(f"{x.name} {x.meta['layout']}" for x in sources)
    return FoldError(
        f"{node.name} = {node.target} cannot be {node.meta['layout']} on {axis}, given its operands.",
        at=node.meta.get("source") or where(node),
        operands=told,
        valid="operands of the types that the operator takes, through a collective where they differ",
    )
