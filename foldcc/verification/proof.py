"""Proof: what was shown of a folded program, what was not, and where it fails."""

from __future__ import annotations

from dataclasses import dataclass

from foldcc.errors import FoldError

_NOT_PROVED = (
    "rounding: casts are the identity, and every sum is exact",
    "randomness: that the bits of a key and a position look random, and the initial values of parameters",
    "PyTorch's own kernels, collectives and derivative formulas, which both programs trust",
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first place at which the folded program computes something else than the captured one.

    Attributes:
        what: a sentence's subject, such as "The gradient of model.norm.weight".
        parameter: its name, for a gradient.
        rank: the first rank on which it differs.
        reading: what the values would be right as, such as "a term of the sum over tp"; empty when nothing is found.
        node: the node at which the two programs part, with the block that it is in.
        at: the module and source line of that node.
        layouts: of the node's result and its operands, one line each.
        capture: it is the captured program that computes something else, than the module that it was captured from; the node
            is then the first module that returns something else.
    """

    what: str
    rank: int
    parameter: str | None = None
    reading: str = ""
    node: str = ""
    at: str = ""
    layouts: tuple[str, ...] = ()
    capture: bool = False

    def __str__(self) -> str:
        if self.capture:
            lines = [f"The capture is wrong: {self.what} differs from what the module itself computes."]
            return "\n".join([*lines, *([f"  module  {self.node}"] if self.node else [])])
        lines = [f"{self.what} differs on rank {self.rank}" + (f": it is {self.reading}." if self.reading else ".")]
        lines += [f"  node    {self.node}"] if self.node else []
        lines += [f"  at      {self.at}"] if self.at else []
        lines += [f"  layout  {line}" for line in self.layouts]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The verdict on a folded program.

    Attributes:
        program, mesh, stage: what was examined.
        prime: of the field.
        rounds: how often, each time with other elements and other hashes.
        bound: of the chance that all rounds missed a difference that is there, given the ways that comparisons went: a
            program with comparisons is one rational function for each such way, and a way that no round took is not looked
            at. Programs that differ on a share of all elements, as by a clamp that is left out, are missed with at most
            that share's chance; what went one way only is in `undecided`.
        undecided: each mask, branch and comparison of the captured program that was constant in all rounds.
        proved: what was compared, one sentence each: on every rank, and of the capture with the module itself.
        missing: what could not be compared, and why.
        assumed: what else the verdict rests on, such as the argument for reduced sizes.
        difference: where the program fails; None when it is proved.
        impossible: why nothing could be proved; empty when something was, or a difference was found.
    """

    program: str
    mesh: str
    stage: str
    prime: int
    rounds: int
    bound: float
    proved: tuple[str, ...]
    assumed: tuple[str, ...] = ()
    undecided: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    difference: Difference | None = None
    impossible: str = ""

    @property
    def ok(self) -> bool:
        return self.difference is None and not self.impossible

    @property
    def parameter(self) -> str | None:
        """The first parameter whose gradient is wrong, in the order of the backward pass."""
        return self.difference.parameter if self.difference else None

    @property
    def rank(self) -> int | None:
        return self.difference.rank if self.difference else None

    @property
    def node(self) -> str | None:
        return self.difference.node if self.difference else None

    @property
    def not_proved(self) -> tuple[str, ...]:
        return (
            *self.missing,
            *_NOT_PROVED,
            *(f"the other way of {x}, which was constant in all rounds" for x in self.undecided),
        )

    def raise_if_failed(self) -> Proof:
        """This proof, if it holds.

        Raises:
            FoldError: it does not; the message says where the two programs part.
        """
        if not self.ok:
            raise FoldError(str(self))
        return self

    def __str__(self) -> str:
        if self.impossible:
            return f"{self.program} on {self.mesh} was not proved equal to the captured program: {self.impossible}"
        verdict = "equal" if self.ok else "NOT equal"
        lines = [f"{self.program} on {self.mesh} is {verdict} to the captured program, at stage {self.stage}."]
        if self.difference is not None and self.difference.capture:
            lines = [f"{self.program} as it was captured is NOT equal to the module."]
        if self.difference is not None:
            return "\n".join([*lines, str(self.difference)])
        lines += [f"  proved      {line}" for line in self.proved]
        lines += [f"  argument    {line}" for line in self.assumed]
        lines += [f"  not proved  {line}" for line in self.not_proved]
        each = f"{self.rounds} round{'s' if self.rounds > 1 else ''} over the field of {self.prime} elements"
        return "\n".join([*lines, f"  chance      a difference is missed with probability < {self.bound:.0e}, in {each}"])
