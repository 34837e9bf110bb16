"""Plan: every choice that a compilation makes, as data that prints, parses, and is made again.

    plan MixtralForCausalLM · dp=2,tp=2|ep=4
    factors batch=8 seq=16 hidden=64 vocab=128

    parameters
      lm_head.weight    [vocab@tp, hidden] I(dp)
    stored
      lm_head.weight    [vocab@tp, hidden@dp]
    values
      getitem           [batch@dp, seq@tp, hidden]
    block1
      linear            [batch@dp, seq, hidden] R(tp), [vocab@tp, hidden] R(dp) -> [batch@dp, seq, vocab@tp]
    kept
      block1            rsqrt mul_3
    together
      block1            all_reduce_1 all_reduce_2, all_reduce_5 all_reduce_6
    stages
      lm_head.weight    1

What a plan says is done, axis by axis; what it does not say is chosen at the least cost. So the plan of a compilation stands
for all of it, and a plan of two lines decides two things.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from foldcc.errors import FoldError, require
from foldcc.layout import Layout, split_outside
from foldcc.mesh import FoldedMesh
from foldcc.precision import Precision

Names = tuple[str, ...]
_HEAD = re.compile(
    r"plan(?: (?P<model>[^\s=]+) ·)? (?P<mesh>\S+)(?: · zero=(?P<zero>\S+))?(?: · ahead=(?P<ahead>\d+))?"
    r"(?: · attention=(?P<attention>\S+))?(?: · order=(?P<order>zigzag|natural))?(?: · (?P<precision>compute=.+))?"
)
_SECTIONS = re.compile(r"parameters|stored|values|kept|together|waits|stages|(block|unshard)\d+")
_ABSENT = "-"
_PARTS = ("parameters", "stored", "values", "blocks", "kept", "together", "waits", "stages")
_OF_PARAMETERS = ("parameters", "stored", "stages")


class UnfitPlan(FoldError):
    """A plan says something that the program has no place for."""

    __module__ = "foldcc"


@dataclass(frozen=True)
class OpLayouts:
    """How one operator runs: the layout that it is given each operand in, and leaves each result in.

    None for an operand that is no tensor, and for a result that nothing reads. By axis, the way in which it is divided, where
    there are several.
    """

    operands: tuple[Layout | None, ...]
    results: tuple[Layout | None, ...]
    ways: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        left, right = (", ".join(_ABSENT if x is None else str(x) for x in side) for side in (self.operands, self.results))
        ways = "".join(f" {axis}={way}" for axis, way in self.ways.items())
        return f"{left} -> {right}{' by' if ways else ''}{ways}".strip()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The choices of one program.

    Attributes:
        mesh: as text; empty for a plan of any.
        model: the name of its class; empty for a plan of any.
        zero: how far parameters that data parallelism replicates are divided instead: 0 not at all, 1 and 2 where they are
            stored, so that their gradients and the optimizer's state are divided too, 3 also between forward and backward.
        ahead: how many blocks before the one that uses them parameters are gathered; with 0 nothing is under way while a block
            computes.
        attention: the way in which `cp` divides attention, where `blocks` does not say it; empty for the cheapest of each.
        order: "zigzag" if a rank of `cp` has a block from each end of what attention sees, "natural" if no value is so; empty
            for what costs less.
        precision: the dtypes in which it is computed and gradients are added; None for those that the model has.
        parameters: the layout in which each parameter is used, by its first name.
        stored: the layout in which a rank holds it, where that is another one.
        values: the layout of what else enters the main graph or passes between blocks, by its name in the main graph.
        blocks: by block and node, how an operator runs.
        kept: by block, the values that its backward pass reads of the forward pass.
        together: by block of the backward pass, the reductions that travel together.
        waits: by block of the backward pass, what the gradients of its parameters are made of, where they are made later.
        stages: by the first name of each parameter, the pipeline stages that use it; empty where there is one stage.
    """

    mesh: str = ""
    model: str = ""
    zero: int = 0
    ahead: int = 0
    attention: str = ""
    order: str = ""
    precision: Precision | None = None
    parameters: Mapping[str, Layout] = field(default_factory=dict)
    stored: Mapping[str, Layout] = field(default_factory=dict)
    values: Mapping[str, Layout] = field(default_factory=dict)
    blocks: Mapping[str, Mapping[str, OpLayouts]] = field(default_factory=dict)
    kept: Mapping[str, Names] = field(default_factory=dict)
    together: Mapping[str, tuple[Names, ...]] = field(default_factory=dict)
    waits: Mapping[str, Names] = field(default_factory=dict)
    stages: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = {f: n for layout in self._layouts() for f, n in layout.sizes.items()}
        lines = [" · ".join([f"plan {self.model}", self.mesh] if self.model else [f"plan {self.mesh}"])]
        lines[0] += f" · zero={self.zero}" if self.zero else ""
        lines[0] += f" · ahead={self.ahead}" if self.ahead else ""
        lines[0] += f" · attention={self.attention}" if self.attention else ""
        lines[0] += f" · order={self.order}" if self.order else ""
        lines[0] += f" · {self.precision}" if self.precision else ""
        lines.append(" ".join(["factors", *(f"{f.name}={n}" for f, n in sizes.items())]))
        kept = {block: " ".join(names) or _ABSENT for block, names in self.kept.items()}
        waits = {block: " ".join(names) or _ABSENT for block, names in self.waits.items()}
        together = {block: ", ".join(" ".join(names) for names in groups) or _ABSENT for block, groups in self.together.items()}
        held = {"parameters": self.parameters, "stored": self.stored, "values": self.values}
        stages = {name: " ".join(map(str, places)) for name, places in self.stages.items()}
        sections = {**held, **self.blocks, "kept": kept, "together": together, "waits": waits, "stages": stages}
        for head, entries in sections.items():
            if entries:
                width = max(map(len, entries))
                lines += ["", head, *(f"  {name:<{width}}  {entry}".rstrip() for name, entry in entries.items())]
        return "\n".join(lines)

    def _layouts(self) -> Iterator[Layout]:
        yield from (*self.parameters.values(), *self.stored.values(), *self.values.values())
        for block in self.blocks.values():
            for op in block.values():
                yield from (x for x in (*op.operands, *op.results) if x is not None)

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan that prints as `text`; the line of factors may be left out.

        Raises:
            FoldError: the text is no plan, and in which line.
        """
        require("A plan", text, str, "text, as str(model.plan) is")
        lines = list(enumerate(text.strip().splitlines(), start=1))
        head = _HEAD.fullmatch(lines[0][1].strip()) if lines else None
        if head is None:
            raise FoldError(
                "A plan begins with its mesh.",
                valid=f"plan <name of the model> · <mesh>, or plan <mesh>, and · zero=1 or · {Precision()} behind it",
            )
        if head["zero"] not in (None, "0", "1", "2", "3"):
            raise FoldError(f"zero={head['zero']} is no stage of ZeRO.", valid="0, 1, 2, 3", line=lines[0][1])
        mesh = FoldedMesh.parse(head["mesh"])
        reader = _Reader(mesh)
        for number, line in lines[1:]:
            try:
                reader.read(line)
            except ValueError as error:
                raise FoldError(f"Line {number} of a plan is not understood: {error}", line=line.strip()) from None
        precision = Precision.parse(head["precision"]) if head["precision"] else None
        return cls(
            mesh=str(mesh),
            model=head["model"] or "",
            zero=int(head["zero"] or 0),
            ahead=int(head["ahead"] or 0),
            attention=head["attention"] or "",
            order=head["order"] or "",
            precision=precision,
            **reader.found,
        )

    def only_parameters(self) -> Plan:
        """What is said of parameters alone, which all programs of a model share."""
        return replace(self, values={}, blocks={}, kept={}, together={}, waits={})

    def with_parameters(self, other: Plan, names: Collection[str] | None = None) -> Plan:
        """This plan, with what another one says of parameters, or of those of these names."""
        parts: dict[str, Any] = {
            part: {**getattr(self, part), **{n: x for n, x in getattr(other, part).items() if names is None or n in names}}
            for part in _OF_PARAMETERS
        }
        return replace(self, **parts)

    def with_names(self, names: Mapping[str, str]) -> Plan:
        """The same plan, in which parameters have their first names.

        Args:
            names: the first name by every name of a parameter.
        """
        parts: dict[str, Any] = {part: {names.get(n, n): x for n, x in getattr(self, part).items()} for part in _OF_PARAMETERS}
        return replace(self, **parts)

    def without_sizes(self) -> Plan:
        """The same choices for a program of other sizes."""
        return self.parse("\n".join(line for line in str(self).splitlines() if not line.startswith("factors ")))

    def check_for(self, model: str, mesh: str) -> None:
        """That the plan is for this model on this mesh.

        Raises:
            UnfitPlan: it is for another one.
        """
        for what, mine, there in (("model", self.model, model), ("mesh", self.mesh, mesh)):
            if mine and mine != there:
                raise UnfitPlan(f"The plan is for the {what} {mine}, and the {what} is {there}.")

    def check_made(self, made: Plan) -> None:
        """That all that this plan says is in the plan of a program that was made with it.

        Raises:
            UnfitPlan: something is not.
        """
        for part in _PARTS:
            _check(part, getattr(self, part), getattr(made, part))


def _check(what: str, given: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """That a part of a plan is part of another one: names, and what is said of each."""
    for name, said in given.items():
        if name not in there:
            raise UnfitPlan(f"The plan says something of {name}, and the program has no such thing.", among=what)
        if isinstance(said, Mapping):
            _check(name, said, there[name])
        elif not _equal(said, there[name]):
            raise UnfitPlan(f"The plan's {name} is not what the program has.", among=what, plan=said, program=there[name])


def _equal(said: Any, there: Any) -> bool:
    """Whether an entry is as it was said, on the axes of which it was; factors may be called otherwise."""
    if isinstance(said, Layout):
        alike = isinstance(there, Layout) and len(said.dims) == len(there.dims)
        return alike and all(there.states.get(axis) == state for axis, state in said.states.items())
    if isinstance(said, OpLayouts):
        same = (len(said.operands), len(said.results)) == (len(there.operands), len(there.results))
        pairs = zip((*said.operands, *said.results), (*there.operands, *there.results), strict=False)
        return same and said.ways.items() <= there.ways.items() and all(x is None or _equal(x, y) for x, y in pairs)
    return bool(said == there)


def _names(text: str) -> Names:
    return tuple(name for name in text.split() if name != _ABSENT)


class _Reader:
    """Reads the lines of a plan, and holds what was found."""

    def __init__(self, mesh: FoldedMesh):
        self.axes = {a: mesh.size(a) for view in ("attention", "moe") for a in mesh.axes(view)}
        self.sizes: dict[sympy.Symbol, int] = {}
        self.section = ""
        self.found: dict[str, dict[str, Any]] = {}

    def read(self, line: str) -> None:
        if not line.strip():
            return
        if not line[0].isspace():
            self.section = line.strip()
            if not self.section.startswith("factors") and not _SECTIONS.fullmatch(self.section):
                raise ValueError("it begins no part of a plan; what stands in a part is indented.")
            if self.section.startswith("factors"):
                pairs = [pair.partition("=") for pair in self.section.split()[1:]]
                self.sizes = {sympy.Symbol(name, integer=True, positive=True): int(n) for name, _, n in pairs}
            return
        name, _, entry = line.strip().partition(" ")
        if self.section in ("parameters", "stored", "values"):
            self._say(self.section, name, self._layout(entry))
        elif self.section in ("kept", "waits"):
            self._say(self.section, name, _names(entry))
        elif self.section == "stages":
            self._say("stages", name, tuple(map(int, entry.split())))
        elif self.section == "together":
            self._say("together", name, tuple(filter(None, map(_names, entry.split(",")))))
        elif _SECTIONS.fullmatch(self.section):
            given, arrow, left = entry.partition("->")
            if not arrow:
                raise ValueError("what an operator is given, and what it leaves, have -> between them.")
            left, _, by = left.partition(" by ")
            ways = dict(part.split("=", 1) for part in by.split() if self.axes[part.split("=", 1)[0]] > 1)
            block = self.found.setdefault("blocks", {}).setdefault(self.section, {})
            if name in block:
                raise ValueError(f"it says {name} a second time.")
            block[name] = OpLayouts(self._several(given), self._several(left), ways)
        else:
            raise ValueError("it stands in no part of a plan.")

    def _say(self, part: str, name: str, entry: Any) -> None:
        if name in self.found.setdefault(part, {}):
            raise ValueError(f"it says {name} a second time.")
        self.found[part][name] = entry

    def _layout(self, text: str) -> Layout:
        layout = Layout.parse(text, self.sizes, self.axes)
        return replace(layout, states={a: s for a, s in layout.states.items() if self.axes[a] > 1})

    def _several(self, text: str) -> tuple[Layout | None, ...]:
        return tuple(None if part == _ABSENT else self._layout(part) for part in split_outside(text))
