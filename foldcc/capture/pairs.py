"""Complex numbers as the two real ones that they are made of: layouts, collectives and proofs know real numbers alone.

z = view_as_complex(x)                  becomes       a, b = x.unbind(-1)
y = view_as_real(z * polar(r, t))       becomes       c, d = r * cos(t), r * sin(t)
                                                      y = stack([a * c - b * d, a * d + b * c], -1)

A buffer of complex numbers stays one; the program reads its parts, `view_as_real(buffer)`.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from foldcc.errors import FoldError
from foldcc.ir.node import name_of
from foldcc.ir.program import where
from foldcc.ir.rewrite import inline
from foldcc.rules.kinds import RESHAPES, SAME, TRANSPOSES, UNITS, named


class Complex(NamedTuple):
    re: Any
    im: Any


def _times(x: Any, y: Any) -> Complex:
    if isinstance(x, Complex) and isinstance(y, Complex):
        return Complex(x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re)
    z, factor = (x, y) if isinstance(x, Complex) else (y, x)
    return Complex(z.re * factor, z.im * factor)


_MEANINGS: dict[str, Callable[..., Any]] = {
    "aten.complex": Complex,
    "aten.view_as_complex": lambda x: Complex(*x.unbind(-1)),
    "aten.view_as_real": lambda z: torch.stack(z, -1),
    "aten.polar": lambda r, t: Complex(r * t.cos(), r * t.sin()),
    "aten.mul": _times,
    **dict.fromkeys(named("_conj conj conj_physical"), lambda z: Complex(z.re, -z.im)),
}
# What is done to both parts alike.
_ALIKE = (
    SAME | RESHAPES | UNITS | TRANSPOSES | named("_to_copy cat expand gather index index_select neg select slice stack sum")
)
_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


def in_pairs(graph: fx.Graph, held: Set[str]) -> None:
    """Rewrites the graph in place.

    Args:
        held: the placeholders of buffers and constants, which may be complex.

    Raises:
        FoldError: complex numbers enter or leave the program, or an operator is not known here.
    """
    if not any(map(_is_complex, graph.nodes)):
        return
    graph.eliminate_dead_code()  # such as what asks for a device
    pairs: dict[fx.Node, Complex | None] = {}  # None for a placeholder, whose parts are its last dimension
    for node in list(graph.nodes):
        if not _is_complex(node) and not any(x in pairs for x in node.all_input_nodes):
            continue
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
            continue
        if node.op == "placeholder" and node.name in held:
            pairs[node] = None
            with node.meta["val"].fake_mode:
                node.meta["val"] = torch.view_as_real(node.meta["val"])
            continue
        if node.op != "call_function":
            raise FoldError("Complex numbers enter or leave the program.", at=where(node), valid="torch.view_as_real of them")
        found = _real(node, pairs)
        if isinstance(found, Complex):
            pairs[node] = found
        else:
            node.replace_all_uses_with(found)
            graph.erase_node(node)
    for node in (n for n in reversed(pairs) if pairs[n] is not None):
        graph.erase_node(node)


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _real(node: fx.Node, pairs: dict[fx.Node, Complex | None]) -> Any:
    """The two parts of a complex result, or the node of a real one."""
    name, operands = name_of(node.target), node.all_input_nodes
    if name not in _MEANINGS and name not in _ALIKE:
        raise FoldError(f"foldcc does not know what {name} does to complex numbers.", at=where(node), valid="real numbers")

    def function(*values: Tensor) -> Any:
        left = iter(values)
        given = {x: Complex(*(next(left) for _ in pairs[x] or ())) if pairs.get(x) else next(left) for x in operands}
        given |= {x: Complex(*given[x].unbind(-1)) for x in operands if x in pairs and pairs[x] is None}
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        if name in _MEANINGS:
            return _MEANINGS[name](*args, **kwargs)
        kwargs = {k: _REAL.get(x, x) for k, x in kwargs.items()}

        def part(i: int) -> Any:
            return pytree.tree_map_only(Complex, lambda z: z[i], args, is_leaf=lambda x: isinstance(x, Complex))

        return Complex(*(node.target(*part(i), **kwargs) for i in (0, 1)))

    return inline(node, function, *(part for x in operands for part in pairs.get(x) or (x,)))
