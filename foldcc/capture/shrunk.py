"""A small copy of a Transformers model: the same code over a configuration of smaller sizes and fewer layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from foldcc.capture.capacity import capacity_of, limit
from foldcc.errors import FoldError

VOCABULARY, WINDOW, EXPERTS, CHOSEN, GROUPS, LENGTH = 64, 4, 8, 2, 4, 8
# What the names of sizes end with, and the smallest and next of their kind: what is larger stays larger, equal stays equal.
_KINDS = {"heads": (2, 2), "head_dim": (8, 2), "_rank": (16, 2), "intermediate_size": (16, 2)}
_MOST = {
    "experts": EXPERTS,
    "_per_tok": CHOSEN,
    "n_group": GROUPS,
    "topk_group": CHOSEN,
    "window": WINDOW,
    "local_attention": WINDOW,
}


def shrunk(model: nn.Module) -> tuple[nn.Module, dict[int, int]]:
    """A copy with random weights on the CPU, and what became of sizes that an input may have.

    Raises:
        FoldError: there is no configuration, or its model cannot be made smaller.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or getattr(type(model), "config_class", None) is None:
        raise FoldError(f"{type(model).__name__} is too large to be run, and has no configuration to make a smaller one of")
    before = config.to_dict()
    after = _smaller(before, _layers(model, before.get("num_hidden_layers"), before.get("layer_types")))
    with torch.random.fork_rng(devices=[]):
        copy = type(model)(type(config).from_dict(after))
    if (capacity := capacity_of(model)) is not None:
        limit(copy, replace(capacity, group=None))  # whatever divides its tokens
    return copy, {before[k]: after[k] for k in ("vocab_size", "hidden_size") if _is_size(before.get(k))}


def _layers(model: nn.Module, count: Any, types: Any) -> int | None:
    """How many layers have one of each kind among them."""
    if not isinstance(count, int):
        return None
    kinds: dict[Any, int] = {}
    for stack in (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count):
        for i, layer in enumerate(stack):
            kinds.setdefault((repr(layer), types[i] if types and len(types) == count else None), i)
    return max(kinds.values()) + 1 if kinds else None


def _smaller(before: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    after = dict(before)
    for ending, (smallest, times) in _KINDS.items():
        names = [k for k, n in before.items() if k.endswith(ending) and _is_size(n) and n > 1]
        ranked = sorted({before[k] for k in names})
        after |= {k: min(before[k], smallest * times ** ranked.index(before[k])) for k in names}
    for ending, most in _MOST.items():
        after |= {k: min(n, most) for k, n in before.items() if k.endswith(ending) and _is_size(n) and "shared" not in k}
    if _is_size(before.get("vocab_size")):
        after["vocab_size"] = min(before["vocab_size"], VOCABULARY)
        after |= {k: n % VOCABULARY for k, n in before.items() if k.endswith("_token_id") and _is_size(n)}
    if _is_size(before.get("hidden_size")) and _is_size(heads := before.get("num_attention_heads")):
        own = before.get("head_dim") or before["hidden_size"] // heads
        joined = own * heads == before["hidden_size"]
        after["hidden_size"] = after["num_attention_heads"] * (after.get("head_dim") or 8) if joined else 24
    if layers is not None:
        count = before["num_hidden_layers"]
        after |= {k: x[:layers] for k, x in before.items() if isinstance(x, (list, tuple)) and len(x) == count}
        after["num_hidden_layers"] = layers
    return after


def _is_size(n: Any) -> bool:
    return type(n) is int and n > 0


def shapes(given: Iterable[tuple[int, ...]], sizes: Mapping[int, int]) -> list[tuple[int, ...]]:
    """Shapes of inputs for the copy: sizes of the configuration as they became, any other a little above `LENGTH`."""
    given = list(given)
    free = sorted({n for shape in given for n in shape if n > LENGTH and n not in sizes})
    found = {**sizes, **{n: LENGTH + i for i, n in enumerate(free)}}
    return [tuple(found.get(n, n) for n in shape) for shape in given]
