"""A program from its text: what `str(stage)` prints is read back.

A value's fake tensor is what its operator makes of its operands', and has to agree with the type that is printed. Types that
are inferred (`foldcc/types/`), rules and gradients follow from the program: `foldcc.testing.program` finds them.
Values of constants, and the structure of what the model returns, are not in the text.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx
from torch.utils import _pytree as pytree

from foldcc.errors import FoldError
from foldcc.ir.joint import returns
from foldcc.ir.parsed import Graph
from foldcc.ir.pipeline import Stage
from foldcc.ir.plan import Plan
from foldcc.ir.program import Program
from foldcc.ir.syntax import Text, bad, read
from foldcc.ir.walk import FORWARD
from foldcc.ops.groups import active


def parse_program(text: str) -> Program:
    """The program that prints as `text`.

    Raises:
        FoldError: the text is no program; with the number of the line, the line, and what would be one.
    """
    return parse_stage(text).program


def parse_stage(text: str) -> Stage:
    """The stage that prints as `text`."""
    told = read(text)
    return Stage(told.stage, told.seconds, 0, 0, program_of(told))


def program_of(text: Text) -> Program:
    """The program of a text that has been read."""
    sections = {(s.name, s.direction): s for s in text.sections}
    mains = [s for s in text.sections if s.name == "main"]
    if not mains:
        raise FoldError(
            "The text has no main graph, which calls the blocks.", valid="a heading 'main', with values and what it returns"
        )
    if "emitted" in (text.holds or ()):
        raise FoldError("Kernels stand in this stage for operators, and are not read.", valid="a stage before emit")
    program = Program(
        graph=fx.GraphModule(torch.nn.Module(), fx.Graph()),
        slots=(),
        out_spec=pytree.tree_structure(()),
        constants={},
        mesh=text.mesh,
        properties=text.holds or frozenset(),
        sizes=text.factors,
        name=text.name,
    )
    with active(text.mesh):
        main = Graph(text, mains[0], sections)
        program = replace(program, graph=main.build(), slots=tuple(main.slots), batch_dims=main.batch_dims)
        _settle(program, program.graph, main)
        slots = main
        kept = {name: graph.kept for name, graph in main.blocks.items() if graph.kept is not None}
        together = {f"{name}_{FORWARD}": graph.together for name, graph in main.blocks.items() if graph.together}
        if len(mains) > 1:
            main = Graph(text, mains[1], sections)
            backward = main.build()
            program = replace(program, backward=backward)
            _settle(program, backward, main)
            together |= {name: graph.together for name, graph in main.blocks.items() if graph.together}
    said = {"zero": text.zero, "ahead": text.ahead, "precision": text.precision}
    plan = Plan(mesh=str(text.mesh), model=text.name, kept=kept, together=together, **said)
    program = replace(program, plan=plan)
    outputs = program.outputs
    if missing := [name for i, name in text.updates.items() if i >= len(outputs) or name not in slots.nodes]:
        raise FoldError(
            f"The text says that {missing[0]} is updated, which is no slot, or by an output that is not there.",
            valid=", ".join(slots.nodes),
        )
    program = replace(
        program,
        out_spec=pytree.tree_structure(tuple(outputs[: min(text.updates, default=len(outputs))])),
        updates={i: slots.nodes[name].name for i, name in text.updates.items()},
    )
    if text.wanted is None:
        return program
    wanted, graded = ([str(i) in told.split(",") for i in range(len(outputs))] for told in text.wanted)
    for node, there in zip(outputs, graded, strict=True):
        node.meta["grad"] = there
    return replace(program, wanted=tuple(wanted))


def _settle(program: Program, main: fx.GraphModule, text: Graph) -> None:
    """What the blocks of a main graph carry that does not stand in their own lines."""
    for call in main.graph.find_nodes(op="call_module"):
        block: fx.GraphModule = getattr(main, str(call.target))
        if main is program.graph:
            for formal, actual in zip(block.graph.find_nodes(op="placeholder"), call.args, strict=False):
                formal.meta["parameter"] = actual.op == "placeholder" and program.slot(actual.name).kind == "parameter"
    direction = "forward" if main is program.graph else "backward"
    for name, called in text.blocks.items():
        block = getattr(main, name)
        sides = list(zip(returns(program, name, direction, block), called.layouts, strict=False))
        for side, written in sides:
            if len(side) != len(written):
                number, told = called.section.leaving["return"]
                raise bad(
                    number,
                    f"return {told}",
                    f"returns {len(written)} gradients of {len(side)} arguments",
                    "None where there is none",
                )
        found = tuple(
            tuple((n, layout if own is None else own) for (n, layout), own in zip(side, written, strict=True))
            for side, written in sides
        )
        if found:
            joint = "differentiated" not in program.properties
            block.graph.output_node().meta |= {"joint": True, "returns": found} if joint else {"returns": found[0]}
