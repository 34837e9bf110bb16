"""A convolution along a sequence that sees a few positions before each, and none behind it.

Where the sequence is divided, a rank is given as many positions of the part before its own: what is sent does not depend on
its length.

Shapes: x [b, i, s], weight [o, i, taps], or [c, 1, taps] where each channel has taps of its own; bias [o] -> [b, o, s].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from foldcc.ops.captured import Division, Site, captured
from foldcc.ops.halo import halo
from foldcc.ops.sequences import longer


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, depthwise: bool, before: int = -1) -> Tensor:
    """`before` positions are there, and not looked for; zeros stand before the first position."""
    missing = weight.shape[2] - 1 - max(before, 0)
    x = torch.nn.functional.pad(x, (missing, 0)) if missing else x
    return torch.nn.functional.conv1d(x, weight, bias, groups=x.shape[1] if depthwise else 1)


def _defined(x: Tensor, weight: Tensor, bias: Tensor | None, depthwise: bool, before: int = -1) -> Tensor:
    both = torch.nn.functional.conv1d(x, weight, bias, padding=weight.shape[2] - 1, groups=x.shape[1] if depthwise else 1)
    return both[:, :, : x.shape[2]]


def _rule(depthwise: bool, **_: Any) -> str:
    if depthwise:
        return "b c [s], c [within] [taps], c -> b c [s] ; linear 0 | 1 ; add 2"
    return "b i [s], o i [taps], o -> b o [s] ; linear 0 | 1 ; add 2"


def _around(at: Site, x: Node, weight: Node, **rest: Any) -> Node:
    before = weight.meta["val"].shape[2] - 1
    if before:
        x = at.emit(halo, (x, 2, at.axes, before), longer(x.meta["layout"], 2, at.axes, before))
    return at.local(**{**rest, "x": x, "weight": weight, "before": before})


def _products(x: Any, weight: Any, **_: Any) -> tuple[tuple[float, tuple[str, ...], tuple[str, ...]], ...]:
    return ((2 * x[0] * x[2] * weight[0] * weight[1] * weight[2], ("x",), ("weight",)),)


causal_conv = captured(
    "causal_conv(Tensor x, Tensor weight, Tensor? bias, bool depthwise, int before=-1) -> Tensor",
    meaning="conv1d of each position with those before it, zeros before the first",
    eager=_convolved,
    defined=_defined,
    shape=lambda x, weight, bias, depthwise, before=-1: x.new_empty(x.shape[0], weight.shape[0], x.shape[2] - max(before, 0)),
    narrow={"x", "weight", "bias"},
    rule=_rule,
    divisions=(Division(("s",), stretch=True, lower=_around),),
    products=_products,
    degree=sum,
).overload
