"""Routings that hide bugs, or bring them out: where a router sends its tokens, as integers that a `Decoder` takes.

A routing is a preference of every token for every expert, [B, S, E], int64; a token goes to the experts that it prefers
most. Integers are exact, so both sides of a comparison choose alike, and a tie is a tie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from foldcc.errors import FoldError, listed
from foldcc.mesh import FoldedMesh
from foldcc.testing.configs import ExpertsConfig

Kind = Literal["own", "balanced", "hot expert", "empty experts", "idle rank", "one rank", "ties"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where a router sends its tokens.

    own             where its scores say
    balanced        every expert is chosen equally often, up to one
    hot expert      every token goes to expert `which`, besides others
    empty experts   every other expert is chosen by no token
    idle rank       no token goes to the experts of rank `which` of ep
    one rank        every token goes to the experts of rank `which` of ep, and to no others
    ties            all that a token knows of an expert is whether it likes it

    Attributes:
        which: counted modulo what there is.
    """

    kind: Kind = "own"
    which: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FoldError(f"There is no routing {self.kind!r}.", valid=listed(KINDS))

    def fits(self, moe: ExpertsConfig, mesh: FoldedMesh) -> bool:
        """Whether the mesh and the number of experts leave room for it."""
        return moe.experts % mesh.size("ep") == 0 and len(self._open(moe, mesh)) >= moe.chosen and self._apart(moe, mesh)

    def preferences(self, moe: ExpertsConfig, mesh: FoldedMesh, batch: int, length: int) -> Tensor | None:
        """What a `Decoder` takes as `routing`, [batch, length, experts]; None for its own.

        Raises:
            FoldError: there is no room for it, such as with "idle rank" where ep is 1.
        """
        if not self.fits(moe, mesh):
            raise FoldError(
                f"Routing {self.kind!r} is not possible with {moe.chosen} of {moe.experts} experts on ep={mesh.size('ep')}."
            )
        if self.kind == "own":
            return None
        tokens = batch * length
        random = torch.Generator().manual_seed(self.which)
        if self.kind == "ties":
            return torch.randint(2, (batch, length, moe.experts), generator=random)
        first = torch.arange(tokens)[:, None] * moe.chosen  # the next token begins where the last one ended
        preferences = moe.experts - 1 - (torch.arange(moe.experts) - first) % moe.experts
        if self.kind != "balanced":
            preferences = torch.rand(tokens, moe.experts, generator=random).argsort(-1)
            preferences[:, self._open(moe, mesh)] += moe.experts
        if self.kind == "hot expert":
            preferences[:, self.which % moe.experts] += moe.experts
        return preferences.unflatten(0, (batch, length))

    def _open(self, moe: ExpertsConfig, mesh: FoldedMesh) -> list[int]:
        """The experts that tokens may go to."""
        each = moe.experts // mesh.size("ep")
        rank = self.which % mesh.size("ep")
        open_to = {
            "empty experts": lambda e: e % 2 == self.which % 2,
            "idle rank": lambda e: e // each != rank,
            "one rank": lambda e: e // each == rank,
        }.get(self.kind, lambda e: True)
        return [e for e in range(moe.experts) if open_to(e)]

    def _apart(self, moe: ExpertsConfig, mesh: FoldedMesh) -> bool:
        """Whether it differs from a routing that may be anything."""
        return self.kind not in ("empty experts", "idle rank", "one rank") or len(self._open(moe, mesh)) < moe.experts
