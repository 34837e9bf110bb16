"""Python numbers that a graph only computes with become inputs of its program.

    y = div(x, 50)                       # captured for num_items_in_batch=50, and again for 51
becomes
    y = div(x, _to_copy(num_items_in_batch, float32))

Two captured graphs must differ in nothing else, and while they were captured the model's own code must not have looked at the
number: a comparison, a `range` or arithmetic in Python may lead elsewhere for a third value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from foldcc.ir.program import Program, Slot
from foldcc.ir.rewrite import emit

aten = torch.ops.aten
_TENSOR = {
    aten.add.Tensor: aten.add.Tensor, aten.add.Scalar: aten.add.Tensor, aten.sub.Tensor: aten.sub.Tensor,
    aten.sub.Scalar: aten.sub.Tensor, aten.mul.Tensor: aten.mul.Tensor, aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Tensor: aten.div.Tensor, aten.div.Scalar: aten.div.Tensor,
}  # fmt: skip
_DTYPES = {int: torch.int64, float: torch.float64}
_LOW = (torch.bfloat16, torch.float16)  # operators compute in float32, and a number keeps its digits there
_LIMIT = 2**63
_LOOKS = """abs add and bool ceil divmod eq float floor floordiv format ge gt hash index int invert le lshift lt mod mul ne neg
or pos pow radd rand rdivmod repr rfloordiv rlshift rmod rmul ror round rpow rrshift rshift rsub rtruediv rxor str sub truediv
trunc xor""".split()


@contextmanager
def watched(model: nn.Module) -> Iterator[set[str]]:
    """The paths of Python numbers, among the arguments by name, that the forward of a model takes and does not look at.

    The set is filled while the model is called inside this context.
    """
    taken: set[str] = set()
    looked: set[str] = set()
    blind: set[str] = set()
    forward, before = model.forward, dict(vars(model))

    def substitute(path: Any, x: Any) -> Any:
        if type(x) not in _DTYPES:
            return x
        name = pytree.keystr(path)
        taken.add(name)
        return _WATCHED[type(x)](x, lambda: looked.add(name))

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **pytree.tree_map_with_path(substitute, kwargs))

    vars(model)["forward"] = call
    try:
        yield blind
    finally:
        if "forward" in before:
            vars(model)["forward"] = before["forward"]
        else:
            del vars(model)["forward"]
        blind.update(taken - looked)


def _watching(kind: type) -> type:
    """A number that tells when it is looked at; in an operator on tensors it is a number like any other."""

    def __new__(cls: type, value: Any, tell: Callable[[], None]) -> Any:
        new = kind.__new__(cls, value)
        object.__setattr__(new, "_tell", tell)
        return new

    def looks(name: str) -> Any:
        def method(self: Any, *others: Any) -> Any:
            if any(isinstance(x, Tensor) for x in others):
                return NotImplemented
            object.__getattribute__(self, "_tell")()
            return getattr(kind, name)(self, *others)

        return method

    def __getattribute__(self: Any, name: str) -> Any:
        if not name.startswith("__"):
            object.__getattribute__(self, "_tell")()
        return object.__getattribute__(self, name)

    names = [f"__{name}__" for name in _LOOKS]
    methods = {name: looks(name) for name in names if hasattr(kind, name)}
    return type(f"watched_{kind.__name__}", (kind,), {"__new__": __new__, "__getattribute__": __getattribute__, **methods})


_WATCHED = {kind: _watching(kind) for kind in _DTYPES}


def as_tensor(number: float, device: torch.device) -> Tensor:
    """A number as a program takes it."""
    return torch.tensor(number, dtype=_DTYPES[type(number)], device=device)


def as_inputs(program: Program, other: Program, numbers: Mapping[str, tuple[Any, Any]], paths: Sequence[str]) -> Program | None:
    """The program with numbers as inputs; None if it does something else with them than to compute.

    Args:
        program, other: the model, captured for two values of each number.
        numbers: both values of each number, by its path.
        paths: of all inputs that the result takes, in the order of the call.
    """
    found = program.copied()
    differences = _differences(found, other)
    if differences is None or not all(-_LIMIT <= x < _LIMIT for pair in numbers.values() for x in pair):
        return None
    uses: list[tuple[fx.Node, str]] = []
    for node, pair in differences:
        among = [path for path, values in numbers.items() if _same(values, pair)]
        if len(among) != 1:
            return None
        uses.append((node, among[0]))
    slots = list(found.slots)
    inputs = {path: _input(found.graph.graph, slots, path, kinds[0], paths) for path, kinds in numbers.items()}
    if not all(_computes_with(node, inputs[path]) for node, path in uses):
        return None
    found.graph.recompile()
    return replace(found, slots=tuple(slots))


def _differences(program: Program, other: Program) -> list[tuple[fx.Node, tuple[Any, Any]]] | None:
    """The operators whose second operand is another number in the other program; None if more than that differs."""
    nodes, others = list(program.graph.graph.nodes), list(other.graph.graph.nodes)
    same = all(getattr(program, x) == getattr(other, x) for x in ("slots", "out_spec", "updates")) and len(nodes) == len(others)
    if not same or not _same(program.literals, other.literals) or not _same(program.constants, other.constants):
        return None
    twins = dict(zip(nodes, others, strict=True))
    found = []
    for node, twin in twins.items():
        if (node.op, node.target) != (twin.op, twin.target) or node.op == "get_attr" or not _same_value(node, twin):
            return None
        mine = fx.map_arg((node.args, node.kwargs), lambda n: twins[n])
        theirs = (twin.args, twin.kwargs)
        if _same(mine, theirs):
            continue
        if node.target not in _TENSOR or not _same(_without_second(mine), _without_second(theirs)):
            return None
        found.append((node, (node.args[1], twin.args[1])))
    return found


def _without_second(arguments: Any) -> Any:
    args, kwargs = arguments
    return args[:1], args[2:], kwargs


def _same_value(node: fx.Node, twin: fx.Node) -> bool:
    """Whether two nodes hold tensors of the same shapes and dtypes."""
    mine, theirs = (pytree.tree_leaves(n.meta.get("val")) for n in (node, twin))
    told = [[(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves] for leaves in (mine, theirs)]
    return told[0] == told[1]


def _same(x: Any, y: Any) -> bool:
    """Equality that tells True from 1 and looks into tensors."""
    (mine, spec), (theirs, other) = pytree.tree_flatten(x), pytree.tree_flatten(y)
    if spec != other:
        return False
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a is not b and not (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)):
                return False
        elif type(a) is not type(b) or (repr(a) != repr(b) if isinstance(a, float) else a != b):
            return False
    return True


def _input(graph: fx.Graph, slots: list[Slot], path: str, number: Any, paths: Sequence[str]) -> fx.Node:
    """A placeholder for a number, at its place among the inputs of the call."""
    before = paths[: list(paths).index(path)]
    position = sum(s.kind != "input" or s.names[0] in before for s in slots)
    placeholders = list(graph.find_nodes(op="placeholder"))
    like = placeholders[0].meta["val"]
    with graph.inserting_after(placeholders[position - 1]):
        node = graph.placeholder("number")
    node.target = node.name
    with like.fake_mode:
        node.meta["val"] = torch.empty((), dtype=_DTYPES[type(number)], device=like.device)
    slots.insert(position, Slot(node.name, "input", (path,)))
    return node


def _computes_with(node: fx.Node, number: fx.Node) -> bool:
    """Gives an operator the input in place of the number; False if the result would be of another kind."""
    value = node.meta["val"]
    if not (value.dtype.is_floating_point or value.dtype == number.meta["val"].dtype):
        return False
    low = value.dtype in _LOW
    dtype = torch.float32 if low else value.dtype
    x = emit(node, aten._to_copy.default, node.args[0], dtype=dtype) if low else node.args[0]
    new = emit(node, _TENSOR[node.target], x, emit(node, aten._to_copy.default, number, dtype=dtype), **node.kwargs)
    if low:
        new = emit(node, aten._to_copy.default, new, dtype=value.dtype)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return bool((new.meta["val"].dtype, new.meta["val"].shape) == (value.dtype, value.shape))
