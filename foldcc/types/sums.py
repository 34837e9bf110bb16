"""Sums: the gradients of parameters are added over ranks in the dtype that the program's precision says, or in a wider one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from foldcc.errors import FoldError
from foldcc.ir.joint import Joint, sums
from foldcc.ir.program import Program, Slot, gradients, unshards
from foldcc.ops import record
from foldcc.types.text import call_text, place


def check_sums(program: Program) -> None:
    """Checks a program whose values travel in the dtypes that they are meant to.

    Raises:
        FoldError: a gradient is added in a narrower dtype; of which parameter, over which axes.
    """
    precision = program.plan.precision
    if precision is None or "travelling" not in program.properties:
        return
    for block, slot, gradient in _gradients(program):
        for node in sums(gradient):
            known, (x, *_) = record(node.target), node.all_input_nodes
            assert known is not None
            dtype = x.meta["val"].dtype
            if torch.promote_types(dtype, precision.reduce) != dtype:
                axes = known.arguments(node.args, dict(node.kwargs))["axes"]
                raise FoldError(
                    f"The gradient of {slot.names[0]} is added over {axes} in {_name(dtype)}, and the program's precision says "
                    f"reduce={_name(precision.reduce)}.",
                    at=place(node),
                    block=block,
                    operator=call_text(node),
                    operands=f"{x.name} {_name(dtype)}",
                )


def _gradients(program: Program) -> Iterator[tuple[str, Slot, fx.Node]]:
    """The gradients that blocks leave of parameters: the block, the parameter, the gradient."""
    if "differentiated" not in program.properties:
        leaving: dict[str, Any] = {name: Joint.of(block).gradients for name, block in program.blocks.items()}
    else:
        children: Any = program.backward.named_children() if program.backward is not None else ()
        leaving = {
            name: gradients(block.graph.output_node().args[0]) for name, block in children if not name.endswith("_again")
        }
    for name, leaves in leaving.items():
        calls = [call for call in program.calls if f"{name}_".startswith(f"{call.target}_")]
        for actual, gradient in zip(calls[0].args, leaves, strict=True) if calls and leaves else ():
            slot = _parameter(program, actual)
            if slot is not None and gradient is not None:
                yield name, slot, gradient


def _parameter(program: Program, value: Any) -> Slot | None:
    """The parameter that a value of the main graph is, as it is stored or as a block uses it."""
    source = value.args[0] if value.op == "call_function" else value
    source = source.args[0] if source.op == "call_function" else source  # the results of a call, beside what it saves
    if source.op == "call_module" and unshards(source.target):
        value = source.args[value.args[1]]
    slot = program.slot(value.name) if value.op == "placeholder" else None
    return slot if slot is not None and slot.kind == "parameter" else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
