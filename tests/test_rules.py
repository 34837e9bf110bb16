"""Every factor rule against the real operator: cut the operands in each legal way, run on each rank, join, compare."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import sympy
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from foldcc import ops
from foldcc.ir.node import name_of, operands
from foldcc.ir.program import Program, Slot
from foldcc.layout import INVARIANT, PARTIAL, REPLICATED, Layout, Shard, State
from foldcc.mesh import FoldedMesh
from foldcc.ops.capacity import places
from foldcc.ops.captured import _CAPTURED, Division, Site
from foldcc.ops.experts import activation
from foldcc.ops.groups import active
from foldcc.ops.share import share
from foldcc.passes.localize import Localize
from foldcc.plan.interface import flows
from foldcc.plan.strategies import Strategist, Strategy, results_of
from foldcc.rules import aten as rules
from foldcc.rules.aten import rule_of
from foldcc.rules.notation import Pattern, Rule, notation
from foldcc.runtime.placement import cut, join
from foldcc.runtime.simulate import simulate

aten = torch.ops.aten
Size = Callable[[], int]
Call = tuple[Any, ...]  # an operator and its arguments; keyword arguments in a dict at the end

# --- a small call for each operator -----------------------------------------------------------------------------------


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def ids(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


def each(names: str, overload: str, make: Callable[[Any, Size], Call]) -> Iterator[tuple[str, Callable[[Size], Call]]]:
    """The same call of several ATen operators."""
    for name in names.split():
        yield f"aten.{name}", partial(make, getattr(getattr(aten, name), overload))


def axis(n: Size, rank: int) -> int:
    """A dimension, counted from either end."""
    return n() % rank - (rank if n() > 3 else 0)


def axes(n: Size, rank: int) -> list[int]:
    """Some dimensions, at least one, each counted from either end."""
    return [d - (rank if n() > 3 else 0) for d in range(rank) if d == n() % rank or n() > 3] or [axis(n, rank)]


def some(n: Size) -> int:
    """A size that may be none."""
    return n() % 12


def _table() -> Iterator[tuple[str, Callable[[Size], Call]]]:
    """`n()` draws a size; a builder that needs one twice gives it a name."""
    yield "aten.mm", lambda n: (aten.mm.default, real(n(), k := n()), real(k, n()))
    yield "aten.bmm", lambda n: (aten.bmm.default, real(b := n(), n(), k := n()), real(b, k, n()))
    yield "aten.addmm", lambda n: (aten.addmm.default, real(c := n()), real(n(), k := n()), real(k, c))
    yield "aten.linear", lambda n: (aten.linear.default, real(n(), n(), k := n()), real(m := n(), k), real(m))
    yield "aten.embedding", lambda n: (aten.embedding.default, real(v := n(), n()), ids(v, n(), n()))
    yield "aten.histc", lambda n: (aten.histc.default, ids(4, n(), n()).double(), 4, 0, 3)
    yield "aten.rms_norm", lambda n: (aten.rms_norm.default, real(n(), n(), h := n()), [h], real(h), 1e-5)
    yield "aten.layer_norm", lambda n: (aten.layer_norm.default, real(n(), h := n()), [h], real(h), real(h))
    yield "aten.native_layer_norm", lambda n: (
        aten.native_layer_norm.default, real(n(), h := n() + 1), [h], real(h), real(h), 1e-5,
    )  # fmt: skip
    yield "foldcc.token_loss", lambda n: (ops.token_loss, real(t := n(), v := n()), ids(v, t), 1)
    yield "foldcc.attention", _attention
    yield "foldcc.causal_conv", lambda n: (
        ops.causal_conv, real(n(), i := n(), n()), real(*((i, 1) if (alone := n() > 3) else (n(), i)), 3), None, alone,
    )  # fmt: skip
    yield "foldcc.experts", _experts
    yield "foldcc.places", _places_of_choices
    yield "foldcc.share", lambda n: (share.overload, real(n(), n()))
    yield "foldcc.random_bits", lambda n: (ops.random_bits.overload, torch.tensor(7), [torch.arange(n()), torch.arange(n())])
    yield "aten.matmul", lambda n: (aten.matmul.default, real(n(), 1, n(), k := n()), real(n(), k, n()))
    yield "aten.arange", lambda n: (aten.arange.default, n())
    yield "aten.expand", lambda n: (aten.expand.default, real(a := n(), 1, b := n()), [n(), a, n(), -1 if n() > 3 else b])
    yield "aten.t", lambda n: (aten.t.default, real(n(), n()))
    yield "aten.permute", lambda n: (
        aten.permute.default, real(some(n), n(), n()), [d - 3 * (n() > 3) for d in list(permutations(range(3)))[n() % 6]],
    )  # fmt: skip
    yield "aten.transpose", lambda n: (aten.transpose.int, real(n(), some(n), n()), axis(n, 3), axis(n, 3))
    yield "aten.unsqueeze", lambda n: (aten.unsqueeze.default, real(n(), some(n)), axis(n, 3))
    yield "aten.squeeze", _squeeze
    yield "aten.select", lambda n: (aten.select.int, real(n() + 1, n() + 1, n() + 1), axis(n, 3), axis(n, 2))
    yield "aten.slice", _slice
    yield "aten.slice_scatter", _slice_scatter
    yield "aten.unbind", lambda n: (aten.unbind.int, real(n() % 5, some(n), n() % 5), (0, 2, -1, -3)[n() % 4])
    yield "aten.cat", _cat
    yield "aten.stack", lambda n: (aten.stack.default, [real(a := n(), b := some(n)), real(a, b)], axis(n, 3))
    yield "aten.one_hot", lambda n: (aten.one_hot.default, ids(3, n(), n()), 3)
    yield "aten.gather", lambda n: (aten.gather.default, *_places(n))
    yield "aten.scatter", lambda n: (aten.scatter.value, *_places(n), 1.5)
    yield "aten.scatter_add", lambda n: (aten.scatter_add.default, *(p := _places(n)), real(*p[2].shape))
    yield "aten.index_add", lambda n: (
        aten.index_add.default, x := real(n(), n(), n()), d := axis(n, 3), ids(x.shape[d], r := some(n)),
        real(*(r if i == d % 3 else size for i, size in enumerate(x.shape))),
    )  # fmt: skip
    yield "aten.pad", lambda n: (aten.pad.default, *_shifted(n)[1:3])
    yield "aten.constant_pad_nd", _shifted
    yield "aten.select_scatter", lambda n: (
        aten.select_scatter.default, x := real(n(), 3, n()), x.select(d := axis(n, 3), 0).clone(), d, n() % x.shape[d],
    )  # fmt: skip
    yield "aten.convolution", lambda n: (
        aten.convolution.default, real(n(), i := n(), 5), real(o := n(), i, 3), real(o), [1], [1], [1], False, [0], 1,
    )  # fmt: skip
    for rank in (1, 2, 3):
        yield f"aten.conv{rank}d", partial(_conv, f"conv{rank}d", "default", rank)
        yield f"aten.conv_transpose{rank}d", partial(_conv, f"conv_transpose{rank}d", "default" if rank == 1 else "input", rank)
    yield "aten.reshape", _reshape
    yield "aten.split", lambda n: (aten.split.Tensor, real(n(), n() + n()), n(), axis(n, 2))
    yield "aten.split_with_sizes", lambda n: (aten.split_with_sizes.default, real(n(), (a := some(n)) + (b := n())), [a, b], -1)
    yield "aten.chunk", lambda n: (aten.chunk.default, real(n(), 2 * n()), 2 + n() % 2, axis(n, 2))
    yield "aten.scalar_tensor", lambda n: (aten.scalar_tensor.default, 2.0)
    yield from each("zeros ones", "default", lambda f, n: (f, [n(), n()]))
    yield from each("new_zeros new_ones", "default", lambda f, n: (f, real(n()), [n(), n()]))
    yield from each("zeros_like ones_like", "default", lambda f, n: (f, real(n(), n())))
    yield "aten.full", lambda n: (aten.full.default, [n(), n()], 3.0)
    yield "aten.new_full", lambda n: (aten.new_full.default, real(n()), [n(), n()], 3.0)
    yield "aten.full_like", lambda n: (aten.full_like.default, real(n(), n()), 3.0)
    yield "aten.empty", lambda n: (aten.empty.memory_format, [n(), n()])
    yield "aten.new_empty", lambda n: (aten.new_empty.default, real(n()), [n(), n()])
    yield "aten.empty_like", lambda n: (aten.empty_like.default, real(n(), n()))
    yield "aten.sum", lambda n: _reduced(aten.sum.default, aten.sum.dim_IntList, n)
    yield "aten.mean", lambda n: _reduced(aten.mean.default, aten.mean.dim, n)
    yield from each("softmax log_softmax", "int", lambda f, n: (f, real(n(), some(n), n()), axis(n, 3)))
    yield from each("_safe_softmax", "default", lambda f, n: (f, real(n(), some(n), n()), axis(n, 3)))
    yield from each("_softmax _log_softmax", "default", lambda f, n: (f, real(n(), n(), n()), axis(n, 3), False))
    yield from each("cumsum cumprod", "default", lambda f, n: (f, real(n(), some(n)), axis(n, 2)))
    yield from each("sort argsort", "default", lambda f, n: (f, real(n(), n()), axis(n, 2), n() > 3))
    yield "aten.topk", lambda n: (aten.topk.default, real(2 * n(), 2 * n()), 1 + n() % 2, axis(n, 2), n() > 3)
    yield "aten.argmax", lambda n: (aten.argmax.default, real(n(), n(), n()), axis(n, 3) if n() > 1 else None, n() > 3)
    yield from each("amax amin", "default", lambda f, n: (f, real(n(), n(), n()), axes(n, 3), n() > 2))
    yield from each("max min", "dim", lambda f, n: (f, real(n(), n()), axis(n, 2), n() > 3))
    yield from each("any all", "dim", lambda f, n: (f, ids(2, n(), n()).bool(), axis(n, 2), n() > 3))
    yield "aten.prod", lambda n: (aten.prod.dim_int, real(n(), n()), axis(n, 2), n() > 3)
    yield from each("tril triu", "default", lambda f, n: (f, real(n(), n(), n()), n() - 3))
    yield "aten.flip", lambda n: (aten.flip.default, real(n(), n(), n()), [axis(n, 3)])
    yield "aten.roll", lambda n: (aten.roll.default, real(n(), n(), n()), [n()], [axis(n, 3)])
    yield from each("add sub mul div", "Tensor", lambda f, n: (f, *_broadcast(n)))
    yield "aten.floor_divide", lambda n: (aten.floor_divide.default, *_broadcast(n))
    yield from each("neg exp silu gelu sigmoid rsqrt tanh cos", "default", lambda f, n: (f, real(n(), n()).abs() + 1))
    yield from each("clone alias detach contiguous lift_fresh_copy", "default", lambda f, n: (f, real(n(), n())))
    yield from each("eq lt ge", "Tensor", lambda f, n: (f, ids(3, n(), b := n()), ids(3, b)))
    yield "aten.where", lambda n: (aten.where.self, ids(2, a := n(), 1).bool(), real(a, b := n()), real(b))
    yield "aten.masked_fill", lambda n: (aten.masked_fill.Scalar, real(a := n(), b := n()), ids(2, a, b).bool(), 2.0)
    yield "aten.fill", lambda n: (aten.fill.Tensor, real(n(), n()), torch.tensor(2.0))
    yield from each("max_pool2d avg_pool2d", "default", lambda f, n: (f, real(n(), n(), 5, 4), [3, 2], [2, 2], [1, 1]))
    yield "aten.clamp", lambda n: (aten.clamp.default, real(n(), n()), -0.5, 0.5)
    yield "aten.pow", lambda n: (aten.pow.Tensor_Scalar, real(n(), n()), 2)
    yield "aten.bitwise_not", lambda n: (aten.bitwise_not.default, ids(2, n(), n()).bool())
    yield "aten.logical_and", lambda n: (aten.logical_and.default, ids(2, a := n()).bool(), ids(2, n(), a).bool())
    yield "aten._to_copy", lambda n: (aten._to_copy.default, real(n(), n()), {"dtype": torch.float64})
    yield "aten.copy", lambda n: (aten.copy.default, real(a := n(), b := n()), real(a, b))
    yield "aten.dropout", lambda n: (aten.dropout.default, real(n(), n()), 0.5, False)


def _squeeze(n: Size) -> Call:
    x = real(n() if n() > 3 else 1, n(), 1)
    return (
        (aten.squeeze.default, x)
        if n() > 4
        else (aten.squeeze.dims, x, axes(n, 3))
        if n() > 2
        else (aten.squeeze.dim, x, axis(n, 3))
    )


def _slice_scatter(n: Size) -> Call:
    whole, dim = [n(), 4, n()], axis(n, 3)
    start, step = -1 - n() % 3, 1 + n() % 2
    x = real(*whole)
    return aten.slice_scatter.default, x, torch.randn_like(aten.slice(x, dim, start, None, step)), dim, start, None, step


def _cat(n: Size) -> Call:
    sizes, dim = [n(), n(), n()], axis(n, 3)
    parts = [real(*(some(n) if i == dim % 3 else size for i, size in enumerate(sizes))) for _ in range(2 + n() % 2)]
    return aten.cat.default, parts if n() > 2 else [parts[0], parts[0].clone()], dim


def _places(n: Size) -> Call:
    """A tensor, a dimension of it, and places in that dimension."""
    x, dim = real(n(), n(), n()), axis(n, 3)
    count = n()
    return x, dim, ids(x.shape[dim], *(count if i == dim % 3 else size for i, size in enumerate(x.shape)))


def _broadcast(n: Size) -> Call:
    """Two tensors, each of which may have fewer dimensions, or ones where the other has more."""
    whole = [n(), some(n), n()]
    first, second = ([size if n() > 1 else 1 for size in whole][n() % 3 if n() > 6 else 0 :] for _ in range(2))
    return real(*first), real(*second)


def _shifted(n: Size) -> Call:
    """Amounts of both signs, which may keep a dimension's size and move its entries."""
    amounts = [(n() % 4) - 1 for _ in range(2)]
    sizes = [n() + 1, n() + 1]
    back = [-a if n() > 2 else 1 for a in amounts]
    return aten.constant_pad_nd.default, real(*sizes), [amounts[0], back[0], amounts[1], back[1]], 0.0


