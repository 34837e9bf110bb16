"""Mistakes in how the gradient of a parameter is summed over ranks.

    dw = all_reduce(term, "dp,tp")       not summed over tp         dw = all_reduce(term, "dp")
                                         summed over tp again       dw = all_reduce(all_reduce(term, "dp,tp"), "tp")

Small gradients are reduced together, in a bucket; a mistake concerns one of them, so its part goes by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from foldcc import ops
from foldcc.ir import program as ir
from foldcc.ir.program import Program
from foldcc.ir.walk import BACKWARD, module_of, parts
from foldcc.layout import INVARIANT, Layout
from foldcc.module import FoldedModule
from foldcc.testing.mutate.collectives import axes_of_both_views
from foldcc.testing.mutate.edits import before
from foldcc.testing.mutate.mutant import Mutant, Site, whole

aten = torch.ops.aten


@dataclass(frozen=True)
class Gradient:
    """A parameter's gradient, as a block's backward graph returns it.

    Attributes:
        site: the node that is returned.
        position: among what the block's backward graph returns.
        parameters: names of the parameters, one for each call of the block.
        layout: of the gradient.
        axes: over which it is reduced before it is returned.
    """

    site: Site
    position: int
    parameters: tuple[str, ...]
    layout: Layout
    axes: tuple[str, ...]


def gradients(program: Program) -> Iterator[Gradient]:
    """Every gradient of a parameter that a block returns."""
    slots = {n: program.slot(n.name) for n in program.placeholders}
    seen: set[tuple[str, int]] = set()
    for part in parts(program):
        if part.direction != BACKWARD or part.name.endswith("_again"):
            continue
        block = whole(part.name)
        calls = [c for c in program.calls if c.target == block]
        (output,) = part.graph.graph.find_nodes(op="output")
        for position, leaf in enumerate(ir.gradients(output.args[0])):
            actuals = [c.args[position] for c in calls]
            of_parameter = all(a in slots and slots[a].kind == "parameter" for a in actuals)
            if leaf is None or not of_parameter or (block, position) in seen:
                continue
            seen.add((block, position))
            names = tuple(slots[a].names[0] for a in actuals)
            _, axes = _reduced(leaf)
            site = Site(block, BACKWARD, leaf.name, module_of(leaf))
            yield Gradient(site, position, names, actuals[0].meta["layout"], axes)


def _reduced(leaf: Any) -> tuple[fx.Node, tuple[str, ...]]:
    """This rank's term of a gradient, and the axes over which the terms are summed at the end, alone or in a bucket."""
    if leaf.target is ops.all_reduce.overload:
        return leaf.args[0], tuple(leaf.args[1].split(","))
    if leaf.target is aten.reshape.default and leaf.args[0].target is operator.getitem:
        parts, i = leaf.args[0].args
        bucket = parts.args[0]
        if bucket.target is ops.all_reduce.overload:
            return bucket.args[0].args[0][i].args[0], tuple(bucket.args[1].split(","))
    return leaf, ()


def gradient_mutants(model: FoldedModule) -> Iterator[Mutant]:
    """Each reduction of each gradient left out, axis by axis; each gradient reduced once more, over each axis."""
    for g in gradients(model.program):
        for axis in g.axes:
            yield not_summed(model, g, axis)
        for axis in axes_of_both_views(model.mesh):
            if g.layout.states.get(axis) == INVARIANT:
                yield summed_again(model, g, axis)


def not_summed(model: FoldedModule, g: Gradient, axis: str) -> Mutant:
    def edit(graph: fx.Graph) -> None:
        leaf = _leaf(graph, g.position)
        if leaf is not None:
            term, axes = _reduced(leaf)
            left = ",".join(a for a in axes if a != axis)
            (output,) = graph.find_nodes(op="output")
            new = before(output, ops.all_reduce.overload, term, left, "I") if left else before(output, aten.clone.default, term)
            _return(graph, g.position, new)

    told = f"the gradient of {g.parameters[0]} is not summed over {axis}"
    return Mutant("drop reduction", g.site, told, model, edit)


def summed_again(model: FoldedModule, g: Gradient, axis: str) -> Mutant:
    return followed(model, g, "reduce again", f"is summed over {axis} once more", ops.all_reduce.overload, axis, "I")


def followed(model: FoldedModule, g: Gradient, kind: str, told: str, target: Any, *rest: Any) -> Mutant:
    """A gradient to which one more operator is applied, `target(gradient, *rest)`."""

    def edit(graph: fx.Graph) -> None:
        leaf = _leaf(graph, g.position)
        if leaf is not None:
            (output,) = graph.find_nodes(op="output")
            _return(graph, g.position, before(output, target, leaf, *rest))

    return Mutant(kind, g.site, f"the gradient of {g.parameters[0]} {told}", model, edit)


def missing(model: FoldedModule, g: Gradient) -> Mutant:
    """A parameter that is left without a gradient."""

    def edit(graph: fx.Graph) -> None:
        _put(graph, g.position, None)

    return Mutant("missing", g.site, f"{g.parameters[0]} has no gradient", model, edit)


def _leaf(graph: fx.Graph, position: int) -> fx.Node | None:
    (output,) = graph.find_nodes(op="output")
    found: fx.Node | None = ir.gradients(output.args[0])[position]
    return found


def _return(graph: fx.Graph, position: int, new: fx.Node) -> None:
    """Returns another node as a gradient, with the claims that were made about the former one."""
    old = _leaf(graph, position)
    assert old is not None
    new.meta = dict(old.meta)
    _put(graph, position, new)


def _put(graph: fx.Graph, position: int, new: fx.Node | None) -> None:
    """Returns something else as a gradient; what the first of two backward passes leaves for the second stays."""
    (output,) = graph.find_nodes(op="output")
    returned = output.args[0]
    leaves = list(ir.gradients(returned))
    leaves[position] = new
    output.args = (tuple(leaves) if ir.gradients(returned) is returned else (tuple(leaves), returned[1]),)
