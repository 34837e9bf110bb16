"""A stage as text: one line for each value, with its layout, what computes it, and where that came from.

    program MixtralForCausalLM · stage dispatch · dp=2,tp=2|ep=4 · 12 ms
    factors batch=8 seq=16 hidden=64

    block1 × 56
      # model.layers.0.mlp.experts                                     modeling_mixtral.py:118
      %x     : f32[tokens@ep, hidden]           = cross_fold(%y)       # free: same ranks, same order
      %rows  : f32[u7, hidden] V(ep)            = all_to_all_v(%x)     16.00 KiB

What stands between the brackets of a type are factors and axes where the layout is known. Where types were inferred, as in
`f32[2, 8@tp, 32] P(dp)`, it is the sizes on one rank, one of them divided over tp, and terms of a sum over dp; else it is the
sizes, as in `f32[4x16x32]`. `foldcc.ir.parse` reads the text back.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from textwrap import wrap
from typing import Any

import torch
from torch import fx

from foldcc.errors import FoldError
from foldcc.ir.pipeline import Stage
from foldcc.ir.program import Program
from foldcc.ir.sizes import Sizes, communicates, human
from foldcc.ir.walk import BACKWARD, FORWARD, Part, module_of, parts
from foldcc.layout import VARYING, Layout
from foldcc.ops.layout import cross_fold
from foldcc.tables import table

_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u"}
_WIDEST = (52, 64, 72)  # columns: name, type, operation
_RETURN = 120  # columns of a line that returns


def stage_text(stage: Stage) -> str:
    """The program after a pass, as text."""
    program = stage.program
    lines = [
        f"program {program.name} · stage {stage.name} · {program.mesh} · {1000 * stage.seconds:.0f} ms",
        " ".join(["factors", *(f"{f.name}={n}" for f, n in program.sizes.items())]),
    ]
    for _, text in _sections(program):
        lines += ["", *text]
    return "\n".join(lines)


def block_text(stage: Stage, name: str) -> str:
    """One block of a stage, forward and backward.

    Raises:
        FoldError: there is no such block.
    """
    sections = list(_sections(stage.program))
    found = ["\n".join(text) for block, text in sections if block == name]
    if not found:
        raise FoldError(f"Stage {stage.name} has no block {name!r}.", valid=", ".join(dict.fromkeys(b for b, _ in sections)))
    return "\n\n".join(found)


def _sections(program: Program) -> Iterator[tuple[str, list[str]]]:
    """The name and the text of each block in each direction, then of the main graphs."""
    sizes: dict[str, Sizes] = {}
    both = program.backward is not None
    for part in parts(program):
        if part.name != "main":
            known = sizes.setdefault(part.name, Sizes(program.mesh))
            head = f"{part.name} {part.direction} × {part.calls}" if both else f"{part.name} × {part.calls}"
            yield part.name, [head, *_lines(program, part, known)]
    for direction, main in zip((FORWARD, BACKWARD), program.mains, strict=False):
        part = Part("main", direction, 1, main)
        yield "main", [f"main {direction}" if both else "main", *_lines(program, part, Sizes(program.mesh))]


def stage_diff(first: Stage, second: Stage) -> str:
    """The lines that differ between two stages, as a unified diff; columns are not aligned in it."""
    a, b = ([re.sub(r"(?<=\S) +", " ", line) for line in stage_text(s).splitlines()[1:]] for s in (first, second))
    return "\n".join(difflib.unified_diff(a, b, first.name, second.name, n=1, lineterm=""))


def _lines(program: Program, part: Part, sizes: Sizes) -> Iterator[str]:
    rows: list[tuple[str, str, str, str] | str] = []
    at = ""
    localized = "localized" in program.properties
    for node in part.graph.graph.nodes:
        if localized:
            sizes.learn(node)
        where, source = module_of(node), node.meta.get("source", "")
        if node.op == "call_function" and (where or source) and f"{where} {source}" != at:
            at = f"{where} {source}"
            rows.append(f"  # {where or program.name:<64} {source}".rstrip())
        if node.op == "output":
            rows += wrap(f"return {_argument(node.args[0])}", _RETURN, initial_indent="  ", subsequent_indent=" " * 9)
        else:
            note = _note(node, sizes if localized else None)
            rows.append((f"%{node.name}", _type(node), _operation(program, part, node), note))
    cells = [r for r in rows if not isinstance(r, str)]
    widths = [min(limit, max((len(c[i]) for c in cells), default=0)) for i, limit in enumerate(_WIDEST)]
    for row in rows:
        if isinstance(row, str):
            yield row
        else:
            name, of, operation, said = row
            of = f": {of:<{widths[1]}}" if of else " " * (widths[1] + 2)
            yield f"  {name:<{widths[0]}} {of} = {operation:<{widths[2]}}  {said}".rstrip()


def _operation(program: Program, part: Part, node: fx.Node) -> str:
    if node.op == "placeholder":
        if part.name != "main" or part.direction != "forward":
            return "argument"
        slot = program.slot(node.name)
        return f"{slot.kind} {slot.names[0]}"
    target: Any = node.target
    name = str(target) if isinstance(target, str) else getattr(target, "__name__", str(target))
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.removeprefix("foldcc::").replace("::", ".")
    given = [*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in node.kwargs.items())]
    return f"{name}({', '.join(given)})"


def _argument(x: Any) -> str:
    if isinstance(x, fx.Node):
        return f"%{x.name}"
    if isinstance(x, (tuple, list)):
        return f"[{', '.join(map(_argument, x))}]"
    return str(x).removeprefix("torch.")


def _note(node: fx.Node, sizes: Sizes | None) -> str:
    if node.target is cross_fold:
        return "# free: same ranks, same order"
    if sizes is None or not communicates(node):
        return ""
    count, expected = sizes.sent(node)
    return human(count) + (" expected" if expected else "")


def _type(node: fx.Node) -> str:
    """dtype[layout], dtype[factors] or dtype[sizes], whichever is known; empty for what is no tensor."""
    value, layout = node.meta.get("val"), node.meta.get("layout")
    dtype = value.dtype if isinstance(value, torch.Tensor) else node.meta.get("dtype")
    if dtype is None or isinstance(value, (tuple, list)):
        return ""
    short = _short(dtype)
    if isinstance(layout, Layout):
        return f"{short}{layout}"
    if isinstance(value, torch.Tensor):
        if "types" in node.meta:
            return f"{short}{type_text(node, node.meta['types'])}"
        if "dims" in node.meta:
            return f"{short}{Layout(node.meta['dims'], {})}"
        return f"{short}[{'x'.join(map(str, value.shape))}]"
    return short


def type_text(node: fx.Node, types: Mapping[str, Any]) -> str:
    """The sizes of a value on a rank and its types by axis (`foldcc/types/axis.py`), in the manner of a layout."""
    value = node.meta.get("val")
    shape = list(value.shape) if isinstance(value, torch.Tensor) else []
    divided: dict[int, list[str]] = {}
    rest: dict[str, list[str]] = {}
    for axis, found in types.items():
        if found.letter == VARYING and len(found.dims) == 1:
            divided.setdefault(min(found.dims), []).append(axis)
        else:
            rest.setdefault(found.letter, []).append(axis)
    dims = [f"{n}@{_joined(divided[d])}" if d in divided else str(n) for d, n in enumerate(shape)]
    return " ".join([f"[{', '.join(dims)}]", *(f"{t}({','.join(on)})" for t, on in rest.items())])


def _joined(axes: list[str]) -> str:
    return axes[0] if len(axes) == 1 else f"({','.join(axes)})"


def _short(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    match = re.fullmatch(r"([a-z]+)(\d+)", name)
    return f"{_DTYPES.get(match[1], match[1])}{match[2]}" if match else name


def stages_table(stages: Iterable[Stage]) -> str:
    """Each pass: its name, its time, and the nodes of the whole program before and after it."""
    rows = [[s.name, f"{1000 * s.seconds:.0f} ms", str(s.before), str(s.after), f"{s.after - s.before:+d}"] for s in stages]
    return table(["stage", "time", "before", "after", "nodes"], rows, right=(1, 2, 3, 4))