def _conv(name: str, overload: str, rank: int, n: Size) -> Call:
    i, o, groups = n(), n(), n() > 4
    count = i if groups else 1
    weight = (i, o) if "transpose" in name else (o * count, i // count)
    bias = o * count
    rest = ([1], [0], [0], count) if "transpose" in name else ([1], [1], [1], count)
    return getattr(getattr(aten, name), overload), real(n(), i, *[4] * rank), real(*weight, *[3] * rank), real(bias), *rest


def _attention(n: Size) -> Call:
    batch, heads, group, length = n(), n(), n(), n()
    q, k, v = real(batch, heads * group, length, 4), real(batch, heads, length, 4), real(batch, heads, length, 3)
    sinks = real(heads * group) if n() > 2 else None
    valid = ids(2, batch, length).bool() if n() > 2 else None
    mask = real(1 if n() > 2 else batch, 1 if n() > 2 else heads * group, length, length) if n() > 2 else None
    mask = mask if mask is None or n() > 2 else mask > 0
    return (
        ops.attention, q, k, v, sinks, valid, 0.5, n() > 2, 3 if n() > 2 else 0, 0.5 if n() > 2 else 0.0, None, None,
        0.0, mask,
    )  # fmt: skip


def _experts(n: Size) -> Call:
    experts, hidden, width, tokens = 4, n(), n(), n()
    text = activation(lambda x: x.chunk(2, -1)[0].tanh())
    return (
        ops.experts_node, real(tokens, hidden), ids(experts, tokens, 2), real(tokens, 2), real(experts, 2 * width, hidden),
        real(experts, hidden, width), real(experts, 2 * width), real(experts, hidden), text, False, False,
    )  # fmt: skip


def _slice(n: Size) -> Call:
    pieces, piece, dim = n(), n(), axis(n, 2)
    x = real(*(pieces * piece if i == dim % 2 else n() for i in range(2)))
    start, stop = (piece, 2 * piece) if n() > 2 and pieces > 1 else (some(n) - 6, n() - 3)
    return aten.slice.Tensor, x, dim, start if n() > 1 else None, stop, 1 + n() % 2


def _places_of_choices(n: Size) -> Call:
    experts, shape = n(), (n(), n(), n())
    return places.overload, ids(experts, *shape), real(*shape), experts, 1.0, True, False


def _reshape(n: Size) -> Call:
    a, b, c, d = n(), n(), n(), some(n)
    shapes = [[a * b, c, d], [a, b * c, d], [a * b, c * d], [a, b, c, d], [a * b * c * d], [a, 1, b * c, d]]
    return aten.reshape.default, real(*shapes[n() % 6]), shapes[(n() + 1) % 6]


def _reduced(whole: Any, along: Any, n: Size) -> Call:
    x = real(n(), n(), n())
    return (whole, x) if n() > 4 else (along, x, axes(n, 3), n() > 2)


BUILDERS: Mapping[str, Callable[[Size], Call]] = dict(_table())
NAMED = {*rules.RULES, *(name_of(r.overload) for r in ops.captured_records())}  # before another test registers its own

# --- running a call in parallel ---------------------------------------------------------------------------------------

Dims = tuple[tuple[sympy.Symbol, ...], ...]


class Trial:
    """One call of an operator, and what is needed to run it on the ranks of an axis."""

    def __init__(self, call: Call, ranks: int, fine: bool):
        self.mesh = FoldedMesh.parse(f"tp={ranks}")
        self.target, *args = call
        self.kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
        self.args = args
        self.tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
        self.wanted = self.target(*args, **self.kwargs)
        node = self.block().find_nodes(op="call_function", target=self.target)[0]
        rule = rule_of(node)
        assert rule is not None, f"{self.target} has no rule for {[tuple(x.shape) for x in self.tensors]}"
        self.rule: Rule = rule
        self.sizes: dict[sympy.Symbol, int] = {}
        self.letters = {x: self._factors(x, size, fine) for x, size in rule.sizes.items()}

    def _factors(self, letter: str, size: int, fine: bool) -> tuple[sympy.Symbol, ...]:
        """A letter as a product of factors: one, or, if it is to be `fine`, two where its size allows."""
        outer = next((d for d in (2, 3) if size % d == 0 and size > d), 1) if fine else 1
        parts = [n for n in (outer, size // outer) if n != 1]
        symbols = tuple(sympy.Symbol(f"{letter}_{i}", positive=True) for i in range(len(parts)))
        self.sizes.update(zip(symbols, parts, strict=True))
        return symbols

    def block(self) -> fx.Graph:
        """A graph of the call alone, over global shapes."""
        graph, mode = fx.Graph(), FakeTensorMode()
        given = iter([graph.placeholder(f"x{i}") for i in range(len(self.tensors))])
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: next(given), (tuple(self.args), self.kwargs))
        node = graph.call_function(self.target, args, kwargs)
        results = [node]
        if isinstance(self.wanted, (tuple, list)):
            results = [graph.call_function(operator.getitem, (node, i)) for i in range(len(self.wanted))]
        graph.output(tuple(results))
        values = [*self.tensors, self.wanted, *(self.wanted if results != [node] else ())]
        for n, value in zip([n for n in graph.nodes if n.op != "output"], values, strict=True):
            n.meta |= {"val": pytree.tree_map_only(Tensor, mode.from_tensor, value), "grad": True}
        return graph

    def dims(self, pattern: Pattern) -> Dims:
        return tuple(tuple(f for x in dim for f in self.letters[x]) for dim in pattern)

    def annotated(self) -> fx.Node:
        node = self.block().find_nodes(op="call_function", target=self.target)[0]
        node.meta |= {"rule": self.rule, "letters": self.letters}
        pairs = [*zip(operands(node), self.rule.operands, strict=False), *zip(results_of(node), self.rule.results, strict=True)]
        for value, pattern in pairs:
            if value is not None and pattern is not None:
                value.meta["dims"] = self.dims(pattern)
        return node

    def strategies(self) -> list[Strategy]:
        found = Strategist("tp", self.sizes, self.mesh.size("tp"), {}, set(self.sizes)).of(self.annotated())
        return list(dict.fromkeys(found))

    def check(self, strategy: Strategy) -> None:
        """Runs the call as a strategy says and compares with the whole operator.

        Raises:
            AssertionError: the ranks' results do not make up the operator's.
        """
        node = self.annotated()
        ranks = {"tp": self.mesh.size("tp")}
        inputs = list(node.graph.find_nodes(op="placeholder"))
        states: dict[fx.Node, State] = dict.fromkeys(inputs, INVARIANT)
        states |= {x: s for x, s in zip(operands(node), strategy.operands, strict=True) if x is not None and s is not None}
        states |= {r: s for r, s in zip(results_of(node), strategy.results, strict=True) if r is not None}
        for value, state in states.items():
            dims = value.meta.get("dims", ((),) * value.meta["val"].dim())
            value.meta["layout"] = Layout(dims, self.sizes, {"tp": state}, ranks)
        held = [self._held(x, n.meta["layout"]) for x, n in zip(self.tensors, inputs, strict=True)]
        layouts = [n.meta["layout"] for n in results_of(node) if n is not None]
        block = self._localized(node.graph)
        with active(self.mesh):
            returned = simulate(self.mesh, block, held)
        wanted = self.wanted if isinstance(self.wanted, (tuple, list)) else [self.wanted]
        for parts, layout, whole in zip(zip(*returned, strict=True), layouts, wanted, strict=True):
            assert {tuple(p.shape) for p in parts} == {layout.shape}, f"{layout} is not the shape of what a rank has"
            if "empty" not in str(self.target):
                found = sum(parts) if layout.states["tp"] == PARTIAL else join(list(parts), layout, self.mesh, "result")
                torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9, equal_nan=True)

    def _held(self, x: Tensor, layout: Layout) -> list[Tensor]:
        """What each rank holds of an operand: its part, all of it, or a term of it."""
        count = self.mesh.world_size
        if layout.states["tp"] != PARTIAL:
            return [cut(x, layout, self.mesh, rank) for rank in range(count)]
        terms = [torch.randn_like(x) for _ in range(count - 1)]
        return [*terms, x - sum(terms)]

    def _localized(self, graph: fx.Graph) -> fx.GraphModule:
        """The local form of the block, through the pass that makes it."""
        block, main = fx.GraphModule(torch.nn.Module(), graph), fx.Graph()
        inputs = list(block.graph.find_nodes(op="placeholder"))
        (output,) = block.graph.find_nodes(op="output")
        actual = [main.placeholder(n.name) for n in inputs]
        call = main.create_node("call_module", "block", tuple(actual))
        main.output(tuple(main.call_function(operator.getitem, (call, i)) for i in range(len(output.args[0]))))
        root = torch.nn.Module()
        root.add_module("block", block)
        slots = tuple(Slot(n.name, "input", (n.name,)) for n in inputs)
        program = Program(fx.GraphModule(root, main), slots, pytree.treespec_leaf(), {}, self.mesh)
        return Localize().run(program).blocks["block"]


SIZES = st.sampled_from([1, 2, 3, 4, 6, 12])


def check_every_strategy(name: str, draw: Size, ranks: int, fine: bool) -> None:
    trial = Trial(BUILDERS[name](draw), ranks, fine)
    for strategy in trial.strategies():
        print(f"{trial.target} with operands {strategy.operands} and results {strategy.results}")
        trial.check(strategy)


@pytest.mark.parametrize("name", sorted(BUILDERS))
@settings(
    max_examples=8,
    phases=[Phase.generate, Phase.shrink],
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
@given(data=st.data(), ranks=st.sampled_from([2, 3]), fine=st.booleans(), seed=st.integers(0, 99))
def test_every_sharding_that_a_rule_allows_computes_the_same(
    name: str, data: st.DataObject, ranks: int, fine: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    check_every_strategy(name, lambda: data.draw(SIZES), ranks, fine)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_gradients_flow_through_what_autograd_lets_them(name: str) -> None:
    trial = Trial(BUILDERS[name](partial(random.Random(0).choice, [2, 4, 6])), 2, fine=False)
    args = pytree.tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.is_floating_point()), trial.args)
    given = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    node = trial.annotated()
    through = {n for n, x in zip(node.graph.find_nodes(op="placeholder"), given, strict=True) if x.requires_grad}
    found = trial.target(*args, **trial.kwargs)
    expected = any(x.requires_grad for x in pytree.tree_leaves(found) if isinstance(x, Tensor))
    assert flows(node, through) == expected


def attending(causal: bool, lengths: int = 4) -> Trial:
    heads = real(2, 2, lengths, 3)
    return Trial((ops.attention, heads, torch.randn_like(heads), torch.randn_like(heads), None, None, 0.5, causal, 0), 2, False)


def test_a_record_divides_what_its_rule_calls_whole_and_says_what_runs_then(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = []

    def first_queries_see_less(at: Site, q: fx.Node, **rest: Any) -> fx.Node:
        lowered.append(at.axes)
        return at.local(q=q, **{**rest, "causal": False})

    known = ops.captured_record(ops.attention)
    way = Division(("q",), lower=first_queries_see_less)
    monkeypatch.setitem(_CAPTURED, ops.attention, replace(known, divisions=(*known.divisions, way)))
    (queries,) = (s for s in attending(False).strategies() if s.operands[0] == Shard(2, 0, 1))
    assert queries.operands[1:3] == (REPLICATED, REPLICATED) and queries.results == (Shard(1, 0, 1),)
    attending(False).check(queries)
    assert lowered == ["tp"]
    with pytest.raises(AssertionError):
        attending(True).check(queries)


def test_every_rule_is_tested() -> None:
    assert NAMED <= BUILDERS.keys(), f"no call is built for {sorted(NAMED - BUILDERS.keys())}"


# --- wrong rules are caught -------------------------------------------------------------------------------------------


def widened(rule: Callable[..., Rule | None]) -> Callable[..., Rule | None]:
    """The rule with nothing that must be whole."""
    return lambda *arguments: replace(rule(*arguments), whole=frozenset())


def linear(rule: Callable[..., Rule | None]) -> Callable[..., Rule | None]:
    """The rule of a function that is not linear, as if it were."""
    return lambda *arguments: replace(rule(*arguments), linear=(frozenset([0]),))


WRONG = [
    ("aten.softmax", rules.RULES, widened(rules.RULES["aten.softmax"])),
    ("aten.cumprod", rules.RULES, widened(rules.RULES["aten.cumprod"])),
    ("aten.topk", rules.RULES, widened(rules.RULES["aten.topk"])),
    ("aten.tril", rules.RULES, widened(rules.RULES["aten.tril"])),
    ("aten.gather", rules.RULES, widened(rules.RULES["aten.gather"])),
    ("aten.amax", rules.RULES, linear(rules.RULES["aten.amax"])),
    ("aten.mm", rules.RULES, notation("m k, k n -> m n ; linear 0 1")),
    ("aten.linear", rules.RULES, notation("... k, n k, n -> ... n ; linear 0 | 1")),
    ("aten.addmm", rules.RULES, notation("n, m k, k n -> m n")),
    ("aten.rms_norm", rules.RULES, notation("... h, h -> ... h")),
    ("aten.bmm", rules.RULES, notation("b m k, c k n -> b m n ; linear 0 | 1")),
]


@pytest.mark.parametrize(("name", "table", "wrong"), WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_rule_is_caught(name: str, table: dict[str, Any], wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt() -> None:
        for seed in range(8):
            torch.manual_seed(seed)
            check_every_strategy(name, partial(random.Random(seed).choice, [2, 4, 6, 12]), 2, fine=False)

    attempt()
    monkeypatch.setitem(table, name, wrong)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        attempt()


def by_size(node: fx.Node, inputs: list[Any], outputs: list[Any]) -> Rule:
    """A rule for padding that takes a dimension that keeps its size for one that keeps its entries."""
    (source,), (out,) = inputs, outputs
    letters = tuple((f"d{i}",) for i in range(len(source)))
    result = tuple(x if n == m else (f"padded{i}",) for i, (x, n, m) in enumerate(zip(letters, source, out, strict=True)))
    sizes = {x: k for (x,), k in [*zip(letters, source, strict=True), *zip(result, out, strict=True)]}
    changed = {x for a, b in zip(letters, result, strict=True) if a != b for x in (*a, *b)}
    return Rule((letters,), (result,), sizes, frozenset(changed), (frozenset([0]),))


def test_a_rule_that_looks_at_sizes_is_found_within_200_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.RULES, "aten.constant_pad_nd", by_size)

    @settings(max_examples=200, phases=[Phase.generate], deadline=None, derandomize=True)
    @given(data=st.data())
    def attempt(data: st.DataObject) -> None:
        check_every_strategy("aten.constant_pad_nd", lambda: data.draw(SIZES), 2, fine=False)

    with pytest.raises(AssertionError):
        attempt()
