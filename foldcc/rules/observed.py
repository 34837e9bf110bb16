"""Rules of operators that no table has: what small runs of the operator show of its dimensions.

    x : [4, 3, 5]      y : [4, 7]      f(x[places]) is y[places], and so with gradients, for any places: "s0 a b -> s0 c"

A dimension of a result is followed where the operator treats each of its entries alone, wherever it stands: what it makes of
some entries of its operands, in any order, is those entries of the results and of the gradients. Arguments stay as they are,
so an operator that is told a size, or moves entries, is not followed along them. All other dimensions are whole. An operand
may be partial where the results at two terms add up to those at their sum.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from foldcc.errors import divisors
from foldcc.ir.node import operands
from foldcc.rules.notation import Pattern, Rule

Shape = tuple[int, ...]
Dims = tuple[int | None, ...]  # for each value, the dimension that is cut
_Draw = tuple[list[Tensor], tuple[Tensor, ...]]  # operands, and what the call makes of them
_ELEMENTS = 2**16  # how many numbers a run may take and make
_LEAST = 8  # to which sizes become smaller: numbers below it, such as dimensions, are never taken for a size
_DRAWS, _TRIES = 4, 16
_OPTIONS = 1024
# Namespaces of operators that act across ranks, or have rules of their own.
_ELSEWHERE = {"_c10d_functional", "_c10d_functional_autograd", "c10d", "c10d_functional", "foldcc"}
_IMPURE = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output}
# What operators raise for values or sizes that they do not take.
_REFUSED = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


class _SizesThatFit(TorchDispatchMode):
    """Kernels may read and write past the end of operands whose sizes do not fit together, as fused weight_norm does.

    So the decomposition of an operator is run where there is one: the operators in it check sizes. Where there is none, the
    shapes of the results are computed first, which checks them too.
    """

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in decomposition_table:
            return decomposition_table[func](*args, **kwargs)
        shapes = pytree.tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), (args, kwargs))
        func(*shapes[0], **shapes[1])
        return func(*args, **kwargs)


@dataclass(frozen=True)
class _Operand:
    """Stands for an operand among the arguments of a call."""

    position: int


@dataclass(frozen=True)
class _Call:
    """An operator with its arguments, the shapes and dtypes of operands, the shapes of results, and which are read."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[tuple[Shape, torch.dtype], ...]
    outputs: tuple[Shape, ...]
    read: tuple[bool, ...]

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        args, kwargs = pytree.tree_map_only(_Operand, lambda x: tensors[x.position], (self.args, self.kwargs))
        found = self.target(*args, **kwargs)
        return tuple(found) if isinstance(found, (tuple, list)) else (found,)

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The results without gradients; None where the operator refuses such operands."""
        try:
            with torch.no_grad(), _SizesThatFit():
                return self(tensors)
        except _REFUSED:
            return None

    def gradients(self, tensors: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor] | None:
        """Of the operands that have one; None where there is no derivative."""
        leaves = [x.detach().requires_grad_(_continuous(x.dtype)) for x in tensors]
        asked = [x for x in leaves if x.requires_grad]
        try:
            with _SizesThatFit():
                pairs = [(y, t) for y, t in zip(self(leaves), tangents, strict=True) if y.requires_grad]
                if not pairs:
                    return [torch.zeros_like(x) for x in asked]
                outputs, grads = zip(*pairs, strict=True)
                return list(torch.autograd.grad(outputs, asked, grads, materialize_grads=True))
        except _REFUSED:
            return None


_known: dict[Any, Any] = {}


def observed_rule(node: Node) -> Rule | None:
    """The rule that runs of a call show; None if it has to run on whole operands, or cannot be tried."""
    call = _call(node)
    rule: Rule | None = None if call is None else _once(call, _observed)
    if rule is None:
        return None
    given = iter(rule.operands)
    patterns = tuple(None if x is None else next(given) for x in operands(node))
    return replace(rule, operands=patterns, linear=observed_linear(node))


def observed_linear(node: Node) -> tuple[frozenset[int], ...]:
    """The operands, each in a group of its own, in which runs of a call show that it is linear."""
    call = _call(node)
    found: set[int] = set() if call is None else _once(call, _linear)
    there = [i for i, x in enumerate(operands(node)) if x is not None]
    return tuple(frozenset({there[i]}) for i in sorted(found))


def observed_reads(node: Node) -> frozenset[int]:
    """The operands whose numbers change results in runs of a call; all of them where it cannot be tried.

    A derivative of a linear operator may be given an operand for its shape alone.
    """
    call = _call(node)
    there = [i for i, x in enumerate(operands(node)) if x is not None]
    return frozenset(there if call is None else (there[i] for i in _once(call, _read)))


def _once(call: _Call, find: Callable[[_Call], Any]) -> Any:
    key = (find, call.target, repr(call))
    if key not in _known:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)  # every rank sees the same
            _known[key] = find(call)
    return _known[key]


def _call(node: Node) -> _Call | None:
    """A call of a pure operator without randomness, on tensors of known shapes."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace in _ELSEWHERE:
        return None
    if target._schema.is_mutable or _IMPURE & set(target.tags):
        return None
    given = [x for x in operands(node) if x is not None]
    made = node.meta["val"]
    results = tuple(made) if isinstance(made, (tuple, list)) else (made,)
    values = [*results, *(x.meta["val"] for x in given)]
    if not given or not all(isinstance(v, Tensor) and all(isinstance(n, int) for n in v.shape) for v in values):
        return None
    # Operands are counted in the order of the schema, whatever the order in which the call names them.
    named = {a.name: node.kwargs[a.name] for a in target._schema.arguments if a.name in node.kwargs}
    if [x for x in pytree.tree_leaves((node.args, named)) if isinstance(x, Node)] != given:
        return None  # a number of its arguments is computed
    count = iter(range(len(given)))
    args, kwargs = pytree.tree_map_only(Node, lambda _: _Operand(next(count)), (node.args, named))
    kwargs = {name: torch.device("cpu") if isinstance(x, torch.device) else x for name, x in kwargs.items()}
    inputs = tuple((tuple(x.meta["val"].shape), x.meta["val"].dtype) for x in given)
    taken = {u.args[1] for u in node.users if u.target is operator.getitem}
    read = tuple(not taken or i in taken for i in range(len(results)))
    return _Call(target, args, kwargs, inputs, tuple(tuple(v.shape) for v in results), read)


