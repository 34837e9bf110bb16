"""A stage as text: one line for each value, with its layout, what computes it, and where that came from.

    program MixtralForCausalLM · stage dispatch · dp=2,tp=2|ep=4 · 12 ms
    factors batch=8 seq=16 hidden=64
    holds annotated, captured, dispatched, outlined, sharded
    wanted 0 of 0,1                                                    # of two outputs with gradients, the first is given one
    updates b_count=2                                                  # the third is the new value of a buffer

    block1 × 56
      # model.layers.0.mlp.experts                                     modeling_mixtral.py:118
      %x     : f32[tokens@ep, hidden]           = cross_fold(%y)       # free: same ranks, same order
      %rows  : f32[u7, hidden] V(ep)            = all_to_all_v(%x)     16.00 KiB
      return [%rows]

What stands between the brackets of a type are factors and axes where the layout is known. Where types were inferred, as in
`f32[2, 8@tp, 32] P(dp)`, it is the sizes on one rank, one of them divided over tp, and terms of a sum over dp; else it is the
sizes, as in `f32[4x16x32]`. `size u7` is a number. The text says everything of a program that does not follow from it, and
`foldcc/ir/parse.py` reads it back.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

import torch
from torch import fx

from foldcc.errors import FoldError
from foldcc.ir.joint import returns
from foldcc.ir.names import atom, called
from foldcc.ir.pipeline import Stage
from foldcc.ir.program import Program, Slot
from foldcc.ir.sizes import Sizes, communicates, human
from foldcc.ir.walk import BACKWARD, FORWARD, Part, module_of, parts
from foldcc.layout import VARYING, Layout
from foldcc.ops import record
from foldcc.ops.layout import cross_fold, reshard
from foldcc.tables import table

_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u"}
_WIDEST = (52, 64, 72)  # columns: name, type, operation
_RETURN = 120  # columns of a line that returns
_WORD = re.compile(r"[^\s\[\](){}=:%'\",]+(,[^\s\[\](){}=:%'\",]+)*")
GRADED = ("parameter", "tap")  # the kinds of slots that have a gradient unless it is said that they have none


def stage_text(stage: Stage) -> str:
    """The program after a pass, as text."""
    program = stage.program
    lines = [
        f"program {program.name} · stage {stage.name} · {program.mesh} · {1000 * stage.seconds:.0f} ms",
        " ".join(["factors", *(f"{f.name}={n}" for f, n in program.sizes.items())]),
        f"holds {', '.join(sorted(program.properties))}",
    ]
    if program.plan.zero:
        lines.append(f"zero {program.plan.zero}")
    if program.plan.ahead:
        lines.append(f"ahead {program.plan.ahead}")
    if program.plan.precision is not None:
        lines.append(f"precision {program.plan.precision}")
    if program.updates:
        lines.append(" ".join(["updates", *(f"{name}={i}" for i, name in program.updates.items())]))
    if program.wanted is not None:
        lines.append(f"wanted {_places(program.wanted)} of {_places([n.meta.get('grad', True) for n in program.outputs])}")
    for _, _, text in sections(program):
        lines += ["", *text]
    return "\n".join(lines)


def block_text(stage: Stage, name: str) -> str:
    """One block of a stage, forward and backward.

    Raises:
        FoldError: there is no such block.
    """
    every = list(sections(stage.program))
    found = ["\n".join(text) for block, _, text in every if block == name]
    if not found:
        raise FoldError(f"Stage {stage.name} has no block {name!r}.", valid=", ".join(dict.fromkeys(b for b, _, _ in every)))
    return "\n\n".join(found)


def sections(program: Program) -> Iterator[tuple[str, str, list[str]]]:
    """The name, the direction and the text of each block in each direction that there is, then of the main graphs."""
    sizes: dict[str, Sizes] = {}
    both = program.backward is not None
    for part in parts(program):
        if part.name != "main":
            known = sizes.setdefault(part.block, Sizes(program.mesh))
            direction = part.direction if both else ""
            head = " ".join([part.name, *([direction] if both else []), "×", str(part.calls)])
            yield part.name, direction, [head, *_lines(program, part, known)]
    for direction, main in zip((FORWARD, BACKWARD), program.mains, strict=False):
        lines = _lines(program, Part("main", direction, 1, main), Sizes(program.mesh))
        yield "main", direction if both else "", [f"main {direction}" if both else "main", *lines]


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
            for word, told in _leaving(program, part, node):
                rows += wrap(f"{word} {told}", _RETURN, initial_indent="  ", subsequent_indent=" " * (3 + len(word)))
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


def _leaving(program: Program, part: Part, output: fx.Node) -> Iterator[tuple[str, str]]:
    """What a graph returns, with the layouts that do not follow from its values; what it keeps; reductions that were joined."""
    told = iter(output.meta["returns"] if "joint" in output.meta else (output.meta.get("returns", ()),))
    known = iter(returns(program, part.name, part.direction, part.graph) if part.name != "main" else ())

    def leaves(several: Sequence[Any]) -> str:
        layouts = [layout for _, layout in next(told, ())] or [None] * len(several)
        follow = [layout for _, layout in next(known, ())] or [None] * len(several)
        own = [None if layout == other else layout for layout, other in zip(layouts, follow, strict=True)]
        types = [f" : {short(x.meta['val'].dtype)}{o}" if o and x else "" for x, o in zip(several, own, strict=True)]
        return f"[{', '.join(_argument(x) + of for x, of in zip(several, types, strict=True))}]"

    leaving: Any = output.args[0]
    nested = bool(leaving) and isinstance(leaving[0], tuple)
    yield "return", f"[{', '.join(map(leaves, leaving))}]" if nested else leaves(leaving)
    if "joint" in output.meta and part.name in program.plan.kept:
        yield "keep", f"[{', '.join(f'%{name}' for name in program.plan.kept[part.name])}]"
    if joined := program.plan.together.get(part.name if part.direction == BACKWARD else f"{part.name}_{FORWARD}"):
        yield "joined", f"[{', '.join(map(_argument, joined))}]"


def _places(there: Sequence[bool]) -> str:
    """`0,2`: the positions of what is there; `none`."""
    return ",".join(str(i) for i, found in enumerate(there) if found) or "none"


def _operation(program: Program, part: Part, node: fx.Node) -> str:
    if node.op == "placeholder":
        if "result" in node.meta:
            return f"gradient of result {node.meta['result']}"
        if part.name != "main" or part.direction != FORWARD:
            return "argument"
        return _slot(program, program.slot(node.name))
    args = node.args[:1] if node.target in (reshard, cross_fold) and node.args[1:] == (node.meta["layout"],) else node.args
    given = [*map(_argument, args), *(f"{k}={_argument(v)}" for k, v in node.kwargs.items())]
    return f"{called(node)}({', '.join(given)})"


def _slot(program: Program, slot: Slot) -> str:
    """`parameter embed.weight, head.weight`, and what is not usual: that it is frozen, has a gradient, is of other samples."""
    names = ", ".join(n if re.fullmatch(r"[^\s,'\"][^\s,]*", n) else repr(n) for n in slot.names)
    rest = [] if slot.grad == (slot.kind in GRADED) else ["gradient" if slot.grad else "frozen"]
    if slot.names[0] in program.batch_dims:
        rest.append(f"samples {program.batch_dims[slot.names[0]]}")
    return " · ".join([f"{slot.kind} {names}", *rest])


def _argument(x: Any) -> str:
    """An argument of an operator. A string that could be read as anything else is quoted."""
    if isinstance(x, fx.Node):
        return f"%{x.name}"
    if isinstance(x, (tuple, list)):
        return f"[{', '.join(map(_argument, x))}]"
    if isinstance(x, str):
        return x if _WORD.fullmatch(x) and isinstance(atom(x), str) else repr(x)
    return str(x).removeprefix("torch.")


def _note(node: fx.Node, sizes: Sizes | None) -> str:
    notes = []
    if node.target is cross_fold:
        notes.append("# free: same ranks, same order")
    if sizes is not None and communicates(node):
        count, expected = sizes.sent(node)
        notes.append(human(count) + (" expected" if expected else ""))
    known = record(node.target)
    if known is not None and known.types.endswith(VARYING) and node.meta.get("used_up"):
        notes.append(f"# {','.join(sorted(node.meta['used_up']))} may be used up")
    return "  ".join([*notes, *(["# again"] if node.meta.get("again") else [])])


def _type(node: fx.Node) -> str:
    """dtype[layout], dtype[factors] or dtype[sizes], whichever is known; empty for what is no tensor."""
    value, layout = node.meta.get("val"), node.meta.get("layout")
    dtype = value.dtype if isinstance(value, torch.Tensor) else node.meta.get("dtype")
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return f"size {value}"
    if dtype is None or isinstance(value, (tuple, list)):
        return ""
    of = short(dtype)
    if isinstance(layout, Layout):
        return f"{of}{layout}"
    if isinstance(value, torch.Tensor):
        if "types" in node.meta:
            return f"{of}{type_text(node, node.meta['types'])}"
        if "dims" in node.meta:
            return f"{of}{Layout(node.meta['dims'], {})}"
        return f"{of}[{'x'.join(map(str, value.shape))}]"
    return of


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


def short(dtype: torch.dtype) -> str:
    """`f32` for `torch.float32`."""
    name = str(dtype).removeprefix("torch.")
    match = re.fullmatch(r"([a-z]+)(\d+)", name)
    return f"{_DTYPES.get(match[1], match[1])}{match[2]}" if match else name


def stages_table(stages: Iterable[Stage]) -> str:
    """Each pass: its name, its time, and the nodes of the whole program before and after it."""
    rows = [[s.name, f"{1000 * s.seconds:.0f} ms", str(s.before), str(s.after), f"{s.after - s.before:+d}"] for s in stages]
    return table(["stage", "time", "before", "after", "nodes"], rows, right=(1, 2, 3, 4))
