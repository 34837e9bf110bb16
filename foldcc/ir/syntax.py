"""The text of a stage as lines and expressions, before it is known what they mean (`foldcc/ir/parse.py` makes a program of it).

program name · stage bucket · dp=2,tp=2 · 12 ms        the mesh, and below it the factors, what holds, what is wanted
block1 backward × 2                                    a heading, over the values of one graph
  # model.layers.0.mlp  modeling.py:118                where the values below it come from
  %y : f32[8, 4@tp] P(dp) = aten.mul(%x, 2)  32 B      a value: its type and what computes it, then a note
  return [%y]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from textwrap import dedent
from typing import Any

import sympy

from foldcc.errors import FoldError
from foldcc.ir.names import atom
from foldcc.layout import INVARIANT, VARYING, Layout
from foldcc.mesh import FoldedMesh
from foldcc.precision import Precision

_TYPE = r"size (?P<size>[^\s,]+)|(?P<dtype>[a-z]+\d*)(?P<layout>\[[^\]]*\](?: (?:[RPIV0?]|V\|P)\([^)]*\))*)?"
_TYPE += r"(?: on (?P<device>[\w:]+))?"
_VALUE = re.compile(rf"%(?P<name>\w+)\s*(?::\s*(?P<type>{_TYPE})\s*)?= (?P<operation>.*)")
SLOT = re.compile(r"(argument|parameter|buffer|constant|input|key|tap|gradient of result \d+)\b(?!\()")
_HEADING = re.compile(r"(?P<name>\w+)(?: (?P<direction>forward|backward))?(?: × \d+)?")
_TYPED = re.compile(r"\[((?:[u\d][u\d*+ ]*(?:@[^\]\s]+)?(?:, )?)*)\]((?: \S+\([^)]*\))*)")
_TOKEN = re.compile(
    r"%(?P<value>\w+)|(?P<call>[\w.]+)\(|(?P<key>\w+)=|(?P<string>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")|(?P<open>\[)"
)
_WORD = re.compile(r"(?:[^\s\[\](),]|,(?=\S))+")


@dataclass(frozen=True)
class Value:
    """A value that an expression reads; with a type where it is declared there."""

    name: str
    type: str | None = None


@dataclass(frozen=True)
class Call:
    """An operator with its arguments."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One value of a printed stage.

    Attributes:
        block: the heading that it stands under, without the number of calls, such as `block1` or `block1 backward`.
        name: of the value.
        dtype: short, such as `f32`; empty for what is no tensor.
        layout: None where the text has none, or has sizes.
        sizes: the sizes on one rank, None where the text has a layout; one that is data is a name.
        types: letters by axis, where they were inferred, V of a size that is divided.
        operation: what computes it, as printed, with the note behind it.
        size: of a size, the number or the name that it has.
        number, text: the line itself.
        where, source: the module and the source line that stand above it.
        told: the type, as written.
    """

    block: str
    name: str
    dtype: str
    layout: Layout | None
    sizes: tuple[int | str, ...] | None
    types: dict[str, str] | None
    operation: str
    size: str = ""
    device: str = ""
    number: int = 0
    text: str = ""
    where: str = ""
    source: str = ""
    told: str = ""


@dataclass(eq=False)
class Section:
    """The text of one graph: its values, and the last lines of it by their first word."""

    name: str
    direction: str
    number: int
    lines: list[Line] = field(default_factory=list)
    leaving: dict[str, tuple[int, str]] = field(default_factory=dict)


@dataclass
class Text:
    """A stage as it is written.

    Attributes:
        holds, wanted: None where the text does not say.
        updates: by the position of an output, the buffer whose new value it is.
    """

    mesh: FoldedMesh
    name: str = "program"
    stage: str = ""
    seconds: float = 0.0
    factors: dict[sympy.Symbol, int] = field(default_factory=dict)
    holds: frozenset[str] | None = None
    zero: int = 0
    ahead: int = 0
    updates: dict[int, str] = field(default_factory=dict)
    precision: Precision | None = None
    wanted: tuple[str, str] | None = None
    sections: list[Section] = field(default_factory=list)

    @property
    def ranks(self) -> dict[str, int]:
        return {a: self.mesh.size(a) for view in ("attention", "moe") for a in self.mesh.axes(view)}


def bad(number: int, line: str, why: str, valid: str | None = None) -> FoldError:
    """A line of a text that is no program."""
    return FoldError(f"Line {number} of the program {why}.", line=line.strip(), valid=valid)


def parse(text: str) -> list[Line]:
    """The values of a printed stage, in order.

    Raises:
        FoldError: as `read`.
    """
    return [line for section in read(text).sections for line in section.lines]


def read(text: str, mesh: str | None = None, holds: frozenset[str] | None = None, block: str = "main") -> Text:
    """The text of a stage, line by line.

    Args:
        mesh, holds: of a text without the lines that name them.
        block: the heading of values that stand under none.

    Raises:
        FoldError: the text is no stage; with the number of the line, the line and what stands in its place.
    """
    lines = list(_logical(dedent(text)))
    if mesh is None and not (lines and lines[0][1].startswith("program ")):
        raise bad(
            *(lines[0] if lines else (1, "")), "is not the first line of a stage", "program name · stage name · dp=2,tp=2"
        )
    found = Text(FoldedMesh.parse(mesh or "dp=1"), holds=holds)
    extend(found, lines, block)
    return found


def extend(found: Text, lines: Iterable[tuple[int, str]], block: str = "main") -> None:
    """Reads further lines, with their numbers, into a text."""
    name, _, direction = block.partition(" ")
    section, where, source = Section(name, direction, 0), "", ""
    for number, line in lines:
        word, _, rest = line.partition(" ")
        if word == "#":
            told = rest.split()
            if len(told) <= 2:
                where, source = [*told, "", ""][:2]
        elif line.startswith("%") or word in ("return", "keep", "joined"):
            if section not in found.sections:
                found.sections.append(section)
            if word in ("return", "keep", "joined"):
                section.leaving[word] = (number, rest)
            else:
                section.lines.append(line_of(found, section, number, line, "" if where == found.name else where, source))
        elif word in ("program", "factors", "holds", "zero", "ahead", "precision", "updates", "wanted") and not found.sections:
            _head(found, number, line, word, rest)
        elif heading := _HEADING.fullmatch(line):
            section, where, source = Section(heading["name"], heading["direction"] or "", number), "", ""
            found.sections.append(section)
        else:
            raise bad(
                number,
                line,
                "says nothing of a program",
                "%name : type = operation(…), return [%name, …], or the name of a block",
            )


def _logical(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; one whose brackets are open goes on in the next."""
    pending, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped:
            continue
        pending, first = (f"{pending} {stripped}", first) if pending else (stripped, number)
        bare = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "", pending) if not pending.startswith("#") else ""
        if bare.count("[") <= bare.count("]") and bare.count("(") <= bare.count(")"):
            yield first, pending
            pending = ""
    if pending:
        raise bad(first, pending, "opens a bracket that is not closed")


