"""FieldMode: PyTorch programs, run over a field instead of over floating-point numbers.

Inside the mode every floating-point tensor is a carrier, whatever its type in the program: casts are the identity. The
mode stands below autograd, so derivatives are PyTorch's own formulas, over the same field.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import foldcc.verification.arithmetic
import foldcc.verification.functions
import foldcc.verification.layers
import foldcc.verification.order  # noqa: F401  (each fills the table)
from foldcc.errors import FoldError
from foldcc.ops import record
from foldcc.ops.random import DRAWS
from foldcc.verification.field import FUNCTIONS, Field
from foldcc.verification.functions import pointwise
from foldcc.verification.meanings import MEANINGS, MOVES, REARRANGES, value
from foldcc.verification.order import to_integer

aten = torch.ops.aten
_CASTS = {"_to_copy", "to"}
_COMPLEX = {"complex", "polar", "view_as_complex"}
_COPIES = frozenset(
    """_reshape_alias _unsafe_view cat clone contiguous expand flatten flip gather index index_select masked_select repeat
    reshape roll stack view""".split()
)
_RANDOM = {*DRAWS, "dropout", "native_dropout"}


class NoMeaning(FoldError):
    """An operator has no meaning over a field, so nothing can be proved of a program that uses it."""

    def __init__(self, operator: Any, when: str = ""):
        told = "is random" if _name(operator).rstrip("_") in _RANDOM else "has no meaning over a field"
        super().__init__(f"{operator} {told}{when}, so a program that uses it cannot be proved.")
        self.operator = operator


def _name(operator: Any) -> str:
    return str(operator._schema.name.split("::")[1])


class FieldMode(TorchDispatchMode):
    def __init__(self, field: Field):
        super().__init__()
        self.field = field

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = _name(func)
        known = record(func)
        if known is not None and name in MEANINGS:
            return MEANINGS[name](self.field, *args)
        if known is not None:
            with self:  # its meaning is plain PyTorch, which has a meaning in turn
                return known.eager(*args, **kwargs)
        target = kwargs.pop("out", None)
        in_place = name.endswith("_") and not name.startswith("__")
        name = name.rstrip("_") if in_place else name
        result = self._call(func, name, args, kwargs, in_place)
        if target is not None or in_place:
            self.field.forget(args[0] if target is None else target)
        if target is not None:
            return target.copy_(result)
        if in_place and result is not args[0]:
            return args[0].copy_(result)
        if name in _COPIES:
            self._known(func, name, args, kwargs, result)
        return result

    def _call(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], in_place: bool) -> Any:
        if name in _COMPLEX or any(isinstance(x, Tensor) and x.is_complex() for x in _flat(args)):
            return self._of_pairs(func, name, args, kwargs)
        if name in _CASTS:
            return self._cast(args[0], next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)), None))
        if func.namespace != "aten" or name in _RANDOM:
            raise NoMeaning(func)
        lifted = {k: _lifted(v) for k, v in kwargs.items()}
        if not _floating(func, args, lifted):
            return func(*map(_lifted, args), **lifted)
        if name in MEANINGS:
            told = {k: v for k, v in lifted.items() if k not in ("dtype", "device", "layout", "pin_memory", "memory_format")}
            try:
                return MEANINGS[name](self.field, *map(_lifted, args), **told)
            except NotImplementedError as error:
                raise NoMeaning(func, f" as {error}") from None
        if torch.Tag.pointwise in func.tags and name not in MOVES:
            return self._pointwise(func, name, args, lifted)
        if name not in MOVES:
            with self:  # its meaning is that of the operators that it is made of
                result = decomposition_table.get(func, func.decompose)(*args, **kwargs)
            if result is NotImplemented:
                raise NoMeaning(func)
            return result
        result = func(*map(_lifted, args), **lifted)
        if "empty" in name and result.is_floating_point():
            result.fill_(torch.nan)
        if name in ("lift_fresh", "lift_fresh_copy"):
            return self.field.numbers(result)
        return result

    def _of_pairs(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """A complex number is two elements; what is not named here does the same to both."""
        if name in ("complex", "view_as_complex", "view_as_real"):
            return func(*args)
        parts = [pytree.tree_map_only(Tensor, partial(_part, i), args) for i in (0, 1)]
        with self:
            if name == "polar":
                made = args[0] * args[1].cos(), args[0] * args[1].sin()
            elif name == "mul" and len([x for x in args if isinstance(x, Tensor) and x.is_complex()]) == 2:
                (a, c), (b, d) = parts
                made = a * c - b * d, a * d + b * c
            elif name in ("_conj", "conj_physical"):
                made = parts[0][0], -parts[1][0]
            elif name in {*_CASTS, *REARRANGES, "add", "mul", "neg", "sub", "sum"}:
                kwargs = {k: x for k, x in kwargs.items() if k != "dtype"}
                made = tuple(func(*part, **kwargs) for part in parts)
            else:
                raise NoMeaning(func)
        return torch.complex(*made)

    def _known(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], result: Tensor) -> None:
        """What is known of all values that are copied is known of the copy."""
        for function in FUNCTIONS if self.field.known else ():
            there = {id(x): self.field.recall(function, x) for x in _flat(args) if _is_float(x)}
            if not there or any(x is None for x in there.values()):
                continue
            if self.field.recall(function, result) is None:  # else it is a view
                known: dict[int, Any] = there
                of = pytree.tree_map(lambda x, known=known: known.get(id(x), x), tuple(args))
                self.field.remember(function, result, self._call(func, name, of, kwargs, False))

    def _pointwise(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
        returned = func._schema.returns
        if len(returned) != 1 or torch.Tag.nondeterministic_seeded in func.tags:
            raise NoMeaning(func)
        kind = func(*map(_lifted, args), **kwargs).dtype
        result = pointwise(self.field, f"{name} {sorted(kwargs)}", [*args, *(kwargs[k] for k in sorted(kwargs))])
        return (
            result
            if kind.is_floating_point
            else to_integer(self.field, result, kind)
            if kind != torch.bool
            else result % 2 == 0
        )

    def _cast(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        if dtype is None or dtype.is_floating_point:
            return value(self.field, x)
        return to_integer(self.field, x, dtype)


def _part(i: int, x: Tensor) -> Tensor:
    """The real or the imaginary part of a complex number; a real one is a factor of both."""
    return torch.view_as_real(x.resolve_conj()).select(-1, i) if x.is_complex() else x


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _lifted(x: Any) -> Any:
    if isinstance(x, torch.dtype) and x.is_floating_point:
        return torch.float64
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _floating(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator reads or makes floating-point numbers."""
    if kwargs.get("dtype") is not None:
        return bool(kwargs["dtype"].is_floating_point)
    tensors = [x for x in _flat([*args, *kwargs.values()]) if isinstance(x, Tensor)]
    if any(x.is_floating_point() for x in tensors):
        return True
    if tensors and func._schema.is_mutable:
        return False
    found = func(*map(_lifted, args), **kwargs)  # such as integers divided by a number
    return any(isinstance(x, Tensor) and x.is_floating_point() for x in _flat([found]))


def _flat(arguments: Any) -> list[Any]:
    found: list[Any] = []
    for x in arguments:
        found += _flat(x) if isinstance(x, (tuple, list)) else [x]
    return found
