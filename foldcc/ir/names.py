"""What an operator is called in the text of a program, and which operator a name means for its arguments.

aten.mul(%x, %y)              aten.mul.Tensor
aten.mul(%x, 2)               aten.mul.Tensor, as in PyTorch, where arithmetic takes a number for a tensor
aten.mul.Scalar(%x, 2)        the overload is written, because the name and the arguments would mean another one
all_reduce(%x, dp, I)         foldcc.all_reduce.default
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from foldcc.ops.experts import activate
from foldcc.ops.layout import cross_fold, reshard

FUNCTIONS = {f.__name__: f for f in (operator.getitem, reshard, cross_fold, activate)}
_ARITHMETIC = {"aten::add", "aten::sub", "aten::mul", "aten::div"}
_KINDS: dict[str, Any] = {
    "number": (int, float, complex),
    "int": int,
    "complex": complex,
    "float": (int, float),
    "bool": bool,
    "str": str,
}
_KINDS |= {"ScalarType": torch.dtype, "Layout": torch.layout, "Device": torch.device, "MemoryFormat": torch.memory_format}
_ATOMS = {"None": None, "True": True, "False": False}
_DEVICE = re.compile(r"(cpu|meta|cuda|xpu|mps)(:\d+)?")


def called(node: fx.Node) -> str:
    """The name of a node's operator in text, with its overload where the arguments do not say which one it is."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target if isinstance(target, str) else getattr(target, "__name__", str(target))
    name = target._schema.name.removeprefix("foldcc::").replace("::", ".")
    return name if named(name, node.args, node.kwargs) is target else f"{name}.{target._overloadname}"


def named(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operator of a name, for arguments in which values are nodes; None if no overload takes them.

    Raises:
        KeyError: nothing has this name.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    space, *rest = name.split(".") if "." in name else ("foldcc", name)
    found: Any = getattr(getattr(torch.ops, space), rest[0], None)
    if found is None:
        function = getattr(operator, name, None)  # of sizes
        if function is None:
            raise KeyError(name)
        return function
    if len(rest) > 1:
        if rest[1] not in found.overloads():
            raise KeyError(name)
        return getattr(found, rest[1])
    every = [getattr(found, o) for o in found.overloads()]
    return next((o for o in every if _takes(o._schema, args, kwargs)), None)


def _takes(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    positional = [a for a in schema.arguments if not a.kwarg_only]
    if len(args) > len(positional) or not kwargs.keys() <= {a.name for a in schema.arguments}:
        return False
    given = dict(zip((a.name for a in positional), args, strict=False)) | dict(kwargs)
    for a in schema.arguments:
        if a.name not in given:
            if not a.has_default_value():
                return False
        elif not _is(given[a.name], a.real_type, schema.name in _ARITHMETIC):
            return False
    return True


def _is(x: Any, kind: Any, arithmetic: bool) -> bool:
    """Whether a value may stand where a schema has a type."""
    if kind.kind() == "OptionalType":
        return x is None or _is(x, kind.getElementType(), arithmetic)
    if kind.kind() == "ListType":
        return isinstance(x, (list, tuple)) and all(_is(y, kind.getElementType(), arithmetic) for y in x)
    if isinstance(x, fx.Node):
        size = isinstance(x.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat))
        return size == (kind.kind() != "TensorType")
    if kind.kind() == "TensorType":
        return arithmetic and isinstance(x, (int, float))
    return isinstance(x, _KINDS.get(str(kind), object)) and (not isinstance(x, bool) or str(kind) in ("bool", "number"))


def atom(word: str) -> Any:
    """The number, dtype, device or string that prints as a word."""
    if word in _ATOMS:
        return _ATOMS[word]
    if _DEVICE.fullmatch(word):
        return torch.device(word)
    try:
        return int(word) if word.lstrip("-").isdigit() else float(word)
    except ValueError:
        found = getattr(torch, word, word)
        return found if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)) else word