def _observed(call: _Call) -> Rule | None:
    small = _small(call)
    draws = [] if small is None else list(itertools.islice(_drawn(small), _DRAWS))
    if small is None or len(draws) < _DRAWS:
        return None
    names: dict[tuple[str, int, int], str] = {}
    for dim in range(len(call.outputs[call.read.index(True)])):
        found = _followed(call, small, draws, dim)
        for side, dims in zip("xy", found or (), strict=False):
            for place in ((side, i, d) for i, d in enumerate(dims) if d is not None):
                if place in names:
                    return None
                names[place] = f"s{dim}"
    sizes: dict[str, int] = {}

    def pattern(side: str, i: int, shape: Shape) -> Pattern:
        letters = [names.get((side, i, d), f"{side}{i}_{d}") for d in range(len(shape))]
        sizes.update(zip(letters, shape, strict=True))
        return tuple((x,) for x in letters)

    inputs = tuple(pattern("x", i, shape) for i, (shape, _) in enumerate(call.inputs))
    outputs = tuple(pattern("y", i, shape) for i, shape in enumerate(call.outputs))
    return Rule(inputs, outputs, sizes, frozenset(sizes) - set(names.values())) if names else None


def _linear(call: _Call) -> set[int]:
    """Positions of operands: the call at a sum of two values, one of them negative, is the sum of the calls at each."""
    small = _small(call)
    found = {i for i, (_, dtype) in enumerate(call.inputs) if dtype.is_floating_point}
    draws = [] if small is None else list(itertools.islice(_drawn(small), _DRAWS))
    if small is None or len(draws) < _DRAWS:
        return set()
    for tensors, whole in draws:
        for i in list(found):
            term = 1.5 - 2.5 * tensors[i].abs()
            terms = [small.run([*tensors[:i], x, *tensors[i + 1 :]]) for x in (term, tensors[i] - term)]
            sums = () if None in terms else tuple(map(operator.add, *terms))
            if not sums or not all(_continuous(y.dtype) for y in whole) or not _agree(call, sums, whole):
                found.discard(i)
    return found


def _read(call: _Call) -> set[int]:
    """Positions of operands: the call is not the same at other values."""
    small = _small(call)
    everything = set(range(len(call.inputs)))
    draws = [] if small is None else list(itertools.islice(_drawn(small), _DRAWS))
    if small is None or len(draws) < _DRAWS:
        return everything

    def changes(i: int) -> bool:
        pairs = ((small.run([*x[:i], other[i], *x[i + 1 :]]), y) for (x, y), (other, _) in zip(draws, draws[1:], strict=False))
        return any(found is None or not _agree(call, found, whole) for found, whole in pairs)

    return {i for i in everything if changes(i)}


