"""Kinds of operators: each is named once, and follows from what PyTorch says of an operator where it says so.

What differs from a kind says so where it is used: `SAME - {...}`, and why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from foldcc.ir.node import argument, name_of


def named(names: str) -> frozenset[str]:
    """Operators of PyTorch's, as `name_of` writes them."""
    return frozenset(f"aten.{name}" for name in names.split())


def is_pointwise(target: Any) -> bool:
    """Whether each element of the result is made of one element of each operand, and of no random number."""
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def is_view(target: Any) -> bool:
    """Whether results are in the memory of the operand, as far as a functional program can tell."""
    returned = getattr(getattr(target, "_schema", None), "returns", ())
    return name_of(target) == "aten._unsafe_view" or any(
        x.alias_info is not None and not x.alias_info.is_write for x in returned
    )


# The operand, element for element.
SAME = named("alias clone contiguous detach lift_fresh_copy")
# All elements in their order, in another shape: any, or one with a dimension of size 1 more or less.
RESHAPES = named("reshape view _unsafe_view _reshape_alias flatten unflatten")
UNITS = named("unsqueeze squeeze")
TRANSPOSES = named("t transpose permute")
CONVOLUTIONS = named("convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
PRODUCTS = CONVOLUTIONS | named("mm bmm addmm addbmm baddbmm mv addmv linear matmul scaled_dot_product_attention")
# Element by element, and 16 bits lose digits or overflow; as autocast has them on CUDA.
WIDE = named("acos asin cosh erfinv exp expm1 log log10 log1p log2 pow reciprocal rsqrt sinh softplus tan")

# The number that an operator fills its result with, or the argument that is that number.
FILLS: dict[str, int | str] = {"aten.scalar_tensor": "s"}
for _name, _number in (("zeros", 0), ("ones", 1), ("full", "fill_value")):
    FILLS |= dict.fromkeys(named(f"{_name} new_{_name} {_name}_like"), _number)
EMPTY = named("empty new_empty empty_like")
COUNTED = named("arange eye")
# Results that do not depend on the numbers of any operand.
CREATORS = EMPTY | COUNTED | set(FILLS)


def filled_with(node: Node) -> Any:
    """What a call of one of FILLS fills its result with."""
    number = FILLS[name_of(node.target)]
    return argument(node, number) if isinstance(number, str) else number


def shape_argument(target: Any) -> int | None:
    """The position of the argument that is the shape of the result, None if there is none."""
    if name_of(target) not in CREATORS | named("reshape view _unsafe_view expand"):
        return None
    return next((i for i, a in enumerate(target._schema.arguments) if a.name in ("size", "shape")), None)
