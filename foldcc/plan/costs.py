"""What a layout costs, in elements moved over a link.

The layout belongs to the model, not to one input shape: parameters are placed once, and every shape's program has to agree
with them. So costs are taken at a reference load of `TOKENS` tokens per unit of hidden width on each data-parallel rank,
which also gives a small model the layout of the large one that it stands for. In these units every term is a multiple of
tokens x width, and only the ratios below matter.
"""

from __future__ import annotations

from foldcc.layout import Shard, State

TOKENS = 4.0  # tokens per unit of hidden width on a data-parallel rank: 16 Ki tokens for a width of 4096
FLOPS = 0.5  # elements that a link moves in the time of `hidden` floating-point operations
TRAFFIC = 0.25  # elements that a link moves in the time in which memory takes one, keeping it for backward included
START = 0.25  # what starting a collective costs, in units of tokens x hidden
HOLDING = 6.0  # elements that holding an H x 1 column of a weight matrix is worth, per token

# Moves between states, in units of the whole value times (ranks - 1) / ranks: forward and backward.
_MOVES = {
    ("V", "I"): (1, 0),  # all-gather; the transpose takes a slice
    ("V", "R"): (1, 1),  # all-gather; reduce-scatter
    ("V", "V"): (1, 1),  # through I: all-gather and slice; all-gather and slice
    ("I", "R"): (0, 2),  # nothing; all-reduce
    ("I", "V"): (0, 1),  # slice; all-gather
    ("I", "P"): (0, 0),
    ("R", "V"): (0, 0),
    ("R", "P"): (0, 0),
    ("P", "V"): (1, 1),  # reduce-scatter; all-gather
    ("P", "I"): (2, 0),  # all-reduce; nothing
    ("P", "R"): (2, 2),  # all-reduce; all-reduce
}


def _letter(state: State) -> str:
    return "V" if isinstance(state, Shard) else state


def move(source: State, target: State, elements: float, ranks: int, grad: bool, start: float) -> float | None:
    """Cost of bringing a value from one state to another on one axis, None where that cannot be done.

    Args:
        elements: of the whole value, as held when it is not divided on this axis.
        grad: whether a gradient comes back.
        start: what starting one collective costs; 0 for a parameter, whose reductions are made together.
    """
    if source == target:
        return 0.0
    pair = (_letter(source), _letter(target))
    if not grad and pair in (("R", "I"), ("I", "R")):
        return 0.0
    if pair not in _MOVES:
        return None
    forward, backward = _MOVES[pair]
    held = elements / ranks if isinstance(target, Shard) else elements
    traffic = TRAFFIC * held * (1 if forward else 0) + (TRAFFIC * elements if pair == ("V", "V") else 0)
    backward = backward if grad else 0
    starts = (forward > 0) + (backward > 0)
    return (forward + backward) * elements * (ranks - 1) / ranks + starts * start + traffic
