"""What a layout costs, in elements moved over a link.

The layout belongs to the model, not to one input shape: parameters are placed once, and every shape's program has to agree
with them. So costs are taken at a reference load of `TOKENS` tokens per unit of hidden width on each data-parallel rank,
which also gives a small model the layout of the large one that it stands for. In these units every term is a multiple of
tokens x width, and only the ratios below matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foldcc.layout import INVARIANT, REPLICATED, VARYING, State, letter
from foldcc.mesh import FoldedMesh
from foldcc.ops import record
from foldcc.ops.groups import active
from foldcc.ops.moves import IN_TWO, MOVES, Step
from foldcc.ops.operator import positional

TOKENS = 4.0  # tokens per unit of hidden width on a data-parallel rank: 16 Ki tokens for a width of 4096
FLOPS = 0.5  # elements that a link moves in the time of `hidden` floating-point operations
TRAFFIC = 0.25  # elements that a link moves in the time in which memory takes one, keeping it for backward included
START = 0.25  # what starting a collective costs, in units of tokens x hidden
HOLDING = 6.0  # elements that holding an H x 1 column of a weight matrix is worth, per token


@dataclass(frozen=True)
class Price:
    """What a move costs for each element of the whole value.

    Attributes:
        forward, backward: what a rank sends, in units of (ranks - 1) / ranks.
        written: what the steps of the forward pass leave in memory.
    """

    forward: float
    backward: float
    written: float


class _Sent(TorchDispatchMode):
    """Adds up what the records say that a rank sends."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.total = ranks, Fraction(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, known = func(*args, **(kwargs or {})), record(func)
        if known is not None and known.sent is not None:
            self.total += known.sent(Fraction(args[0].numel()), Fraction(result.numel()), self.ranks)
        return result


@cache
def price(source: str, target: str, ranks: int, steps: tuple[Step, ...] | None = None) -> Price | None:
    """The price of a move between two types, None if there is none: its steps and their transposes, run on a small value.

    Args:
        steps: others than `MOVES` has.
    """
    steps = MOVES.get((source, target)) if steps is None else steps
    if steps is None:
        return None
    elements, written = ranks * ranks, Fraction(0)
    x = torch.empty(elements // ranks if source == VARYING else elements, device="meta", requires_grad=True)
    with active(FoldedMesh.parse(f"tp={ranks}")), _Sent(ranks) as sent:
        y, src = x, source
        for operator, dst in steps:
            told = {"x": y, "axes": "tp", "src": src, "dst": dst, "dim": 0, "outer": 1}
            told |= {"dims": [0], "outers": [1], "into": [0], "into_outers": [1]}
            y, src = operator(*positional(operator.overload, told)), dst
            written += y.numel()
        forward = sent.total
        torch.autograd.grad(y, x, torch.empty_like(y))
    unit = Fraction(elements * (ranks - 1), ranks)
    return Price(float(forward / unit), float((sent.total - forward) / unit), float(written / elements))


def move(
    source: State, target: State, elements: float, ranks: int, grad: bool, start: float, *, whole: bool = False
) -> float | None:
    """Cost of bringing a value from one state to another on one axis, None where that cannot be done.

    Args:
        elements: of the whole value, as held when it is not divided on this axis.
        grad: whether a gradient comes back.
        start: what starting one collective costs; 0 for a parameter, whose reductions are made together.
        whole: a value that is divided otherwise is made whole first.
    """
    if source == target:
        return 0.0
    pair = (letter(source), letter(target))
    if not grad and set(pair) == {REPLICATED, INVARIANT}:
        return 0.0
    found = price(*pair, ranks, IN_TWO if whole and pair == (VARYING, VARYING) else None)
    if found is None:
        return None
    backward = found.backward if grad else 0.0
    starts = (found.forward > 0) + (backward > 0)
    traffic = TRAFFIC * elements * found.written if found.forward else 0.0
    return (found.forward + backward) * elements * (ranks - 1) / ranks + starts * start + traffic
