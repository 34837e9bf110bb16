"""What the type checker says: an operator that is not legal, a result of the wrong type."""

from __future__ import annotations

from typing import Any

from torch import fx

from foldcc.errors import FoldError
from foldcc.ir.node import name_of
from foldcc.ir.program import where
from foldcc.layout import INVARIANT, PARTIAL, REPLICATED, VARYING, Layout, letter
from foldcc.types.axis import EITHER, Type

# Found and needed, and what that says about the program.
_MEANS = {
    (PARTIAL, REPLICATED): "its sum over {axis} is missing",
    (VARYING, REPLICATED): "no collective over {axis} has made it the same on every rank",
    (EITHER, REPLICATED): "its sum over {axis} is missing, or what joins its parts",
    (REPLICATED, PARTIAL): "every rank of {axis} has the whole, which a later sum would count several times",
    (VARYING, PARTIAL): "every rank of {axis} has an own part, and no term of a sum",
    (REPLICATED, VARYING): "every rank of {axis} has the same, where each needs its own part",
    (PARTIAL, VARYING): "its sum over {axis} is missing",
    (VARYING, VARYING): "another dimension is divided over {axis}",
}


def call_text(node: fx.Node) -> str:
    """`mul_3 = aten.mul(x, y)`"""
    given = ", ".join(map(str, node.args))
    return f"{node.name} = {name_of(node.target).replace('::', '.')}({given})" if node.op == "call_function" else node.name


def place(node: fx.Node) -> str | None:
    """The module and the source line of a node, as far as they are known."""
    known = [x for x in (where(node), node.meta.get("source")) if x]
    return " ".join([known[0], *(f"({x})" for x in known[1:])]) if known else None


def illegal(node: fx.Node, why: str, part: str, told: list[str]) -> FoldError:
    """An operator that is not legal for its operands' types."""
    return FoldError(f"{call_text(node)} {why}.", at=place(node), block=part, operands="\n".join(told))


def ill_returned(
    name: str, leaf: fx.Node, found: Type, layout: Layout, axis: str, part: str, told: list[str], value: str
) -> FoldError:
    """A result or gradient whose type is not that of its layout."""
    needed = letter(layout.states[axis])
    same = REPLICATED if needed == INVARIANT else needed
    means = _MEANS.get((found.letter, same), "its axes do not agree")
    return FoldError(
        f"{name} is {found.letter} on {axis}, and its layout {layout} needs {needed}: {means.format(axis=axis)}.",
        at=place(leaf),
        block=part,
        operator=f"{call_text(leaf)} : {value}",
        operands="\n".join(told) or None,
    )


def mismatched(call: Any, formal: fx.Node, actual: fx.Node, axis: str) -> FoldError:
    """A call that passes a value of another type than the block was made for."""
    return FoldError(
        f"The call {call.name} passes {actual.name} for {formal.name}, of another type on {axis}.",
        block=str(call.target),
        formal=formal.meta.get("layout"),
        actual=actual.meta.get("layout"),
    )
