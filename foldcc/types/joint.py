"""Types of differentiated programs: every value of every block, forward and backward, on every axis of both views.

The types of a block's arguments are those of their layouts, of its saved values those that the forward graph gave them, and
of the gradients that come in those of the results, transposed. Collectives change types as their records say, every other
operator by its rule. What a block returns must have the types of its layout: a gradient that is P where it must be I misses
its reduction, one that is I where it must be P has been reduced already.

R and I are one type here: they hold the same numbers, and what tells them apart, their gradients, is written out. So a
`retype` that is missing shows as a gradient of the wrong type.

Types do not see scale (a mean for a sum, a wrong divisor), what indices and masks select, random numbers, or where the rows
of an all-to-all go: V stays V. V|P is taken for whatever its reader needs.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from foldcc.ir.program import Program
from foldcc.layout import Layout
from foldcc.rules.notation import Rule
from foldcc.types.infer import Typing, Value
from foldcc.types.text import ill_returned, mismatched

_LETTERS = tuple((f"d{i}",) for i in range(8))
_SUM = Rule((_LETTERS, _LETTERS), (_LETTERS,), {}, linear=(frozenset({0, 1}),))


def check_joint(program: Program) -> None:
    """Checks the joint graph of each distinct block.

    Raises:
        FoldError: an operator is not legal for its operands' types, or a result or gradient has not the type of its layout;
            with the operator, its operands and their types, the module and the source line.
    """
    check = _Checker(program)
    for name, block in program.blocks.items():
        given = {n: check.typing.of(n.meta["layout"]) for n in block.graph.find_nodes(op="placeholder")}
        check.block(block, given, name)


def check_directions(program: Program) -> None:
    """Checks both directions of a program whose joint graphs are split, each distinct block once.

    Raises:
        FoldError: as `check_joint`; or a call passes a value of another type.
    """
    check = _Checker(program)
    placeholders = program.placeholders
    _, saved = check.main(program.graph, [check.typing.of(n.meta["layout"]) for n in placeholders], "forward")
    if program.backward is None:
        return
    tangents = [check.typing.of(n.meta["layout"].transposed) for n in program.objectives]
    gradients = check.main(program.backward, [*saved, *tangents], "backward")
    (output,) = program.backward.graph.find_nodes(op="output")
    for slot, leaf, found in zip(placeholders, output.args[0], gradients, strict=True):
        if found is not None:
            check.returned(f"grad_{slot.name}", leaf, {leaf: found}, slot.meta["layout"].transposed, "main backward")


class _Checker:
    """Walks the graphs of one program."""

    def __init__(self, program: Program):
        self.typing = Typing(program.mesh)
        self.blocks: dict[str, Any] = {}

    def main(self, main: fx.GraphModule, given: Sequence[Any], direction: str) -> Any:
        """What a main graph returns."""
        values: dict[Any, Any] = dict(zip(main.graph.find_nodes(op="placeholder"), given, strict=True))
        for node in main.graph.nodes:
            if node.op == "call_module":
                values[node] = self._call(main, node, values, f"{node.target} {direction}")
            elif node.target is operator.getitem:
                values[node] = values[node.args[0]][node.args[1]]
            elif node.op == "call_function":  # gradients of one value, added
                terms = {i: values[x] for i, x in enumerate(node.args)}
                (values[node],) = self.typing.apply(node, _SUM, terms, 1, values, f"main {direction}")
            elif node.op == "output":
                return fx.map_arg(node.args[0], values.__getitem__)
            if isinstance(values[node], Value):
                node.meta["types"] = self.typing.shown(values[node])
        raise AssertionError("a graph ends with its output")

    def _call(self, main: fx.GraphModule, call: fx.Node, values: Mapping[fx.Node, Any], part: str) -> Any:
        """What a block returns: results and gradients with the types of their layouts, saved values with their own."""
        block = getattr(main, str(call.target))
        formals = list(block.graph.find_nodes(op="placeholder"))
        given = {}
        for formal, actual in zip(formals, call.args, strict=True):
            saved = actual.target is operator.getitem and actual.args[0].op == "placeholder"
            if saved or "layout" not in formal.meta:  # the latter is left by the first half of a backward pass
                given[formal] = values[actual]
                continue
            for axis, state in formal.meta["layout"].states.items():
                if not self.typing.fits(values[actual], axis, state):
                    raise mismatched(call, formal, actual, axis)
            given[formal] = self.typing.of(formal.meta["layout"])
        if part not in self.blocks:
            self.blocks[part] = self.block(block, given, part)
        return self.blocks[part]

    def block(self, block: fx.GraphModule, values: dict[fx.Node, Any], part: str) -> Any:
        """Types every value of a block. Results and gradients that it returns are found to have those of their layouts."""
        for node in block.graph.nodes:
            if node.op == "call_function":
                values[node] = self.typing.node(node, values, part)
            if isinstance(values.get(node), Value):
                node.meta["types"] = self.typing.shown(values[node])
        output = block.graph.output_node()
        returned: Any = output.args[0]
        if "joint" in output.meta:  # results and gradients
            for leaves, returns in zip(returned, output.meta["returns"], strict=True):
                self._leaving(leaves, returns, values, part)
            return None
        forward = len(returned) == 2 and isinstance(returned[0], tuple)
        leaves, saved = returned if forward else (returned, ())
        found = self._leaving(leaves, output.meta["returns"], values, part)
        return (found, tuple(values[n] for n in saved)) if forward else found

    def _leaving(
        self, leaves: Sequence[Any], returns: Sequence[tuple[str, Layout]], values: Mapping[fx.Node, Any], part: str
    ) -> tuple[Any, ...]:
        pairs = list(zip(leaves, returns, strict=True))
        for leaf, (name, layout) in pairs:
            if leaf is not None:
                self.returned(name, leaf, values, layout, part)
        return tuple(None if x is None else self.typing.of(layout) for x, (_, layout) in pairs)

    def returned(self, name: str, leaf: fx.Node, values: Mapping[fx.Node, Any], layout: Layout, part: str) -> None:
        """Checks a result or a gradient against its layout."""
        axes = list(layout.states)
        for axis, state in layout.states.items():
            if not self.typing.fits(values[leaf], axis, state):
                told, text = self.typing.told(leaf, values, axes), self.typing.text(leaf, values[leaf], axes)
                raise ill_returned(name, leaf, self.typing.on(values[leaf], axis), layout, axis, part, told, text)
