"""Roles: which factors of a program are its width, its samples and its sequences, as far as inputs and parameters say it."""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from foldcc.ir.node import name_of, operands
from foldcc.ir.program import Program
from foldcc.layout import Symbol


def hidden(program: Program) -> int:
    """The width of the residual stream: the factor that most parameters share."""
    votes: dict[Symbol, int] = defaultdict(int)
    for node in program.placeholders:
        if program.slot(node.name).kind == "parameter":
            for f in dict.fromkeys(f for dim in node.meta["dims"] if len(dim) == 1 for f in dim):  # in order, on every rank
                votes[f] += 1
    return program.sizes[max(votes, key=lambda f: votes[f])] if votes else 1


def factors(program: Program) -> set[Symbol]:
    """The factors that are worth dividing: those of weight matrices and of inputs."""
    found = set()
    for node in program.placeholders:
        if program.slot(node.name).kind == "input" or sum(bool(dim) for dim in node.meta["dims"]) > 1:
            found |= {f for dim in node.meta["dims"] for f in dim}
    return found


def sequences(program: Program) -> set[Symbol]:
    """The factors of inputs that no product with a parameter sums over."""
    inputs = [n for n in program.placeholders if program.slot(n.name).kind == "input"]
    return {f for n in inputs for dim in n.meta["dims"] for f in dim} - _widths(program)


def _widths(program: Program) -> set[Symbol]:
    """The factors over which operators sum products with parameters."""
    found: set[Symbol] = set()
    for _, node in program.nodes():
        found.update(f for x in summed_over_parameter(node) for f in node.meta.get("letters", {}).get(x, ()))
    return found


def summed_over_parameter(node: fx.Node) -> set[str]:
    """The letters over which an operator sums products with a parameter."""
    rule = node.meta.get("rule")
    if rule is None or len(rule.operands) < 2:
        return set()
    pairs = zip(operands(node), rule.operands, strict=False)
    patterns = [pattern for x, pattern in pairs if x is not None and pattern is not None and is_parameter(x)]
    return {y for pattern in patterns for dim in pattern for y in dim if rule.summed(y)}


def is_parameter(x: fx.Node) -> bool:
    """Whether a value is a parameter, in whatever dtype."""
    while name_of(x.target) == "aten._to_copy":
        x = x.all_input_nodes[0]
    return bool(x.meta.get("parameter"))


def batch(program: Program) -> Symbol | None:
    """The factor of the samples of the inputs."""
    for node in program.placeholders:
        if program.slot(node.name).kind == "input":
            d = program.batch_dim(node)
            if d is not None and node.meta["dims"][d]:
                first: Symbol = node.meta["dims"][d][0]
                return first
    return None
