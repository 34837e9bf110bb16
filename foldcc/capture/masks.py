"""Attention masks of Transformers, as what they are made of: causality, a window, padding.

The library composes a mask from functions of two positions and evaluates them. During capture its factories return a
`Pattern` instead, which attention carries, or refuse by name what it does not carry. So nothing of a mask gets lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from foldcc.changed import changed
from foldcc.errors import FoldError

CARRIED = "causal masks, sliding windows, and padding masks [batch, sequence]"


class Pattern(NamedTuple):
    """Which pairs (query, key) attend: `key <= query` if causal, `|query - key| < window` if there is one.

    `positions`, [batch, sequence], are there when the library suspects packed sequences; see packing.py.
    """

    causal: bool
    window: int = 0
    positions: Tensor | None = None


class Mask(NamedTuple):
    """What a model's layers receive as `attention_mask` while it is captured; `valid` is [batch, keys], bool."""

    pattern: Pattern
    valid: Tensor | None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # Python and the tracers ask for such names
        raise _read(f".{name}")

    def __getitem__(self, places: Any) -> Any:
        raise _read("[...]")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _read(f" in {getattr(function, '__name__', function)}")


def _read(how: str) -> FoldError:
    return FoldError(f"The model computes with its attention mask itself (mask{how}).", carries=CARRIED)


def mask(*, mask_function: Any, attention_mask: Tensor | None = None, q_offset: Any = 0, kv_offset: Any = 0, **_: Any) -> Mask:
    """The mask interface of Transformers: it would evaluate `mask_function`, we only keep what it says.

    Raises:
        FoldError: the mask is made in another way than by the library's factories, or continues a cache.
    """
    if not isinstance(mask_function, Pattern):
        raise FoldError("The model builds its attention mask with a function of its own.", carries=CARRIED)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise FoldError(f"The attention mask has shape {list(attention_mask.shape)}.", carries=CARRIED)
    if q_offset != 0 or kv_offset != 0:
        raise FoldError("Attention continues a cache, which foldcc's attention does not carry.", carries=CARRIED)
    return Mask(mask_function, attention_mask)


class _Packed(NamedTuple):
    """What stands in for the pairs of positions that belong to one sequence of a packed row."""

    positions: Tensor


def _packed(pattern: Any, position_ids: Tensor, *_: Any) -> Any:
    """A pattern whose positions start again with each sequence of a row."""
    return pattern._replace(positions=position_ids) if isinstance(pattern, Pattern) else _refuse("packed sequences")()


def _and(*patterns: Any) -> Pattern:
    """A pattern within packed sequences, which is the one intersection that is carried."""
    match patterns:
        case (Pattern() as pattern, _Packed(positions)) | (_Packed(positions), Pattern() as pattern):
            return _packed(pattern, positions)
    return _refuse("an intersection (and_masks)")()


def _refuse(what: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise FoldError(
            f"The model builds its attention mask with {what}, which foldcc's attention does not carry.",
            carries=CARRIED,
        )

    return refuse


# What stands in for the factories of transformers.masking_utils. A bidirectional window there includes its end. What it makes
# of packed rows has changed with its versions: the last two names are not in all of them.
_FACTORIES: dict[str, Any] = {
    "causal_mask_function": Pattern(True),
    "bidirectional_mask_function": Pattern(False),
    "sliding_window_causal_mask_function": lambda window: Pattern(True, window),
    "sliding_window_bidirectional_mask_function": lambda window: Pattern(False, window + 1),
    "find_packed_sequence_indices": lambda position_ids: position_ids,
    "packed_sequence_mask_function": _Packed,
    "chunked_causal_mask_function": _refuse("chunks (chunked_causal_mask_function)"),
    "blockwise_overlay": _refuse("blocks (blockwise_overlay)"),
    "or_masks": _refuse("a union (or_masks)"),
    "and_masks": _and,
    "packed_sequence_compatibility_function": _packed,
    "remap_positions_for_packed_sequence": _packed,
}
_NOT_IN_ALL = ("packed_sequence_compatibility_function", "remap_positions_for_packed_sequence")


@contextmanager
def as_patterns() -> Iterator[None]:
    """Masks that are created inside this context say what they are made of."""
    from transformers import masking_utils

    # A version that lacks another of these composes its masks in a way that this file does not know.
    there = {name: x for name, x in _FACTORIES.items() if hasattr(masking_utils, name)}
    missing = [name for name in _FACTORIES if name not in there and name not in _NOT_IN_ALL]
    if missing:
        raise FoldError(f"transformers.masking_utils has no {', '.join(missing)}.", valid="a version of Transformers that has")
    with changed(vars(masking_utils), there):
        yield
