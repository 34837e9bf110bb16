"""The programs that a folded module keeps: one for each kind of call, the least recently used is dropped."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from foldcc.call import Call, Key, Told, without_sizes
from foldcc.errors import FoldError
from foldcc.hooks import Watch, told
from foldcc.ir.program import told_outputs
from foldcc.passes import Stages
from foldcc.runtime.executable import Executable
from foldcc.varying import Shapes, Varied
from foldcc.verification import Proof
from foldcc.verification.origin import Origin

KEPT = 16  # programs of a module
_COPIES = 1.1  # FLOPs of all ranks over those of the model, above which it is said
_ADVICE = {
    "tensor": "A program is specialised to the dtypes of its inputs, and to their shapes where none is compiled for all.",
    "number": "A program is specialised to Python numbers: pass one that varies as a tensor without dimensions.",
    "flag": None,
}


@dataclass(frozen=True)
class Kept:
    """A program, and the calls that it is for.

    Attributes:
        told: the inputs, as a person reads them.
        free: the numbers that are inputs of the program.
        blind: the numbers that it is specialised to, and that the model does not look at.
        watches: the modules that hooks watch.
        origin: the module that it was captured from, and how it was called.
        proof: that was made when it was compiled, if one was.
        others: the programs of the same calls for the gradients of other outputs.
        shapes: of the inputs, over all ranks.
        resized: it was not compiled: another one was, for all calls that differ in sizes alone.
    """

    key: Key
    executable: Executable
    stages: Stages
    told: Mapping[str, Told]
    free: frozenset[str] = frozenset()
    blind: Mapping[str, Any] = field(default_factory=dict)
    watches: tuple[Watch, ...] = ()
    origin: Origin | None = None
    proof: Proof | None = None
    others: dict[tuple[bool, ...], Kept] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)
    resized: bool = False

    def values(self, call: Call, held: Mapping[str, Tensor], keys: Iterator[Tensor], device: torch.device) -> list[Any]:
        """The values of the program's slots in a call.

        Args:
            held: parameters and buffers by their first names; a parameter that is not there is on another pipeline stage.
        """
        program = self.executable.program
        inputs, updated = call.inputs(self.free, device), set(program.updates.values())
        found: list[Any] = []
        for slot, node in zip(program.slots, program.placeholders, strict=True):
            if slot.kind == "input":
                found.append(next(inputs))
            elif slot.kind == "constant":
                found.append(program.constants[slot.name])
            elif slot.kind == "key":
                found.append(next(keys))
            elif slot.kind == "tap":
                found.append(self.executable.zeros(node))
            else:
                value = held.get(slot.names[0])
                # What the backward pass reads is the value that was there in this forward pass.
                found.append(value.clone() if value is not None and slot.name in updated else value)
        return found

    def __str__(self) -> str:
        call = ", ".join(f"{name}{told}" for name, told in self.told.items())
        hooks = f", with hooks{told(self.watches)}" if self.watches else ""
        return f"{call}{hooks}{''.join(f'; for the gradients of {told_outputs(wanted)}' for wanted in self.others)}"


@dataclass
class Programs:
    """Programs by key, the least recently used first, and what was said about them."""

    kept: dict[Key, Kept] = field(default_factory=dict)
    varied: dict[Key, list[Varied]] = field(default_factory=dict)  # by the key of a call without sizes
    tried: Counter[Key] = field(default_factory=Counter)
    announced: set[str] = field(default_factory=set)
    _newest: Kept | None = None

    def __len__(self) -> int:
        return len(self.kept)

    def __deepcopy__(self, memo: object) -> Programs:
        """The same programs: they are given parameters in each call."""
        copies = {key: list(each) for key, each in self.varied.items()}
        return replace(self, kept=dict(self.kept), varied=copies, tried=Counter(self.tried), announced=set(self.announced))

    def __getstate__(self) -> dict[str, Any]:
        """No program is pickled, for calls compile them again."""
        return {"kept": {}, "varied": {}, "tried": Counter(), "announced": self.announced, "_newest": None}

    @property
    def newest(self) -> Kept:
        if self._newest is None:
            raise FoldError("Nothing is compiled yet.", valid="pass example_inputs to parallelize, or call the model once")
        return self._newest

    def rewritten(self, stages: Stages, executable: Executable | None = None) -> Programs:
        """The newest program alone, rewritten; unless said otherwise, what runs is its last stage."""
        new = replace(
            self.newest, stages=stages, executable=executable or Executable(stages[-1].program), proof=None, others={}
        )
        return replace(self, kept={new.key: new}, varied={}, tried=Counter(), _newest=new)

    def find(self, key_of: Callable[[frozenset[str]], Key]) -> Kept | None:
        """The program of a call, from now on the most recently used.

        Args:
            key_of: the call's key, given the numbers that are inputs of the program.
        """
        for free in sorted(dict.fromkeys(k.free for k in self.kept.values()), key=len, reverse=True):
            key = key_of(free)
            if key in self.kept:
                self.kept[key] = self.kept.pop(key)
                return self.kept[key]
        return None

    def alike(self, key_of: Callable[[frozenset[str]], Key]) -> Kept | None:
        """The newest program that was compiled for a call that differs from one in sizes alone."""
        compiled = [k for k in reversed(self.kept.values()) if not k.resized]
        return next((k for k in compiled if without_sizes(k.key) == without_sizes(key_of(k.free))), None)

    def keep(self, new: Kept, instead_of: Kept | None) -> None:
        """Stores a program, says once why there is another one, and evicts the least recently used."""
        if instead_of is not None:
            del self.kept[instead_of.key]
        if new.resized:
            self._hold(new)
            return
        others = [k.told for k in self.kept.values() if k.told.keys() == new.told.keys()]
        changed = min(([n for n in new.told if new.told[n] != told[n]] for told in others), key=len, default=[])
        for name in changed[:1]:
            now = new.told[name]
            was = next(told[name] for told in others if told[name] != now)
            advice = _ADVICE[now.kind]
            if advice is not None:
                self._announce(now.kind, f"Another program was compiled, for {name}{now} instead of {name}{was}. {advice}")
        if self.kept and all(k.watches != new.watches for k in self.kept.values()):
            self._announce(
                f"hooks{told(new.watches)}",
                f"Another program was compiled, for hooks{told(new.watches)}. Those are kept that are compiled already: "
                "register hooks before parallelize, and leave them where they are.",
            )
        if self._hold(new):
            self._announce(
                "eviction",
                f"{KEPT} programs are kept, and another call was compiled: from now on, the least recently used is dropped, "
                "and compiled again when it is needed. model.programs lists them.",
            )

    def _hold(self, new: Kept) -> bool:
        """Whether one that was compiled had to be dropped for it."""
        self.kept[new.key] = self._newest = new
        dropped = False
        while len(self) > KEPT:
            oldest = next((k for k in self.kept.values() if k.resized and k is not new), next(iter(self.kept.values())))
            dropped = dropped or not oldest.resized
            del self.kept[oldest.key]
        return dropped

    def find_other(self, kept: Kept, wanted: tuple[bool, ...]) -> Kept | None:
        """The program of the same calls for the gradients of other outputs, from now on the most recently used."""
        if wanted in kept.others:
            kept.others[wanted] = kept.others.pop(wanted)
        return kept.others.get(wanted)

    def keep_other(self, new: Kept, of: Kept) -> None:
        """Stores a program for the gradients of other outputs, and says once that there is one."""
        wanted, usual = new.executable.program.wanted, of.executable.program.wanted
        assert wanted is not None and usual is not None
        of.others[wanted] = self._newest = new
        self._announce(
            "gradients",
            f"Another program was compiled, for the gradients of {told_outputs(wanted)} instead of {told_outputs(usual)}: "
            "a backward pass was given those. It is kept for the next one.",
        )
        while len(of.others) > KEPT:
            del of.others[next(iter(of.others))]
            self._announce(
                "other gradients",
                f"{KEPT} programs of one call are kept for the gradients of other outputs, and yet others were given: from "
                "now on, the least recently used is dropped, and compiled again when it is needed.",
            )

    def announce_sizes(self, why: str) -> None:
        """Says once that calls of other sizes are compiled one by one."""
        self._announce(
            "sizes",
            f"A program is compiled for each shape of the inputs, and none for all: {why}. Pad them to few different shapes.",
        )

    def announce_copies(self, ratio: float) -> None:
        """Says once that ranks compute the same."""
        if ratio > _COPIES:
            self._announce(
                "copies",
                f"All ranks together compute {ratio:.2f} times the FLOPs of the model: several ranks compute the same, or pad "
                "experts. model.summary() lists what; sizes that the mesh does not divide, and operators without a rule, are "
                "causes.",
            )

    def _announce(self, cause: str, text: str) -> None:
        if cause not in self.announced:
            self.announced.add(cause)
            warnings.warn(text, stacklevel=2)
