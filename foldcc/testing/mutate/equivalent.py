"""Why a mutant is no mistake: the same numbers, for every model and every input.

A reason is read off the program. That some checker finds no difference is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from foldcc import ops
from foldcc.ir.program import Program
from foldcc.ir.walk import BACKWARD, FORWARD, parts
from foldcc.testing.mutate.collectives import axes_of
from foldcc.testing.mutate.mutant import MAIN, Mutant, whole
from foldcc.testing.mutate.terms import Algebra

aten = torch.ops.aten


def equivalent(mutant: Mutant) -> str | None:
    """Why a mutant computes the same as the program that it was made of, or None if no reason is known.

    Two reasons are known. Every rank computes the same terms (`terms.py`): the other axis forms the same groups, what is
    summed is zero, the ranks that change places hold the same. Or the value cancels: a number is subtracted from all logits
    of a token before they are exponentiated, and any number that the ranks agree on will do.

    Mutants of earlier stages, and those in the main graph, are not examined.
    """
    if mutant.site.block == MAIN or mutant.stage is not None:
        return None
    program, changed, site = mutant.model.program, mutant.program(), mutant.site
    before, after = _block(program, site.block, site.direction), _block(changed, site.block, site.direction)
    if site.direction == FORWARD and _cancels(before, after, _block(program, site.block, BACKWARD), site.node):
        return "it cancels: log(sum(exp(x - m))) - (x[target] - m) is the same for every m that the ranks agree on"
    algebra = Algebra(mutant.model.mesh)
    if algebra.outputs(before) == algebra.outputs(after):
        return "every rank computes the same terms"
    return None


def _block(program: Program, block: str, direction: str) -> fx.Graph:
    graphs = (p.graph.graph for p in parts(program) if p.direction == direction and whole(p.name) == block)
    return next(graphs, fx.Graph())


def _cancels(before: fx.Graph, after: fx.Graph, backward: fx.Graph, name: str) -> bool:
    """Whether the largest logit of each token, which all ranks share, is replaced by another number that they share.

    It is subtracted from the logits, `x - m`, and read by nothing else. What is read of that are
        forward    log(all_reduce(sum(exp(x - m)))) - all_reduce(mask * (x - m)[target]), the mask true on one rank
        backward   exp(x - m) / all_reduce(sum(exp(x - m)))
    and m cancels in both.
    """
    node = next(n for n in before.nodes if n.name == name)
    if node.target is not ops.all_reduce_max.overload or [u.target for u in node.users] != [aten.sub.Tensor]:
        return False
    axes, (shifted,) = axes_of(node), node.users
    there = next(n for n in after.nodes if n.name == shifted.name)
    if there.args[0].name != shifted.args[0].name or not _shared(there.args[1], axes):
        return False
    if {u.target for u in shifted.users} != {aten.exp.default, aten.gather.default}:
        return False
    powers = _followed(shifted, aten.exp.default)
    total = _followed(powers, aten.sum.dim_IntList, ops.all_reduce.overload)
    loss = _followed(total, aten.log.default, aten.sub.Tensor)
    picked = _followed(shifted, aten.gather.default, aten.squeeze.dim, aten.mul.Tensor, ops.all_reduce.overload)
    if powers is None or total is None or picked is None or loss is None or loss.args[1] is not picked:
        return False
    return axes_of(total) == axes_of(picked) == axes and _as_softmax(backward, powers.name, total.name)


def _shared(x: Any, axes: str) -> bool:
    """Whether all ranks of a group over the axes hold the same: it is reduced over them, and then each rank does the same."""
    if not isinstance(x, fx.Node):
        return True  # a number
    if x.target in (ops.all_reduce.overload, ops.all_reduce_max.overload):
        return axes_of(x) == axes
    return x.target in (aten.mul.Tensor, aten.div.Tensor, aten.neg.default) and all(_shared(a, axes) for a in x.args)


def _followed(node: fx.Node | None, *targets: Any) -> fx.Node | None:
    """What is computed of a value by these operators, one after the other, if nothing else is computed of what lies between."""
    for i, target in enumerate(targets):
        found = [u for u in node.users if u.target is target] if node is not None else []
        others = [u for u in node.users if u.op != "output" and u not in found] if node is not None else []
        if len(found) != 1 or (i > 0 and others):
            return None
        node = found[0]
    return node


def _as_softmax(backward: fx.Graph, powers: str, total: str) -> bool:
    """Whether the exponentials and their sum are read as their quotient only: `exp * unsqueeze(x / sum)`."""
    arguments = {n.name: n for n in backward.find_nodes(op="placeholder")}
    if powers not in arguments or total not in arguments:
        return False
    quotients = {u for u in arguments[total].users if u.target is aten.div.Tensor and u.args[1] is arguments[total]}
    products = [u for u in arguments[powers].users if u.target is aten.mul.Tensor]
    factors = {a.args[0] for u in products for a in u.args if a is not arguments[powers] and a.target is aten.unsqueeze.default}
    whole = len(quotients) == len(arguments[total].users) and len(products) == len(arguments[powers].users)
    return whole and len(factors) == len(products) and factors <= quotients
