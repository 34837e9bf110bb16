"""Average: what each micro-batch adds to what a call returns of all its samples together.

    loss = sum(losses) / count + 0.01 * router        becomes, since what micro-batches return is added up,
    loss = sum(losses) / count + share(0.01 * router)

A sum over samples is that of all micro-batches, and so is what is linear in it; `count`, which they share, is that of all of
them (`capture/counts.py`). Of everything else the call returns the mean of what micro-batches have, as one process that
accumulates: of means over samples, of a router's loss. Whether a sum is divided by a number, or by how many samples a micro-
batch has, does not stand in its program: the program of the whole call tells, whose number is the same or another one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from foldcc.errors import FoldError
from foldcc.ir.node import argument_or, name_of, operands
from foldcc.ir.pipeline import Pass, run_passes
from foldcc.ir.program import Program
from foldcc.ir.rewrite import emit
from foldcc.ops.share import share
from foldcc.rules.aten import rule_of
from foldcc.rules.kinds import CREATORS

aten = torch.ops.aten
ROWS, SUM, MEAN, SAME = "of samples", "a sum over samples", "a mean", "the same in all micro-batches"
BOUND = "a sum over samples that is kept from zero"  # which nothing but a division by it can mean
_BOUNDS = {"aten.clamp", "aten.clamp_min", "aten.maximum"}
_ADDED = {"aten.add", *_BOUNDS}  # a number
_SCALED = {aten.mul.Tensor, aten.div.Tensor}
_LINEAR = {aten.add.Tensor, aten.sub.Tensor, *_SCALED}


class Untold(FoldError):
    """The program of a whole call has to be looked at as well."""


@dataclass(frozen=True, kw_only=True)
class Average(Pass):
    """Attributes:
    micro_batches: in a call.
    whole: the captured program of the whole call, if it is known.
    before: the passes that it takes to annotate it.
    """

    requires = frozenset({"annotated"})
    provides = frozenset({"averaged"})
    micro_batches: int
    whole: Program | None = None
    before: tuple[Pass, ...] = ()

    def run(self, program: Program) -> Program:
        kinds = _Kinds(program, self)
        for i, output in enumerate(program.outputs[: program.own]):
            kind = kinds.of(None, kinds.read.outputs[i])
            if kind != ROWS and output.meta["val"].is_floating_point():
                if output.op == "placeholder" or len([c for c in program.calls if c.target == output.args[0].target]) > 1:
                    made = "is given to the model" if output.op == "placeholder" else "a block that repeats returns it"
                    raise FoldError(
                        f"{program.told_output(i)} is no value of each sample, and {made}.",
                        valid="a model that does not return it; micro_batches=1 and pp=1",
                    )
                call, index = output.args
                if kind != SUM:
                    returned = program.blocks[str(call.target)].graph.output_node()
                    values = list(returned.args[0])
                    shared = self._share(returned, values[index])
                    if alone := len(output.users) == 1 and program.outputs.count(output) == 1:
                        values[index] = shared
                    returned.args = (tuple(values if alone else (*values, shared)),)
                    if not alone:  # the model goes on with it, or a hook sees it
                        _return(program, i, call, len(values))
        for node, position in dict.fromkeys(kinds.mixed):
            node.update_arg(position, self._share(node, node.args[position]))
        for i in program.updates:
            _check_update(program, i)
        program.graph.recompile()
        return program

    def of_call(self, program: Program) -> Program:
        """The annotated program of the whole call, in the same blocks, which a plan may say.

        Raises:
            Untold: it is not known.
        """
        if self.whole is None:
            raise Untold("What becomes of a loss over micro-batches does not show in the program of one of them.")
        return run_passes(replace(self.whole, plan=program.plan), self.before)[-1].program

    def _share(self, before: fx.Node, x: fx.Node) -> fx.Node:
        """What one micro-batch adds to a mean."""
        new = emit(before, share.overload, x, about=x)
        new.meta["dims"], new.meta["rule"] = x.meta["dims"], rule_of(new)
        return new


def _return(program: Program, i: int, call: fx.Node, index: int) -> None:
    """Has the main graph return another result of a call."""
    old, outputs = program.outputs[i], list(program.outputs)
    with program.graph.graph.inserting_before(program.output):
        outputs[i] = program.graph.graph.call_function(operator.getitem, (call, index))
    outputs[i].meta = dict(old.meta)
    call.meta["val"] = (*call.meta["val"], old.meta["val"])
    program.output.args = (tuple(outputs),)


def _check_update(program: Program, i: int) -> None:
    """Raises if the new value of a buffer is computed of what is another number in a micro-batch than in a call of its own."""
    left: list[tuple[fx.Node | None, fx.Node]] = [(None, program.outputs[i])]
    seen = set(left)
    while left:
        call, node = left.pop()
        if node.meta.get("count") or node.target is share.overload:
            raise FoldError(
                f"{program.told_output(i)} is computed of a loss, or of a term of one, whose value is that of the whole call: "
                "a micro-batch has its part of it.",
                at=node.meta.get("source"),
                valid="an update that is computed of samples, or of a mean of its own; micro_batches=1",
            )
        new = [x for x in _behind(program, call, node) if x not in seen]
        seen.update(new)
        left += new


def _behind(program: Program, call: fx.Node | None, node: fx.Node) -> list[tuple[fx.Node | None, fx.Node]]:
    """What a value is computed of, one step back: values of blocks with their call, and of the main graph with none."""
    if node.op == "placeholder" and call is None:
        return []
    if node.op == "placeholder":
        formals = list(program.blocks[str(call.target)].graph.find_nodes(op="placeholder"))
        actual: Any = call.args[formals.index(node)]
        return [(None, actual)]
    if call is None:
        made, index = node.args
        assert isinstance(made, fx.Node)
        value: Any = program.blocks[str(made.target)].graph.output_node().args[0]
        return [(made, value[index])]
    return [(call, x) for x in _read(node)]


def _read(node: fx.Node) -> list[fx.Node]:
    """The operands whose numbers a result depends on."""
    return [] if name_of(node.target) in CREATORS else node.all_input_nodes


def _told(node: fx.Node) -> list[Any]:
    """The arguments that are no operands."""
    return [x for x in node.args if not isinstance(x, fx.Node)]


class _Kinds:
    """What becomes of values over micro-batches.

    Attributes:
        read: the program that is looked at: that of a micro-batch, or that of the whole call where a micro-batch is one sample,
            which is no dimension that a sum could be over.
        mixed: operands of sums that are means or the same, next to sums over samples, by their position.
    """

    def __init__(self, program: Program, average: Average):
        self.program, self.average = program, average
        self.mixed: list[tuple[fx.Node, int]] = []
        self.known: dict[tuple[fx.Node | None, fx.Node], str] = {}
        self.read = program
        if not self.samples:
            self.read = self.whole
            del self.samples

    @cached_property
    def samples(self) -> set[Any]:
        """The factors of samples."""
        return {f for n, d in self._sampled() for f in n.meta["dims"][d]}

    def _sampled(self) -> list[tuple[fx.Node, int]]:
        inputs = [n for n in self.read.placeholders if self.read.slot(n.name).kind == "input"]
        return [(n, d) for n in inputs if (d := self.read.batch_dim(n)) is not None]

    @cached_property
    def whole(self) -> Program:
        return self.average.of_call(self.program)

    def numbers(self, node: fx.Node) -> tuple[Any, Any]:
        """The number in a call of an operator, in a micro-batch's program and in the whole call's."""
        if len(self.program.placeholders) > len(self.whole.placeholders) and self._named(node, self.program) is None:
            return 1, 1  # a number of the call, which is an input of the one and stands in the other
        both = self.own(node), self._alike_in_whole(node)
        mine, whole = (_told(n)[0] for n in both)
        return mine, whole

    def _alike_in_whole(self, node: fx.Node) -> fx.Node:
        return node if self.read is self.whole else self._alike(node, self.whole)

    def own(self, node: fx.Node) -> fx.Node:
        """What the program of a micro-batch has where the one that is read has this."""
        return node if self.read is self.program else self._alike(node, self.program)

    def _alike(self, node: fx.Node, other: Program) -> fx.Node:
        """The node of the same block, name and operator in another program of the same model."""
        found = self._named(node, other)
        if found is None:
            raise FoldError(
                "Whether a loss is a sum over samples or their mean does not show: the programs of a whole call and of a "
                f"micro-batch differ in {node.name}.",
                at=node.meta.get("source"),
                valid="a loss that divides by a count of its inputs; micro_batches=1",
            )
        return found

    def _named(self, node: fx.Node, other: Program) -> fx.Node | None:
        graphs = [(a, b) for a, b in zip(self._graphs(self.read), self._graphs(other), strict=False) if a is node.graph]
        named = (n for _, graph in graphs for n in graph.nodes if n.name == node.name)
        return next((n for n in named if str(n.target) == str(node.target)), None)

    @staticmethod
    def _graphs(program: Program) -> list[fx.Graph]:
        return [program.graph.graph, *(block.graph for block in program.blocks.values())]

    def of(self, call: fx.Node | None, node: fx.Node) -> str:
        """The kind of a value of a block, in a call; of the main graph, in none."""
        key = (call, node)
        if key not in self.known:
            self.known[key] = self._of(call, node)
        return self.known[key]

    def _of(self, call: fx.Node | None, node: fx.Node) -> str:
        if node.op == "placeholder":
            if call is None:
                return ROWS if node in dict(self._sampled()) else SAME
            formals = list(self.read.blocks[str(call.target)].graph.find_nodes(op="placeholder"))
            return self.of(None, call.args[formals.index(node)])
        if call is None:  # of the main graph: a result of a call
            made, index = node.args
            assert isinstance(made, fx.Node)
            value: Any = self.read.blocks[str(made.target)].graph.output_node().args[0]
            kind = self.of(made, value[index])
            if kind == BOUND:
                raise self.refusal(value[index])
            return kind
        if node.meta.get("count"):
            return SAME
        if any(self.samples & set(d) for d in node.meta.get("dims", ())):
            return ROWS
        if node.target is operator.getitem:
            return self.of(call, node.all_input_nodes[0])
        kinds = {x: self.of(call, x) for x in _read(node)}
        if ROWS in kinds.values():
            return self._reduced(node, kinds)
        if not {SUM, BOUND}.isdisjoint(kinds.values()):
            kind = self._of_sums(node, kinds)
        else:
            kind = MEAN if MEAN in kinds.values() else SAME
        if kind != SAME and node.target in _LINEAR:
            for x in (x for x, its in kinds.items() if its == SAME):
                self._check_same(call, x, node)
        return self._scaled(node, kind) if node.target in _SCALED and None in operands(node) else kind

    def _reduced(self, node: fx.Node, kinds: Mapping[fx.Node, str]) -> str:
        """Of an operator that leaves no samples."""
        averages = isinstance(node.target, torch._ops.OpOverload) and argument_or(node, "reduction") == 1
        if averages or name_of(node.target) == "aten.mean":
            return MEAN
        rule = node.meta.get("rule")
        if rule is not None and {SUM, MEAN}.isdisjoint(kinds.values()):
            letters = {
                letter
                for x, pattern in zip(operands(node), rule.operands, strict=False)
                if x is not None and pattern is not None
                for dim, product in zip(x.meta["dims"], pattern, strict=True)
                if self.samples & set(dim)
                for letter in product
            }
            if letters and all(rule.summed(x) and x not in rule.whole for x in letters):
                return SUM
        raise self.refusal(node)

    def _of_sums(self, node: fx.Node, kinds: Mapping[fx.Node, str]) -> str:
        """Of an operator that reads sums over samples."""
        given = operands(node)
        if node.target is aten.div.Tensor and [kinds.get(x) for x in given if x is not None] in ([SUM, SUM], [SUM, BOUND]):
            return MEAN
        if BOUND in kinds.values():
            raise self.refusal(node)
        sums = {i for i, x in enumerate(given) if x is not None and kinds[x] == SUM}
        others = {i for i, x in enumerate(given) if x is not None and kinds[x] != SUM}
        rule = node.meta.get("rule")
        alone = len(node.all_input_nodes) == 1
        if alone and name_of(node.target) in ("aten.add", "aten.sub") and node.args[1] == 0:  # where Python's sum() starts
            return SUM
        if name_of(node.target) in (_ADDED if alone else _BOUNDS) and sums == {0}:
            return BOUND
        if rule is None or not any(sums <= set(linear) for linear in rule.linear):
            raise self.refusal(node)
        together = next(set(linear) for linear in rule.linear if sums <= set(linear))
        if any(kinds[given[i]] == MEAN for i in others - together):
            raise self.refusal(node)
        self.mixed += [(self.own(node), i) for i in sorted(others & together)]
        return SUM

    def _scaled(self, node: fx.Node, kind: str) -> str:
        """Of a value times a number, which may go with how many samples there are."""
        mine, whole = self.numbers(node)
        if mine == whole:
            return kind
        more = whole / mine if node.target is aten.mul.Tensor else mine / whole
        if kind == SUM and math.isclose(more * self.average.micro_batches, 1):
            return MEAN
        if kind in (MEAN, SAME) and math.isclose(more, self.average.micro_batches):
            return SUM
        raise self.refusal(node)

    def _check_same(self, call: fx.Node | None, x: fx.Node, reader: fx.Node) -> None:
        """Raises if a value that is made of no input goes with how many samples there are, such as a tensor of their number."""
        left, seen = [(call, x)], set[tuple[fx.Node | None, fx.Node]]()
        while left:
            call, node = left.pop()
            if (call, node) in seen or node.meta.get("count"):
                continue
            seen.add((call, node))
            left += _behind(self.read, call, node)
            if node.op == "placeholder" and call is None and self.read.slot(node.name).kind == "constant":
                mine, whole = (p.constants.get(node.name) for p in (self.program, self.whole))
                if mine is None or whole is None or not torch.equal(mine, whole):
                    raise self.refusal(reader)
            elif node.op == "call_function" and call is not None and not _read(node):
                if _told(self.own(node)) != _told(self._alike_in_whole(node)):
                    raise self.refusal(reader)

    def refusal(self, node: fx.Node) -> FoldError:
        return FoldError(
            "A loss is computed of samples in a way that does not add up over micro-batches.",
            at=node.meta.get("source"),
            node=node.format_node(),
            valid="a loss that is linear in sums and means over samples; micro_batches=1",
        )
