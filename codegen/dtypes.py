"""Dtypes: what values are computed in, float32 or wider and int64, and how they come to be it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from foldcc.codegen.pointwise import FLOATS, number
from foldcc.ir.node import name_of


def computed(dtype: torch.dtype) -> str:
    """The type that values of a dtype are computed in."""
    if dtype == torch.float64:
        return "tl.float64"
    return "tl.float32" if dtype.is_floating_point else "tl.int64"


def loaded(text: str, node: fx.Node) -> str:
    """What is loaded of a tensor, as it is computed with."""
    dtype = node.meta["val"].dtype
    return f"({text} != 0)" if dtype == torch.bool else f"{text}.to({computed(dtype)})"


def number_of(node: fx.Node, x: Any) -> str:
    """A number as an element of a node: whole, if the node's elements are."""
    return number(float(x) if node.meta["val"].is_floating_point() else int(x))


def converted(text: str, x: Any, node: fx.Node) -> str:
    """An operand as the operator computes with it: whole numbers become floating-point ones beside such."""
    have, want = x.meta["val"].dtype, node.meta["val"].dtype
    if want == torch.bool and node.target not in FLOATS:
        return f"({text} != 0)" if name_of(node.target) == "aten._to_copy" and have != torch.bool else text
    if have.is_floating_point and want.is_floating_point:
        return f"{text}.to(tl.float64)" if want == torch.float64 and have != torch.float64 else text
    if want.is_floating_point and not (have == torch.bool and _chooses(node, x)):
        return f"{text}.to({computed(want)})"
    if not want.is_floating_point and (have.is_floating_point or (have == torch.bool and not _chooses(node, x))):
        return f"{text}.to(tl.int64)"
    return text


def _chooses(node: fx.Node, x: Any) -> bool:
    """Whether an operand is the condition of a choice, or of another condition."""
    name = name_of(node.target)
    return (name == "aten.where" and x is node.args[0]) or (name == "aten.masked_fill" and x is node.args[1])
