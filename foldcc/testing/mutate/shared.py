"""Mistakes about what several blocks use: a use whose gradient is left out, or counts twice.

    dw = add(first use, second use)      a use is left out          dw = first use
                                         a use counts twice         dw = add(add(first use, second use), second use)

Tied weights are added up in the main backward graph; so is every value that several blocks read.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import fx

from foldcc.ir.program import Program, unshards
from foldcc.ir.walk import BACKWARD
from foldcc.module import FoldedModule
from foldcc.testing.mutate.edits import wrap
from foldcc.testing.mutate.mutant import MAIN, Mutant, Site, at

aten = torch.ops.aten


def shared_mutants(model: FoldedModule) -> Iterator[Mutant]:
    program = model.program
    assert program.backward is not None
    for node in program.backward.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        site, what = Site(MAIN, BACKWARD, node.name), _summed(program, node)
        for i, use in enumerate(("first", "second")):
            without, twice = at(node, partial(_without, i)), at(node, partial(_twice, i))
            yield Mutant("shared", site, f"the {use} use of {what} gives no gradient", model, without)
            yield Mutant("shared", site, f"the gradient of the {use} use of {what} counts twice", model, twice)


def _without(use: int, node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[1 - use])
    node.graph.erase_node(node)


def _twice(use: int, node: fx.Node) -> None:
    wrap(node, aten.add.Tensor, node.args[use])


def _summed(program: Program, node: fx.Node) -> str:
    """The parameter whose gradient an addition makes, if it is one."""
    while len(node.users) == 1 and next(iter(node.users)).target is aten.add.Tensor:
        node = next(iter(node.users))
    node = _reduced(program, node)
    (output,) = node.graph.find_nodes(op="output")
    for gradient, placeholder in zip(output.args[0], program.placeholders, strict=True):
        if gradient is node:
            return program.slot(placeholder.name).names[0]
    return "a value between blocks"


def _reduced(program: Program, node: fx.Node) -> fx.Node:
    """What a sum of terms becomes, where a block that unshards parameters brings it together."""
    (reader, *rest) = node.users
    if rest or reader.op != "call_module" or not unshards(reader.target):
        return node
    assert program.backward is not None
    leaves = program.backward.get_submodule(str(reader.target)).graph.output_node().args[0]
    terms = list(reader.args)[len(reader.args) - len(leaves) :]
    return next((u for u in reader.users if u.args[1] == terms.index(node)), node)
