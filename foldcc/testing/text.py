"""Programs as text: what a test of a pass writes, before and after. No model is captured.

assert_rewrites(Bucket(), '''
    %da = all_reduce(%x : f32[4, 8] P(dp), dp, I)
    %db = all_reduce(%y : f32[2] P(dp), dp, I)
    return [%da, %db]
''', '''
    …
''')
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from foldcc.errors import FoldError
from foldcc.ir.node import operands
from foldcc.ir.parse import program_of
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program
from foldcc.ir.syntax import Text, bad, read
from foldcc.ir.text import sections
from foldcc.ir.walk import FORWARD, parts
from foldcc.layout import Symbol
from foldcc.passes import PIPELINE, for_kernels
from foldcc.plan.interface import find_gradients
from foldcc.plan.strategies import find_letters, letter_factors, results_of
from foldcc.rules.aten import rule_of
from foldcc.rules.notation import Rule
from foldcc.rules.observed import observed_rule
from foldcc.testing.fragments import completed, with_arguments
from foldcc.types.check import check_types

MESH = "dp=2,tp=2|ep=2,etp=2"


def program(text: str, *, stage: str = "", mesh: str = MESH) -> Program:
    """The program of a text, as a stage prints it or in short.

    In short, there may be one block without a heading, or its two directions, and no main graph: one is made, that calls it
    with inputs and returns what it returns. An argument is a line, or is declared where it is read: `%x : f32[8, 4@tp]`.
    Sizes, types and layouts that operators give need not be written.

    Args:
        stage: the pass behind which the text stands; the header of a whole stage says so itself.
        mesh: of a text without a header.

    Raises:
        FoldError: the text is no program; with the line. Or its types are not legal.
    """
    return _program(text, _holds(stage) if stage else None, mesh)


def assert_rewrites(pass_: Pass, before: str, after: str, *, mesh: str = MESH) -> None:
    """Runs a pass on one text and compares what it leaves with another, up to the names of values and columns.

    Of what the pass leaves, the graphs that `after` writes are compared. Arguments that it does not declare are those of
    `before`. Both are typed.

    Raises:
        AssertionError: they differ, with the difference.
    """
    given = _program(before, _before(pass_), mesh)
    left = pass_.run(given.copied()).with_property(*pass_.provides)
    check_types(left)
    text = with_arguments(_read(after, left.properties, str(given.mesh)), _read(before, given.properties, mesh))
    names = {s.name + s.direction for s in text.sections}
    wanted = _completed(text)
    found, expected = _lines(left, names), _lines(wanted, names)
    if found != expected:
        difference = difflib.unified_diff(expected, found, "after", f"what {pass_.name} leaves", n=2, lineterm="")
        raise AssertionError("\n".join(difference))


def _program(text: str, holds: frozenset[str] | None, mesh: str) -> Program:
    return _completed(_read(text, holds, mesh))


def _read(text: str, holds: frozenset[str] | None, mesh: str) -> Text:
    default = "main" if holds is None or "outlined" not in holds else "block0"
    return read(text, mesh, holds, default + " backward" * ("differentiated" in (holds or ())))


def _completed(text: Text) -> Program:
    if text.holds is None:
        text.holds = _holds(text.stage or "capture")
    made = derived(program_of(completed(text)))
    _check_letters(text, made)
    return made


def _check_letters(text: Text, made: Program) -> None:
    """Raises if a line says another type of its value than is found."""
    graphs = {(p.name, p.direction): p.graph.graph for p in parts(made)}
    for section in text.sections:
        graph = graphs.get((section.name, section.direction or FORWARD))
        nodes = {n.name: n.meta.get("types", {}) for n in graph.nodes} if graph is not None else {}
        for line in section.lines:
            for axis, letter in (line.types or {}).items():
                found = nodes[line.name][axis].letter if axis in nodes.get(line.name, {}) else letter
                if found != letter:
                    raise bad(line.number, line.text, f"says {letter} on {axis} of what is {found}")


def _before(pass_: Pass) -> frozenset[str]:
    """What holds of a program that a pass is given: what the passes of the pipeline provide, as far as it requires them."""
    found = {"captured"}
    for p in for_kernels(PIPELINE):
        if pass_.requires <= found:
            break
        found |= p.provides
    return frozenset(found | pass_.requires)


def _holds(stage: str) -> frozenset[str]:
    """What holds of a program behind a pass of the pipeline."""
    passes = for_kernels(PIPELINE)
    names = [p.name for p in passes]
    if stage not in ("capture", *names):
        raise FoldError(
            f"There is no stage {stage!r}, so that the text has to say what holds.", valid=", ".join(["capture", *names])
        )
    before = passes[: names.index(stage) + 1] if stage in names else ()
    return frozenset({"captured"}).union(*(p.provides for p in before))


def derived(program: Program) -> Program:
    """A program with what follows from it, and is not in its text: rules, letters, gradients and types."""
    holds = program.properties
    whole = "joint" not in holds and "differentiated" not in holds
    if whole and "outlined" in holds:
        find_gradients(program)
    if whole and "annotated" in holds:
        _find_rules(program)
    if not whole:
        for node in program.placeholders:
            node.meta["grad"] = program.slot(node.name).grad and node.meta["val"].is_floating_point()
    if program.wanted is None and "outlined" in holds:
        outputs = program.outputs
        for node in outputs:
            node.meta.setdefault("grad", "val" in node.meta and node.meta["val"].is_floating_point())
        program = replace(program, wanted=tuple(bool(n.meta["grad"]) for n in outputs))
    if "sharded" in holds:
        check_types(program)
    return program


def _find_rules(program: Program) -> None:
    """The rules that `annotate` left; what `dispatch` and `localize` wrote has none."""
    if "localized" in program.properties:
        return
    for _, node in program.nodes():
        known = all("val" in x.meta for x in (node, *node.all_input_nodes))
        if node.op != "call_function" or node.target is operator.getitem or not known:
            continue
        node.meta["rule"] = rule_of(node)
        if node.meta["rule"] is None and node.all_input_nodes:
            node.meta["unknown"] = True
            node.meta["rule"] = observed_rule(node)
        if not _nests(node, program.sizes):
            node.meta["rule"] = None
        if "sharded" in program.properties:
            find_letters(node, program.sizes)


def _nests(node: fx.Node, sizes: Mapping[Symbol, int]) -> bool:
    """Whether each dimension is the product that the node's rule says; else `annotate` has left it without a rule."""
    rule: Rule | None = node.meta["rule"]
    if rule is None:
        return True
    values = [*operands(node)[: len(rule.operands)], *results_of(node)]
    dims = [None if v is None else v.meta.get("dims") for v in values]
    letters = letter_factors(rule, dims, dict(sizes))
    pairs: list[Any] = []
    for pattern, of in zip([*rule.operands, *rule.results], dims, strict=True):
        pairs += zip(pattern or (), of or (), strict=False)
    return all(sum((letters[x] for x in product), ()) == dim for product, dim in pairs if letters.keys() >= set(product))


