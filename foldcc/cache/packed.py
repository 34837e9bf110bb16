"""The stages of a pipeline as bytes, and back.

They are pickled, with a word for each kind of thing that a program is made of. What is read is made of these words, of
dataclasses of foldcc and of PyTorch's dtypes and devices: no other name that is found in a file is looked up, so that no code
on disk is run. What a program has in common with the one that the passes ran over is taken from that one, which is in memory.
"""

from __future__ import annotations

import copyreg
import io
import operator
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import import_module
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from foldcc.cache.key import META, Unkept
from foldcc.ir.names import FUNCTIONS
from foldcc.ir.program import Program
from foldcc.mesh import FoldedMesh

_NAMES = (torch.dtype, torch.layout, torch.memory_format)
_TYPES: dict[tuple[str, str], Any] = {
    ("torch", "device"): torch.device,
    ("torch", "Size"): torch.Size,
    ("builtins", "slice"): slice,
    ("collections", "OrderedDict"): OrderedDict,
}
_SIZES: dict[Any, Callable[..., Any]] = {
    sympy.Add: lambda *x: sum(x[1:], x[0]),
    sympy.Mul: lambda *x: x[0] * _SIZES[sympy.Mul](*x[1:]) if x[1:] else x[0],
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
}
_BY_NAME = {f.__name__: of for f, of in _SIZES.items()}


@dataclass(frozen=True)
class At:
    """A node among those of its graph, as an argument."""

    place: int


def pack(left: Any, given: Program) -> bytes:
    """What passes left of a program, as bytes.

    Raises:
        Unkept: something is in it that bytes do not say.
    """
    file = io.BytesIO()
    _Writer(file, given).dump(left)
    return file.getvalue()


def unpack(packed: bytes, given: Program) -> Any:
    """What was packed, for the program that it was made of.

    Raises:
        Exception: whatever comes of bytes that were not packed by the same code.
    """
    return _Reader(io.BytesIO(packed), given).load()


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, given: Program):
        super().__init__(file, protocol=5)
        self.given = given
        self.worlds: dict[int, int] = {}  # of sizes that data decide, numbered

    def reducer_override(self, x: Any) -> Any:
        if isinstance(x, FakeTensor):
            stride = x.stride() if x.layout == torch.strided else None
            return _fake, (self._world(x.fake_mode.shape_env), tuple(x.shape), stride, x.dtype, x.device)
        if isinstance(x, torch.SymInt):
            return _size, (self._world(x.node.shape_env), _expression(x.node.expr))
        if isinstance(x, fx.GraphModule):
            return _graph, (_nodes(x), dict(x.named_children()))
        if isinstance(x, Program):
            return _program, ({f.name: y for f in fields(x) if (y := getattr(x, f.name)) is not getattr(self.given, f.name)},)
        if isinstance(x, torch._ops.OpOverload):
            return _overload, (x.namespace, x._schema.name.split("::")[1], x._overloadname)
        if isinstance(x, sympy.Symbol):
            return _symbol, (x.name, dict(x._assumptions_orig))
        name = getattr(x, "__name__", "")
        if callable(x) and FUNCTIONS.get(name) is x:
            return _function, (name,)
        if isinstance(x, FoldedMesh) and x == self.given.mesh:
            return _mesh, ()
        if isinstance(x, _NAMES):
            return _named, (str(x).removeprefix("torch."),)
        if isinstance(x, type) or x in _WORDS or (type(x).__module__, type(x).__name__) in _TYPES:
            return NotImplemented
        if isinstance(x, tuple) and type(x).__module__.startswith("foldcc."):
            return copyreg.__newobj__, (type(x), *x)  # type: ignore[attr-defined]
        if is_dataclass(x) and type(x).__module__.startswith("foldcc."):
            return copyreg.__newobj__, (type(x),), {f.name: getattr(x, f.name) for f in fields(x)}  # type: ignore[attr-defined]
        raise Unkept(f"a {type(x).__module__}.{type(x).__qualname__} is in it, which is not written to disk")

    def _world(self, env: ShapeEnv | None) -> int:
        return self.worlds.setdefault(id(env), len(self.worlds))


