"""A program in short, completed: the main graph that calls its block, and the direction that is not written.

%dw = all_reduce(%g, dp, I)         block0 forward           main forward
return [%dw]                          %g : … = argument        %g : … = input g · gradient
                                      return [[], [%g]]        %call = block0(%g)  …
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from foldcc.errors import FoldError
from foldcc.ir.parsed import Graph, declared
from foldcc.ir.syntax import SLOT, Expression, Line, Section, Text, extend, typed
from foldcc.ir.text import short, type_text
from foldcc.ops.groups import active
from foldcc.types.infer import Typing

_TRANSPOSED = {"R": "P", "P": "R"}


def completed(text: Text) -> Text:
    """The text with a main graph for each direction, if it has none, and with types where blocks return results."""
    if text.holds and text.holds & {"joint", "differentiated"}:
        other = {s.name: s for s in text.sections if s.direction == "backward"}
        for block in text.sections:
            if block.name != "main" and block.direction != "backward":
                _with_types(text, block, other.get(block.name, block))
    if any(s.name == "main" for s in text.sections):
        if "outlined" not in (text.holds or ()):
            _inputs(text, text.sections[-1])
        return text
    forward, backward = ([s for s in text.sections if (s.direction == "backward") is there] for there in (False, True))
    if len(forward) > 1 or len(backward) > 1 or not text.sections:
        raise FoldError(
            "A text of several blocks says in a main graph who calls them.", valid="a heading 'main', and calls under it"
        )
    if backward and not forward:
        forward = [_identity(text, backward[0])]
    split = "differentiated" in (text.holds or ())
    (block,) = forward
    formals = _formals(text, block)
    results, saved = _returned(block, split)
    lines = [f"main {block.direction}".strip(), *map(_slot, formals)]
    lines.append(f"%call = {block.name}({', '.join(f'%{x.name}' for x in formals)})")
    lines += ["%results = getitem(%call, 0)"] if saved is not None else []
    taken = range(len(results))
    types = [x.type or next((y.told for y in block.lines if y.name == x.name), "") for x in results]
    told = [f" : {of}" if of else "" for of in types]
    lines += [f"%result{i}{told[i]} = getitem({'%call' if saved is None else '%results'}, {i})" for i in taken]
    lines += ["%saved = getitem(%call, 1)"] if saved is not None else []
    outputs = f"[{', '.join(f'%result{i}' for i in taken)}]"
    lines.append(f"return [{outputs}, [{'' if saved is None else '%saved'}]]" if split else f"return {outputs}")
    if backward:
        lines += _backward(text, backward[0], formals)
    number = max(x.number for s in text.sections for x in s.lines) if any(s.lines for s in text.sections) else 0
    extend(text, [(number + 1 + i, line) for i, line in enumerate(lines)])
    return text


def with_arguments(after: Text, before: Text) -> Text:
    """A text whose graphs have the arguments of another's, where it declares none, or does not say what they are."""
    for section in after.sections:
        old = next((s for s in before.sections if (s.name, s.direction) == (section.name, section.direction)), None)
        if old is None or section.name == "main":
            continue
        theirs = [*declared(before, old), *(x for x in old.lines if SLOT.match(x.operation))]
        if not _formals(after, section):
            section.lines[:0] = theirs
        kinds = {
            id(x): y.operation
            for x, y in zip(_formals(after, section), _formals(before, old), strict=False)
            if x.operation == "argument"
        }
        section.lines = [replace(x, operation=kinds[id(x)]) if id(x) in kinds else x for x in section.lines]
    return after


def _inputs(text: Text, main: Section) -> None:
    """Arguments of a main graph are inputs that have gradients."""
    lines = [*declared(text, main), *main.lines]
    main.lines = [replace(x, operation=f"input {x.name} · gradient") if x.operation == "argument" else x for x in lines]


def _formals(text: Text, section: Section) -> list[Line]:
    lines = [*declared(text, section), *(x for x in section.lines if SLOT.match(x.operation))]
    return [x for x in lines if not x.operation.startswith("gradient of")]


def _slot(x: Line) -> str:
    kind = f"input {x.name} · gradient" if x.operation == "argument" else x.operation
    return f"%{x.name} : {x.told} = {kind}"


def _leaves(section: Section) -> list[Any]:
    number, told = section.leaving.get("return", (section.number, "[]"))
    found: list[Any] = Expression(told, number, f"return {told}").read()
    return found


