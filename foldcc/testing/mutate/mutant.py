"""A mutant: a folded model with one planted mistake.

    y = all_reduce(x, "tp", "I")        becomes, in one block and one direction,        y = clone(x)

A mistake is planted in the lowered program, the one that runs. Planted in an earlier stage, it goes through the passes that
follow, and what is differentiated is the program with the mistake. It is part of the stage's pass, so that a program for the
gradients of other outputs has it too. A block that is called many times stands once in a program, so the mistake is in all
of its calls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import fx

from foldcc.ir.program import Program
from foldcc.ir.walk import FORWARD, module_of, parts
from foldcc.module import FoldedModule
from foldcc.passes import Pass, Stage, Stages, run_passes

Edit = Callable[[fx.Graph], None]
MAIN = "main"


@dataclass(frozen=True)
class Site:
    """Where a mistake is planted.

    Attributes:
        block: a block's name, or "main" for the graph that calls the blocks.
        direction: "forward" or "backward".
        node: of the block's graph.
        module: path of the module that the node came from; empty when that is unknown.
    """

    block: str
    direction: str
    node: str
    module: str = ""

    def __str__(self) -> str:
        return f"{self.block} {self.direction} %{self.node}" + (f" of {self.module}" if self.module else "")


@dataclass(frozen=True)
class Mutant:
    """A mistake that can be planted in a folded model.

    Attributes:
        kind: which systematic operator made it, such as "delete".
        site: where it is.
        description: what is done there, in words.
        stage: whose program it is planted in; None for the last one.
    """

    kind: str
    site: Site
    description: str
    model: FoldedModule = field(repr=False, compare=False)
    edit: Edit = field(repr=False, compare=False)
    stage: str | None = None

    def apply(self) -> FoldedModule:
        """The model with the mistake. It shares the original's parameters and earlier stages; the original stays as it is."""
        if self.stage is None:
            return running(self.model, self.planted)
        return rewrite(self.model, after=self.stage, edit=self._edit)

    def program(self) -> Program:
        """The lowered program with the mistake."""
        return self.planted(self.model.program) if self.stage is None else self.apply().program

    def planted(self, program: Program) -> Program:
        """A lowered program with the mistake in it."""
        site = self.site
        if site.direction == FORWARD:
            return replace(program, graph=edited(program.graph, site.block, self.edit))
        assert program.backward is not None
        return replace(program, backward=edited(program.backward, site.block, self.edit))

    def _edit(self, program: Program) -> None:
        self.edit(program.blocks[self.site.block].graph)

    def __str__(self) -> str:
        return f"{self.kind} at {self.site}: {self.description}"


def _mistaken(right: Pass, plant: Callable[[Program], Program]) -> Pass:
    """A pass that makes a mistake in what it makes."""
    kind = type(right)
    wrong = type(kind.__name__, (kind,), {"run": lambda self, program: plant(kind.run(self, program))})
    made: Pass = wrong(**{f.name: getattr(right, f.name) for f in fields(right)})
    return made


def running(model: FoldedModule, plant: Callable[[Program], Program]) -> FoldedModule:
    """The same model with a mistake in its lowered program: shared parameters, shared earlier stages."""
    found, last = copy.copy(model), model.stages[-1]
    assert last.by is not None
    planted = replace(last, program=plant(last.program), by=_mistaken(last.by, plant))
    found._programs = model._programs.rewritten(Stages([*model.stages[:-1], planted]))
    return found


def rewrite(model: FoldedModule, *, after: str, edit: Callable[[Program], None]) -> FoldedModule:
    """The model with a mistake that was made in an earlier stage, forward and backward alike.

    Args:
        after: name of the stage.
        edit: changes the graphs of that stage's program in place; the passes that follow are run again, unchecked.

    Raises:
        FoldError: there is no such stage.
    """

    def plant(program: Program) -> Program:
        changed = program.copied()
        edit(changed)
        return changed

    stages = model.stages
    stage: Stage = stages[after]
    position = [s.name for s in stages].index(after)
    program = plant(stage.program)
    rerun = run_passes(program, stages.passes(after=after))
    by = None if stage.by is None else _mistaken(stage.by, plant)
    found = copy.copy(model)
    found._programs = model._programs.rewritten(
        Stages([*stages[:position], replace(stage, program=program, by=by), *rerun[1:]])
    )
    return found


def edited(main: fx.GraphModule, block: str, edit: Edit) -> fx.GraphModule:
    """A main graph in which one block, or "main" itself, is replaced by an edited copy; the other blocks are shared."""
    root = torch.nn.Module()
    for name, child in main.named_children():
        assert isinstance(child, fx.GraphModule)
        mine = whole(name) == block
        setattr(root, name, fx.GraphModule(torch.nn.Module(), _copied(child.graph, edit)) if mine else child)
    return fx.GraphModule(root, _copied(main.graph, edit if block == MAIN else None))


def _copied(graph: fx.Graph, edit: Edit | None) -> fx.Graph:
    new = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapped[node] = new.node_copy(node, lambda n: mapped[n])
    if edit is not None:
        edit(new)
    return new


def at(node: fx.Node, change: Callable[[fx.Node], None]) -> Edit:
    """`change`, applied to the same node in whichever copy of its graph is edited; a pruned graph may lack it."""
    wanted = (node.name, node.target, _constants(node))

    def edit(graph: fx.Graph) -> None:
        for found in graph.nodes:
            if (found.name, found.target, _constants(found)) == wanted:
                change(found)
                return

    return edit


def _constants(node: fx.Node) -> list[Any]:
    return [x for x in node.args if isinstance(x, (str, int, float))]


def sites(program: Program) -> Iterator[tuple[Site, fx.Node]]:
    """Every operator of every distinct block, forward and then backward."""
    seen: set[Site] = set()
    for part in parts(program):
        for node in part.graph.graph.nodes:
            site = Site(whole(part.name), part.direction, node.name, module_of(node))
            if node.op == "call_function" and site not in seen:
                seen.add(site)
                yield site, node


def whole(block: str) -> str:
    """The block that a backward graph belongs to: block1_0 is that of block1 without the gradient of its result 0."""
    return block.partition("_")[0]