def _nodes(graph: fx.GraphModule) -> list[tuple[Any, ...]]:
    place = {node: At(i) for i, node in enumerate(graph.graph.nodes)}

    def plain(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return place[x]
        if isinstance(x, list):
            return [plain(y) for y in x]
        if type(x) is tuple:
            return tuple(plain(y) for y in x)
        return {k: plain(y) for k, y in x.items()} if isinstance(x, dict) else x

    def told(node: fx.Node) -> tuple[Any, ...]:
        if node.op == "get_attr" or "kernel" in node.meta:
            raise Unkept(f"{node.name} is an attribute or a kernel")
        meta = {k: node.meta[k] for k in META if k in node.meta}
        return node.op, node.name, node.target, plain(node.args), plain(node.kwargs), meta

    return [told(node) for node in graph.graph.nodes]


def _expression(x: sympy.Expr) -> Any:
    """A size as numbers, names, and tuples of an operation and what it is of."""
    if isinstance(x, sympy.Symbol):
        return x.name
    if x.is_Integer:
        return int(x)
    if x.func not in _SIZES:
        raise Unkept(f"the size {x} is in it, which is not written to disk")
    return (x.func.__name__, *map(_expression, x.args))


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, given: Program):
        super().__init__(file)
        self.given = given
        self.worlds: dict[int, _World] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__ and name in _BY_WORD:
            word = _BY_WORD[name]
            return lambda *args: word(self, *args)
        if (module, name) in _TYPES:
            return _TYPES[module, name]
        found = getattr(import_module(module), name, None) if module.startswith("foldcc.") else None
        if isinstance(found, type) and (is_dataclass(found) or issubclass(found, tuple)):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is nothing that a program is made of")

    def world(self, number: int) -> _World:
        return self.worlds.setdefault(number, _World())


class _World:
    """Fake tensors of one mode, and the sizes that data decide in it."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.sizes: dict[str, torch.SymInt] = {}

    def size(self, told: Any) -> Any:
        if isinstance(told, int):
            return told
        if isinstance(told, tuple):
            return _BY_NAME[told[0]](*map(self.size, told[1:]))
        while told not in self.sizes:
            assert self.mode.shape_env is not None
            made = self.mode.shape_env.create_unbacked_symint()
            torch._check(made >= 0)
            if str(made) in self.sizes or len(self.sizes) > 10_000:
                raise pickle.UnpicklingError(f"{told} is no size that data decide")
            self.sizes[str(made)] = made
        return self.sizes[told]


# --- the words; each is given the reader --------------------------------------------------------------


def _fake(reader: Any, world: int, shape: Sequence[Any], stride: Any, dtype: torch.dtype, device: torch.device) -> FakeTensor:
    mode = reader.world(world).mode
    if stride is None:
        raise pickle.UnpicklingError("a tensor without strides")
    return FakeTensor(mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)


def _size(reader: Any, world: int, told: Any) -> Any:
    return reader.world(world).size(told)


def _graph(reader: Any, nodes: Sequence[tuple[Any, ...]], blocks: Mapping[str, fx.GraphModule]) -> fx.GraphModule:
    graph, root = fx.Graph(), torch.nn.Module()
    made: list[fx.Node] = []

    def read(x: Any) -> Any:
        if isinstance(x, At):
            return made[x.place]
        if isinstance(x, (tuple, list)):
            return type(x)(map(read, x))
        return {k: read(y) for k, y in x.items()} if isinstance(x, dict) else x

    for op, name, target, args, kwargs, meta in nodes:
        node = graph.create_node(op, target, read(args), read(kwargs), name=name)
        if node.name != name:
            raise pickle.UnpicklingError(f"a second node is called {name}")
        node.meta = meta
        made.append(node)
    for name, block in blocks.items():
        setattr(root, name, block)
    return _LazyGraphModule(root, graph)


def _program(reader: Any, changed: Mapping[str, Any]) -> Program:
    return replace(reader.given, **changed)


def _overload(reader: Any, space: str, name: str, overload: str) -> Any:
    found = getattr(getattr(getattr(torch.ops, space), name), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise pickle.UnpicklingError(f"{space}.{name}.{overload} is no operator")
    return found


def _symbol(reader: Any, name: str, known: Mapping[str, bool]) -> sympy.Symbol:
    return sympy.Symbol(name, **known)


def _named(reader: Any, name: str) -> Any:
    found = getattr(torch, name)
    if not isinstance(found, _NAMES):
        raise pickle.UnpicklingError(f"torch.{name} is no dtype, layout or format")
    return found


def _function(reader: Any, name: str) -> Any:
    return FUNCTIONS[name]


def _mesh(reader: Any) -> FoldedMesh:
    mesh: FoldedMesh = reader.given.mesh
    return mesh


_WORDS = (_fake, _size, _graph, _program, _overload, _symbol, _named, _function, _mesh)
_BY_WORD = {f.__name__: f for f in _WORDS}