def _small(call: _Call) -> _Call | None:
    """The call with its sizes divided until it is small enough; None if it cannot be.

    A number among the arguments must be one of the sizes, and becomes smaller with it, or be less than all that do.
    """
    shapes = [*(s for s, _ in call.inputs), *call.outputs]
    known = {n for s in shapes for n in s}
    numbers = {n for n in pytree.tree_leaves((call.args, call.kwargs)) if type(n) is int}
    by = 1
    while by <= max(known, default=1):
        less = {n: n // by for n in known if by > 1 and n % by == 0 and n // by >= _LEAST}
        scaled = {n: less.get(n, n) for n in known}
        few = sum(math.prod(scaled[n] for n in s) for s in shapes) <= _ELEMENTS
        told = all(n in known or abs(n) < min(less.values(), default=math.inf) for n in numbers)
        if few and told and len(set(scaled.values())) == len(known):
            break
        by *= 2
    else:
        return None
    args, kwargs = pytree.tree_map_only(int, lambda n: less.get(n, n), (call.args, call.kwargs))
    inputs = tuple((tuple(scaled[n] for n in s), dtype) for s, dtype in call.inputs)
    return replace(
        call, args=args, kwargs=kwargs, inputs=inputs, outputs=tuple(tuple(scaled[n] for n in s) for s in call.outputs)
    )


def _drawn(call: _Call) -> Iterator[_Draw]:
    """Operands and what the call makes of them: small, large, positive and definite numbers, integers that fit everywhere."""
    room = min((n for s, _ in call.inputs for n in s), default=2)

    def drawn(random: torch.Generator, kind: int, shape: Shape, dtype: torch.dtype) -> Tensor:
        if not _continuous(dtype):
            return torch.randint(2 if dtype == torch.bool else max(room, 1), shape, generator=random).to(dtype)
        x = torch.randn(shape, generator=random, dtype=torch.complex128 if dtype.is_complex else torch.float64)
        if kind == 1:
            return 100 * x
        if kind == 2:
            return x.abs() + 0.1
        square = kind == 3 and len(shape) > 1 and shape[-1] == shape[-2]
        return x @ x.mH + torch.eye(shape[-1], dtype=x.dtype) if square else x

    for seed in range(_TRIES):
        tensors = [drawn(torch.Generator().manual_seed(seed + 97 * i), seed % 4, *x) for i, x in enumerate(call.inputs)]
        first, second = call.run(tensors), call.run(tensors)
        if first is None or second is None:
            continue
        if not all(map(_close, first, second)) or tuple(tuple(y.shape) for y in first) != call.outputs:
            return  # randomness, or other sizes than those of the program
        yield tensors, first


def _followed(call: _Call, small: _Call, draws: Sequence[_Draw], dim: int) -> tuple[Dims, Dims] | None:
    """The dimensions of operands and results along which the operator treats each entry alone, with `dim` of the first."""
    first = call.read.index(True)
    size = call.outputs[first][dim]

    def alike(shape: Shape) -> Dims:
        return tuple(d for d, n in enumerate(shape) if n == size)

    given = [(*alike(s), None) for s, _ in call.inputs]
    made = [((dim,) if r == first else alike(s)) if call.read[r] else (None,) for r, s in enumerate(call.outputs)]
    if size == 1 or math.prod(map(len, (*given, *made))) > _OPTIONS:
        return None
    if all(_close(whole[first].select(dim, 0), whole[first].select(dim, -1)) for _, whole in draws):
        return None  # what it does was not seen
    for cut, left in itertools.product(itertools.product(*given), itertools.product(*made)):
        if set(cut) != {None} and all(_alone(small, *draw, cut, left) for draw in draws):
            return cut, left
    return None


def _alone(call: _Call, tensors: list[Tensor], whole: tuple[Tensor, ...], cut: Dims, left: Dims) -> bool:
    """Whether what the call makes of some entries are the entries of the whole, for parts of each size and in any order."""
    size = next(x.shape[d] for x, d in zip(tensors, cut, strict=True) if d is not None)
    order = torch.randperm(size)
    tangents = [torch.randn_like(y) if _continuous(y.dtype) else y for y in whole]
    expected = call.gradients(tensors, tangents)
    if expected is None:
        return False
    for places in (torch.tensor([0]), torch.tensor([size - 1]), *(order[:n] for n in divisors(size))):
        part = call.run(_at(tensors, cut, places))
        if part is None or not _agree(call, part, _at(whole, left, places)):
            return False
    chunks = order.chunk(divisors(size)[1])
    parts = [call.gradients(_at(tensors, cut, c), _at(tangents, left, c)) for c in chunks]
    if any(p is None for p in parts):
        return False
    dims = [d for x, d in zip(tensors, cut, strict=True) if _continuous(x.dtype)]
    for i, (gradient, d) in enumerate(zip(expected, dims, strict=True)):
        mine = [p[i] for p in parts if p is not None]
        together = torch.stack(mine).sum(0) if d is None else torch.cat(mine, d)
        if not _close(together, gradient if d is None else gradient.index_select(d, order)):
            return False
    return True


def _at(values: Sequence[Tensor], dims: Dims, places: Tensor) -> list[Tensor]:
    return [x if d is None else x.index_select(d, places) for x, d in zip(values, dims, strict=True)]


def _continuous(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _agree(call: _Call, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether the results that are read are the same."""
    return all(_close(x, y) for x, y, read in zip(found, wanted, call.read, strict=True) if read)


def _close(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not _continuous(x.dtype):
        return torch.equal(x, y)
    rounding = 2**10 * torch.finfo(x.dtype).eps
    largest = float(torch.where(y.isfinite(), y.abs(), 0).max()) if y.numel() else 0.0
    return torch.allclose(x, y, rtol=rounding, atol=rounding * max(1.0, largest), equal_nan=True)