def _returned(section: Section, split: bool) -> tuple[list[Any], list[Any] | None]:
    """The results of a forward block, and what it saves; of a joint graph, the results."""
    leaves = _leaves(section)
    if leaves and isinstance(leaves[0], list):
        return leaves[0], leaves[1] if split else None
    return leaves, None


def _backward(text: Text, block: Section, slots: Sequence[Line]) -> list[str]:
    """The main graph of a backward block: it is given what the forward block saves and the gradients of its results."""
    formals = _formals(text, block)
    tangents = [x for x in block.lines if x.operation.startswith("gradient of")]
    lines = ["main backward", "%kept = argument", *(f"%given{i} : {x.told} = argument" for i, x in enumerate(tangents))]
    lines += [f"%kept{i} = getitem(%kept, {i})" for i in range(len(formals))]
    given = [*(f"%kept{i}" for i in range(len(formals))), *(f"%given{i}" for i in range(len(tangents)))]
    lines.append(f"%call = {block.name}({', '.join(given)})")
    leaves = _leaves(block)
    lines += [f"%gradient{i} = getitem(%call, {i})" for i, x in enumerate(leaves) if x is not None]
    leaves += [None] * (len(slots) - len(leaves))
    return [*lines, f"return [{', '.join('None' if x is None else f'%gradient{i}' for i, x in enumerate(leaves))}]"]


def _identity(text: Text, backward: Section) -> Section:
    """A forward block that saves what a backward block reads, and has an argument for each gradient that it returns."""
    formals = _formals(text, backward)
    types = _types(text, backward, _leaves(backward))
    wanted = [f"%of_{i} : {_transposed(of)} = argument" for i, of in enumerate(types)]
    tangents = [x for x in backward.lines if x.operation.startswith("gradient of")]
    results = [f"%result_{i} : {_transposed(x.told)} = argument" for i, x in enumerate(tangents)]
    lines = [
        "block0 forward".replace("block0", backward.name),
        *wanted,
        *(f"%{x.name} : {x.told} = argument" for x in formals),
        *results,
    ]
    given = ", ".join(f"%result_{i}" for i in range(len(results)))
    lines.append(f"return [[{given}], [{', '.join(f'%{x.name}' for x in formals)}]]")
    extend(text, [(0, line) for line in lines])
    number, told = backward.leaving["return"]
    backward.leaving["return"] = (number, told[:-1] + ", None" * (len(formals) + len(results)) + "]")
    text.sections.insert(0, text.sections.pop())
    return text.sections[0]


def _types(text: Text, section: Section, leaves: Sequence[Any]) -> list[str]:
    """The types of what a block returns: as written, else as they are found."""
    typing, values = Typing(text.mesh), dict[Any, Any]()
    entering = {x.name: x for x in [*declared(text, section), *section.lines] if SLOT.match(x.operation)}
    with active(text.mesh):
        graph = Graph(text, section, {})
        graph.build()
    named = {node: name for name, node in graph.nodes.items()}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            x = entering[named[node]]
            values[node] = typing.of(typed(text, x.number, x.text, x.told, enters=True)["layout"])
        elif node.op == "call_function":
            values[node] = typing.node(node, values, section.name)
    written = {x.name: x.told for x in entering.values()} | {x.name: x.told for x in section.lines}
    found = []
    for x in leaves:
        if x is None:
            found.append("f32[]")
        elif told := x.type or written[x.name]:
            found.append(told)
        else:
            node = graph.nodes[x.name]
            found.append(f"{short(node.meta['val'].dtype)}{type_text(node, typing.shown(values[node]))}")
    return found


def _with_types(text: Text, section: Section, gradients: Section) -> None:
    """Writes the types of a block's results where it returns them: those of their gradients, transposed, else as found."""
    number, told = section.leaving["return"]
    results, _ = _returned(section, True)
    given = {
        int(x.operation.split()[-1]): _transposed(x.told) for x in gradients.lines if x.operation.startswith("gradient of")
    }
    if any(x.type is None and not next((y.told for y in section.lines if y.name == x.name), "") for x in results):
        for i, (x, of) in enumerate(zip(results, _types(text, section, results), strict=True)):
            of = given.get(i, of.replace(" R(", " I("))
            told = re.sub(rf"%{x.name}\b(?! :)", f"%{x.name} : {of}", told, count=1)
        section.leaving["return"] = (number, told)


def _transposed(told: str) -> str:
    """The type of a value's gradient: R and P change places."""
    return re.sub(r" ([RP])\(", lambda m: f" {_TRANSPOSED[m[1]]}(", told)