def _head(found: Text, number: int, line: str, word: str, rest: str) -> None:
    if word == "program":
        parts = rest.split(" · ")
        meshes = [p for p in parts[1:] if "=" in p]
        if len(meshes) != 1:
            raise bad(number, line, "names no mesh", "program name · stage name · dp=2,tp=2")
        found.name, found.mesh = parts[0], FoldedMesh.parse(meshes[0])
        found.stage = next((p.removeprefix("stage ") for p in parts if p.startswith("stage ")), "")
        found.seconds = next((float(p.removesuffix(" ms")) / 1000 for p in parts if p.endswith(" ms")), 0.0)
    elif word == "factors":
        for pair in rest.split():
            name, _, size = pair.partition("=")
            if not size.isdigit():
                raise bad(number, line, f"has no size for the factor {name}", "factors batch=8 seq=16")
            found.factors[sympy.Symbol(name, integer=True, positive=True)] = int(size)
    elif word == "holds":
        found.holds = frozenset(rest.split(", "))
    elif word == "zero":
        if rest not in ("1", "2", "3"):
            raise bad(number, line, "is no stage of ZeRO", "zero 3")
        found.zero = int(rest)
    elif word == "ahead":
        if not rest.isdigit():
            raise bad(number, line, "is no number of blocks", "ahead 1")
        found.ahead = int(rest)
    elif word == "precision":
        found.precision = Precision.parse(rest)
    elif word == "updates":
        pairs = [pair.rpartition("=") for pair in rest.split()]
        if not pairs or not all(place.isdigit() for _, _, place in pairs):
            raise bad(number, line, "does not say which outputs are new values of buffers", "updates b_count=1")
        found.updates = {int(place): name for name, _, place in pairs}
    else:
        wanted = re.fullmatch(r"(none|[\d,]+) of (none|[\d,]+)", rest)
        if wanted is None:
            raise bad(number, line, "does not say which outputs are given gradients", "wanted 0 of 0,1")
        found.wanted = (wanted[1], wanted[2])


def line_of(found: Text, section: Section, number: int, line: str, where: str = "", source: str = "") -> Line:
    """A line that says what a value is."""
    match = _VALUE.fullmatch(line)
    if match is None:
        raise bad(number, line, "is no value", "%name : f32[batch@dp, hidden] R(tp) = operation(%x, 2)")
    block = f"{section.name} {section.direction}".strip()
    slot = SLOT.match(match["operation"])
    enters = block in ("main", "main forward") or (
        slot is not None and (section.direction != "backward" or slot[0] != "argument")
    )
    told = typed(found, number, line, match["type"], enters) if match["type"] else {}
    fields = {"dtype": "", "layout": None, "sizes": None, "types": None} | told
    return Line(
        block, match["name"], operation=match["operation"].rstrip(), number=number, text=line, where=where, source=source,
        told=match["type"] or "", **fields,
    )  # fmt: skip


