"""Captured over sizes of inputs as symbols, and written down for sizes that have large prime factors.

    input_ids [s0, s1]                                 input_ids [262148, 524312]
    view(x, [sym_size(input_ids, 0), s1, -1, 8])  ->   view(x, [262148, 524312, -1, 8])

The tracer notes what it took for granted of the symbols (`s1 == s2`, `s1 <= 64`). For sizes for which that holds, the model
does the same, and only for them. A size such as `max(24 - s1, 0)` or `-s1 % 8` it writes down as it stands: that it is what it
is for the sizes that are written, here 0, is taken for granted as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from foldcc.capture import regions
from foldcc.ir.resize import Sizes, Unlike
from foldcc.ir.rewrite import replace_node

aten = torch.ops.aten

Names = Mapping[str, Sequence[str | None]]  # for each input, the name of each of its sizes; None for one that stays


@dataclass(frozen=True)
class Granted:
    """What a tracer took for granted of the sizes.

    Attributes:
        laws: in symbols, each with the place in the code that rests on it.
        symbols: the name of the size for which each of them stands.
    """

    laws: tuple[tuple[sympy.Basic, str], ...]
    symbols: Mapping[sympy.Symbol, str]

    def check(self, sizes: Sizes) -> None:
        """Raises Unlike for sizes for which the model may do something else."""
        values = {symbol: sympy.Integer(sizes[name]) for symbol, name in self.symbols.items()}
        for law, where in self.laws:
            if law.xreplace(values) != sympy.true:
                told = law.xreplace({symbol: sympy.Symbol(name) for symbol, name in self.symbols.items()})
                raise Unlike(f"the model takes {told} for granted ({where})")


class Varying:
    """Sizes that are symbols while a model is captured.

    Attributes:
        names: of the sizes of each input, by its path.
        marked: the sizes that are written down.
        granted: behind the capture.
    """

    def __init__(self, names: Names, marked: Sizes):
        self.names, self.marked = names, marked
        self.granted = Granted((), {})

    def dims(self, arguments: Any) -> Any:
        """What `torch.export` is told of each input."""

        def of(path: Any, x: Any) -> Any:
            names = self.names.get(pytree.keystr(path), ()) if isinstance(x, Tensor) else ()
            return {i: Dim.AUTO for i, name in enumerate(names) if name is not None} or None

        return pytree.tree_map_with_path(of, arguments)

    def written(self, exported: ExportedProgram, arguments: Any) -> None:
        """Puts numbers in the place of symbols, in place. A size to which the model is specialised loses its name.

        Raises:
            Unlike: the model does something with a size that is no number.
        """
        symbols, fixed = self._symbols(exported, arguments)
        env = _environment(exported)
        if env is None or not symbols:
            raise Unlike("it is specialised to all sizes")
        self.marked = {name: n for name, n in self.marked.items() if name in symbols.values()}
        self.granted = Granted(tuple((g.expr.xreplace(fixed), str(g.sloc).strip("()")) for g in env.guards), symbols)
        known = {symbol: sympy.Integer(self.marked[name]) for symbol, name in symbols.items()}
        turns: dict[sympy.Basic, str] = {}
        for graph in regions.parts(exported.graph_module):
            for node in list(graph.graph.nodes):
                _write(node, known, turns)
        laws = ((law.xreplace(fixed), where) for law, where in turns.items())
        self.granted = Granted((*self.granted.laws, *laws), symbols)
        exported.range_constraints.clear()

    def _symbols(
        self, exported: ExportedProgram, arguments: Any
    ) -> tuple[dict[sympy.Symbol, str], dict[sympy.Symbol, sympy.Integer]]:
        """The names of symbols, those that were found to be others too, and the sizes of those that the model fixes."""
        paths = iter([pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(arguments)])
        found: dict[sympy.Symbol, str] = {}
        fixed: dict[sympy.Symbol, sympy.Integer] = {}
        names: dict[str, list[str | None]] = {}
        placeholders = exported.graph.find_nodes(op="placeholder")
        for spec, node in zip(exported.graph_signature.input_specs, placeholders, strict=True):
            path = next(paths) if spec.kind == InputKind.USER_INPUT else None
            if path is None or not isinstance(node.meta.get("val"), Tensor):
                continue
            names[path] = []
            for size, name in zip(node.meta["val"].shape, self.names[path], strict=True):
                symbols = [size.node._expr, size.node.expr] if isinstance(size, torch.SymInt) else []
                if symbols and symbols[1].is_Integer:
                    fixed[symbols[0]] = symbols[1]
                free = bool(symbols) and not symbols[1].is_Integer
                names[path].append(name if free else None)
                if free and name is not None:
                    found |= {x: name for x in symbols if isinstance(x, sympy.Symbol)}
        self.names = names
        return found, fixed


def _environment(exported: ExportedProgram) -> ShapeEnv | None:
    values = (n.meta.get("val") for n in exported.graph.nodes)
    mode = next((x.fake_mode for x in values if isinstance(x, Tensor)), None)  # type: ignore[attr-defined]
    return None if mode is None else mode.shape_env


def _turns(size: sympy.Expr, known: Mapping[sympy.Symbol, sympy.Integer]) -> Iterator[sympy.Basic]:
    """What holds where a size is the sum of products of symbols that it is for the known ones.

    Raises:
        Unlike: it is made by something else.
    """
    for x in sympy.preorder_traversal(size):
        there = x.xreplace(known)
        if isinstance(x, (Max, Min, sympy.Max, sympy.Min)):
            yield sympy.Eq(x, next(y for y in x.args if y.xreplace(known) == there), evaluate=False)
        elif isinstance(x, (Mod, PythonMod, sympy.Mod)):
            yield sympy.Eq(x, there, evaluate=False)
        elif isinstance(x, FloorDiv):
            rest = PythonMod(*x.args)
            yield sympy.Eq(rest, rest.xreplace(known), evaluate=False)
        elif not (x.is_Symbol or x.is_Rational or isinstance(x, (sympy.Add, sympy.Mul, sympy.Pow))):
            raise Unlike(f"a size is {size}")


def _write(node: fx.Node, known: Mapping[sympy.Symbol, sympy.Integer], turns: dict[sympy.Basic, str]) -> None:
    def number(x: Any) -> Any:
        if not isinstance(x, torch.SymInt):
            return x
        turns.update(dict.fromkeys(_turns(x.node.expr, known), node.name))
        found = x.node.expr.xreplace(known)
        if not found.is_Integer:
            raise Unlike(f"a size of {node.name} is {x}")
        return int(found)

    def resized(x: Any) -> Any:
        if isinstance(x, (torch.SymFloat, torch.SymBool)):
            raise Unlike(f"{node.name} is a number that is made of sizes, {x}")
        if not isinstance(x, Tensor):
            return number(x)
        if not any(isinstance(n, torch.SymInt) for n in x.shape):
            return x
        shape, strides = [number(n) for n in x.shape], [number(n) for n in x.stride()]
        with x.fake_mode:  # type: ignore[attr-defined]
            return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)

    if "val" not in node.meta:
        return
    value = node.meta["val"]
    if isinstance(value, torch.SymInt):
        written = number(value)
        for user in list(node.users):
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: written if n is node else n)
        if node.op != "placeholder":
            node.graph.erase_node(node)
        return
    node.meta["val"] = pytree.tree_map(resized, value)
    if (
        node.target is aten.slice.Tensor
        and node.meta["val"].shape == node.args[0].meta["val"].shape
        and node.args[4:] in ((), (1,))
    ):
        replace_node(node, node.args[0])  # as the tracer leaves it out where it knows the size
