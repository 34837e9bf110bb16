"""What a pass is, and what runs passes: contracts are checked before anything runs, every stage is kept."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from foldcc.errors import FoldError, require
from foldcc.ir.plan import Plan
from foldcc.ir.program import Program


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A rewrite of a Program. A subclass sets its contract and defines `run`.

    Attributes:
        requires, provides: properties of the program before and after.
        in_place: the pass rewrites the graphs that it is given, so it is given copies; False if it builds new ones.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    in_place: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def run(self, program: Program) -> Program:
        raise NotImplementedError(f"{type(self).__name__} defines no run")

    def warned(self, program: Program) -> Iterator[Warning]:
        """What there is to be warned of in a program that the pass made, whether now or when it was written to disk."""
        yield from ()


@dataclass(frozen=True, repr=False)
class Stage:
    """A program after a pass.

    Attributes:
        name: of the pass.
        seconds: that the pass took.
        before, after: nodes of the whole program, repeated blocks counted as often as they are called.
        by: the pass; None for what was captured.
    """

    name: str
    seconds: float
    before: int
    after: int
    program: Program
    by: Pass | None = None

    @property
    def emitted(self) -> bool:
        """Whether kernels stand in the place of operators."""
        return "emitted" in self.program.properties

    def __str__(self) -> str:
        from foldcc.ir.text import stage_text

        return stage_text(self)

    def __repr__(self) -> str:
        return f"<stage {self.name} of {self.program.name}: {self.before} -> {self.after} nodes; print it to read it>"

    def block(self, name: str) -> str:
        """One block alone, as text, in each direction that it has; `main` is the graph that calls the blocks.

        Raises:
            FoldError: the program has no such block.
        """
        from foldcc.ir.text import block_text

        return block_text(self, name)


class Stages(Sequence[Stage]):
    """The stages of a compilation, by position or by name; printing them gives a table.

    Attributes:
        told: whether they were read from disk, or are kept there, and where; empty if that was not asked for.
    """

    def __init__(self, stages: Sequence[Stage], told: str = ""):
        self._stages, self.told = tuple(stages), told

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            for stage in self._stages:
                if stage.name == key:
                    return stage
            raise FoldError(f"There is no stage {key!r}.", valid=", ".join(s.name for s in self._stages))
        return self._stages[key]

    def __len__(self) -> int:
        return len(self._stages)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._stages)

    @property
    def lowered(self) -> Stages:
        """The stages whose nodes are operators; a stage after them has kernels in their place."""
        return Stages([s for s in self if not s.emitted], self.told)

    def passes(self, *, after: str) -> list[Pass]:
        """The passes that ran after a stage."""
        first = [s.name for s in self].index(self[after].name)
        return [s.by for s in self._stages[first + 1 :] if s.by is not None]

    def again(self, plan: Plan, *, check: Callable[[Program], None]) -> Stages:
        """The same passes over what was captured, with other choices."""
        captured = self[0]
        return run_passes(
            replace(captured.program, plan=plan), [s.by for s in self if s.by], seconds=captured.seconds, check=check
        )

    def diff(self, first: str, second: str) -> str:
        """The lines that differ between two stages, as a unified diff."""
        from foldcc.ir.text import stage_diff

        return stage_diff(self[first], self[second])

    def __repr__(self) -> str:
        return f"<{len(self)} stages: {', '.join(s.name for s in self)}>"

    def __str__(self) -> str:
        from foldcc.ir.text import stages_table

        return "\n".join([stages_table(self), *([self.told] if self.told else [])])


def check_contracts(passes: Sequence[Pass], properties: frozenset[str]) -> None:
    """Raises if a pass would run before what it requires is provided."""
    for p in passes:
        require("A pass", p, Pass, "an instance of a subclass of foldcc.passes.Pass")
        missing = p.requires - properties
        if missing:
            raise FoldError(
                f"Pass {p.name} requires {', '.join(sorted(missing))}, which no earlier pass provides.",
                pipeline=" -> ".join(q.name for q in passes),
            )
        properties = properties | p.provides


def warn_of(p: Pass, program: Program) -> None:
    """Says what there is to be warned of in a program that a pass made."""
    for warning in p.warned(program):
        warnings.warn(warning, stacklevel=3)


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    seconds: float = 0.0,
    check: Callable[[Program], None] = lambda program: None,
    progress: Callable[[str], None] = lambda name: None,
) -> Stages:
    """Runs the passes in order on a captured program. Every stage keeps its own graphs.

    Args:
        seconds: what capturing the program took.
        check: examines the program after each pass.
        progress: is told each pass's name before it runs.
    """
    check_contracts(passes, program.properties)
    stages = [Stage("capture", seconds, 0, program.node_count(), program)]
    for p in passes:
        progress(p.name)
        start = time.perf_counter()
        result = p.run(program.copied() if p.in_place else program).with_property(*p.provides)
        check(result)
        warn_of(p, result)
        before, after = program.node_count(), result.node_count()
        stages.append(Stage(p.name, time.perf_counter() - start, before, after, result, p))
        program = result
    return Stages(stages)