def typed(found: Text, number: int, line: str, text: str, enters: bool = False) -> dict[str, Any]:
    """The parts of a type: its dtype, and its layout or its sizes and types.

    Args:
        enters: the value enters or leaves a block, so that it has a layout even where types are inferred. Sizes on one rank
            are read as one then, with a factor of its own for each size.
    """
    match = re.fullmatch(_TYPE, text)
    if match is None:
        raise bad(
            number, line, f"has {text!r} for a type", "f32[batch@dp, hidden] R(tp), f32[8, 4@tp] P(dp), f32[8x4] or size u0"
        )
    if match["size"]:
        return {"size": match["size"]}
    told = match["layout"]
    unknown = {a for axes in re.findall(r"@\(?([\w,]+)|[RPIV0?]\(([\w,]+)\)", told or "") for x in axes for a in x.split(",")}
    if missing := unknown - {""} - found.ranks.keys():
        raise bad(number, line, f"names the axis {min(missing)}", ", ".join(found.ranks))
    parts: dict[str, Any] = {"dtype": match["dtype"], "device": match["device"] or ""}
    if told is None:
        return parts
    holds = found.holds or frozenset()
    inferred = bool(holds & {"joint", "differentiated"})
    plain = bool(re.fullmatch(r"\[\d+\]|\[[u\d*+ ]+(x[u\d*+ ]+)+\]", told))
    if re.fullmatch(r"\[(1|u\d+)?\]", told):  # a layout says more where there are several ranks
        plain = not enters and "sharded" in holds and found.mesh.world_size > 1
    if "annotated" not in holds or (plain and not inferred):
        return parts | {"sizes": tuple(_size(n) for n in told[1:-1].split("x") if n)}
    if inferred and not enters and " I(" not in told and (match := _TYPED.fullmatch(told)):
        dims = [dim.partition("@") for dim in re.split(r", (?![^(]*\))", match[1])] if match[1] else []
        types = {axis: VARYING for _, _, over in dims for axis in over.strip("()").split(",") if over}
        for letter, axes in re.findall(r" (\S+)\(([^)]*)\)", match[2]):
            types |= dict.fromkeys(axes.split(","), letter)
        return parts | {"sizes": tuple(_size(dim) for dim, _, _ in dims), "types": types}
    try:
        layout = Layout.parse(_factors(found, told), found.factors, found.ranks)
    except ValueError:
        raise bad(number, line, f"has {told!r} for a layout", "[batch@dp, (heads width)@tp] R(cp)") from None
    if "sharded" in holds:  # a text in short leaves out the axes on which nothing is divided
        ranks = {a: n for a, n in found.ranks.items() if n > 1 and found.mesh.view(a) == layout.view}
        layout = replace(layout, states={a: layout.states.get(a, INVARIANT) for a in ranks}, ranks=ranks)
    return parts | {"layout": layout}


def _factors(found: Text, told: str) -> str:
    """A layout in which each size on one rank, `4@tp`, is a factor, `n8@tp`."""

    def named(match: re.Match[str]) -> str:
        ranks = prod(found.ranks[a] for a in (match[2] or "").strip("@()").split(",") if a)
        size = int(match[1]) * ranks
        found.factors.setdefault(sympy.Symbol(f"n{size}", integer=True, positive=True), size)
        return f"n{size}{match[2] or ''}"

    return re.sub(r"(?<=[\[ (])([2-9]|[1-9]\d+)(@\([^)]*\)|@\w+)?(?=[,\]) ])", named, told)


def _size(text: str) -> int | str:
    return int(text) if text.isdigit() else text


class Expression:
    """Reads what stands behind `=` or `return`: an expression, and what is left behind it."""

    def __init__(self, text: str, number: int, line: str):
        self.text, self.number, self.line, self.at = text, number, line, 0

    @property
    def rest(self) -> str:
        return self.text[self.at :]

    def read(self) -> Any:
        """A Value, a Call, a list, or the number, string, dtype or device that is written."""
        match = _TOKEN.match(self.text, self.at)
        if match is None or match["key"]:
            return self._atom()
        self.at = match.end()
        if match["value"]:
            declared = re.compile(rf"\s*:\s*(?P<type>{_TYPE.replace('P<', 'P<_')})").match(self.text, self.at)
            self.at = declared.end() if declared else self.at
            return Value(match["value"], declared["type"] if declared else None)
        if match["string"]:
            return match["string"][1:-1].encode().decode("unicode_escape")
        given = self._several("]" if match["open"] else ")", named=bool(match["call"]))
        args = tuple(x for key, x in given if not key)
        return list(args) if match["open"] else Call(match["call"], args, {key: x for key, x in given if key})

    def _several(self, end: str, named: bool) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        while not self.rest.startswith(end):
            key = _TOKEN.match(self.text, self.at) if named else None
            self.at = key.end() if key and key["key"] else self.at
            found.append((key["key"] if key and key["key"] else "", self.read()))
            if self.rest.startswith(", "):
                self.at += 2
            elif not self.rest.startswith(end):
                raise bad(self.number, self.line, f"goes on with {self.rest!r}", f"', ' or {end!r}")
        self.at += 1
        return found

    def _atom(self) -> Any:
        match = _WORD.match(self.text, self.at)
        if match is None:
            raise bad(self.number, self.line, f"goes on with {self.rest!r}", "a value, a number, a word, a list or a call")
        self.at = match.end()
        return atom(match[0])