def _lines(program: Program, names: set[str]) -> list[str]:
    """The text of some graphs, with values numbered in order and single spaces between columns."""
    program = program.copied()
    if program.properties & {"joint", "differentiated"}:
        for graph in program.mains:
            for block in graph.children():
                assert isinstance(block, fx.GraphModule)
                for node in block.graph.nodes:  # of what leaves or is saved, the type says as much as the layout
                    if node.op == "call_function" or (graph is program.backward and "result" not in node.meta):
                        node.meta.pop("layout", None)
    found = []
    for name, direction, lines in sections(program):
        if name + direction in names:
            told = [" ".join(line.split()) for line in lines if not line.startswith("  #")]
            found += _numbered([_bare(line) for line in told])
    return found


def _bare(line: str) -> str:
    """A line without what follows from others: how often a block is called, layouts of results, a tail of no gradients."""
    if not line.startswith("return"):
        return re.sub(r"^(\w+(?: \w+)?) × \d+$", r"\1", line)
    return re.sub(r"(, None)+\]$", "]", re.sub(r" : \w+\[[^\]]*\](?: [\w|]+\([^)]*\))*", "", line))


def _numbered(lines: list[str]) -> list[str]:
    """Lines in which values, and sizes that data decide, have numbers for names, in order."""
    number: dict[str, str] = {}
    names = re.compile(r"(%)\w+|\b([cgnpu])\d+\b")
    return [names.sub(lambda m: number.setdefault(m[0], f"{m[1] or m[2]}{len(number)}"), line) for line in lines]
