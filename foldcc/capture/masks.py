"""Attention masks of Transformers: tensors, and what they are made of, causality, a window and padding, where it is no more.

The library composes a mask from functions of two positions and evaluates them. So it is captured, for models compute with
masks; and a mark says of which pattern it is. Attention that is given a marked mask carries the pattern, and nobody makes the
mask. In a row with several sequences, attention stays within each: whether there are is in the values, which a tracer does not
have. But positions that a model counts by itself are those of one sequence a row; only positions that are given can be packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from foldcc.changed import changed
from foldcc.errors import FoldError
from foldcc.ir.rewrite import replace_node
from foldcc.ops import attention, captured_record
from foldcc.ops.operator import LIBRARY, positional

_HOW = "Tensor? rows, Tensor? packed, Tensor? valid, bool pattern, bool causal, int window"
LIBRARY.define(f"masked_by(Tensor allowed, {_HOW}) -> Tensor")
LIBRARY.impl("masked_by", lambda allowed, *_: allowed.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("foldcc::masked_by", lambda allowed, *_: torch.empty_like(allowed), lib=LIBRARY)
_masked_by = torch.ops.foldcc.masked_by.default


class Pattern(NamedTuple):
    """Which pairs (query, key) attend: `key <= query` if causal, `|query - key| < window` if there is one."""

    causal: bool
    window: int = 0

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key
        allowed = distance >= 0 if self.causal else query >= 0
        return allowed & (distance < self.window) & (distance > -self.window) if self.window else allowed


class Rows(NamedTuple):
    """A function of positions in rows of one sequence, and the same in packed rows, whose sequences `rows` counts."""

    one: Callable[..., Tensor]
    several: Callable[..., Tensor]
    rows: Tensor | None = None

    def __call__(self, *places: Tensor) -> Tensor:
        return self.several(*places)


def mask(
    added: bool, *, mask_function: Any, attention_mask: Tensor | None, q_offset: Any = 0, kv_offset: Any = 0, **sizes: Any
) -> Tensor:
    """The mask interface of Transformers: [batch, 1, queries, keys], with the pattern that it is of, if it is of one.

    Args:
        added: it is added to scores, as by models that know no other masks; else it is bool.

    Raises:
        FoldError: the mask continues a cache.
    """
    from transformers.masking_utils import eager_mask, sdpa_mask

    if attention_mask is not None and attention_mask.dim() != 2:
        raise FoldError(
            f"The attention mask has shape {list(attention_mask.shape)}.",
            valid="[batch, sequence], or [batch, 1 or heads, queries, keys] of what is added to scores",
        )
    if q_offset != 0 or kv_offset != 0:
        raise FoldError("Attention continues a cache, which no program is given.", valid="a call without past_key_values")
    sizes |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}

    def made(function: Any) -> Tensor:
        return (eager_mask if added else sdpa_mask)(mask_function=function, attention_mask=attention_mask, **sizes)

    one, rows = (mask_function.one, mask_function.rows) if isinstance(mask_function, Rows) else (mask_function, None)
    allowed = made(one)
    pattern = one if isinstance(one, Pattern) and allowed.shape[2] == allowed.shape[3] else None
    if pattern is None and rows is None:
        return allowed
    packed = None if rows is None else made(mask_function)
    return _masked_by(allowed, rows, packed, attention_mask, pattern is not None, *(pattern or (False, 0)))


def remove_marks(graph: fx.Graph, inputs: set[str]) -> None:
    """Attention that is given a marked mask carries the pattern instead, and the marks go.

    Args:
        inputs: names of the placeholders that the caller of the model fills.
    """
    for mark in graph.find_nodes(op="call_function", target=_masked_by):
        allowed, rows, packed, valid, pattern, causal, window = mark.args
        if rows is not None and _sources(rows) & inputs:
            allowed, pattern = packed, False
        for node in [n for n in mark.users if n.target is attention and pattern]:
            given = captured_record(attention).arguments(node)
            if given["mask"] is mark:
                given |= {"valid": valid, "causal": causal, "window": window, "mask": None}
                node.args = positional(attention, given)
        replace_node(mark, allowed)


def _sources(node: fx.Node) -> set[str]:
    """Names of the placeholders that a value is computed from."""
    found, stack = set(), [node]
    seen: set[fx.Node] = set()
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            stack += n.all_input_nodes
            if n.op == "placeholder":
                found.add(n.name)
    return found


class _Within(NamedTuple):
    """What stands in for the pairs of positions that belong to one sequence of a packed row."""

    rows: Tensor
    function: Callable[..., Tensor]


def _functions() -> dict[str, Any]:
    """What stands in for functions of transformers.masking_utils: patterns, which also compute what these do.

    A bidirectional window there includes its end. What it makes of packed rows has changed with its versions: the last two
    names are not in all of them.
    """
    from transformers import masking_utils

    there = dict(vars(masking_utils))

    def within(rows: Tensor) -> _Within:
        return _Within(rows, there["packed_sequence_mask_function"](rows))

    def and_masks(*functions: Any) -> Any:
        composed = there["and_masks"](*(x.function if isinstance(x, _Within) else x for x in functions))
        match functions:
            case (_Within(rows), other) | (other, _Within(rows)):
                return Rows(other.one if isinstance(other, Rows) else other, composed, rows)
        return composed

    def compatible(function: Any, positions: Tensor, rows: Tensor) -> Any:
        return Rows(function, there["packed_sequence_compatibility_function"](function, positions, rows), rows)

    def remapped(function: Any, positions: Tensor) -> Any:
        return Rows(function, there["remap_positions_for_packed_sequence"](function, positions))

    return {
        "causal_mask_function": Pattern(True),
        "bidirectional_mask_function": Pattern(False),
        "sliding_window_causal_mask_function": lambda window: Pattern(True, window),
        "sliding_window_bidirectional_mask_function": lambda window: Pattern(False, window + 1),
        "packed_sequence_mask_function": within,
        "and_masks": and_masks,
        "packed_sequence_compatibility_function": compatible,
        "remap_positions_for_packed_sequence": remapped,
    }


_NOT_IN_ALL = ("packed_sequence_compatibility_function", "remap_positions_for_packed_sequence")


@contextmanager
def as_patterns() -> Iterator[None]:
    """Masks that are created inside this context say what they are made of."""
    from transformers import masking_utils

    # A version that lacks another of these composes its masks in a way that this file does not know.
    functions = _functions()
    there = {name: x for name, x in functions.items() if hasattr(masking_utils, name)}
    missing = [name for name in functions if name not in there and name not in _NOT_IN_ALL]
    if missing:
        raise FoldError(f"transformers.masking_utils has no {', '.join(missing)}.", valid="a version of Transformers that has")
    with changed(vars(masking_utils), there):
        yield
