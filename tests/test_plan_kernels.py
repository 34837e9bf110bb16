"""Kernels of the dispatch plan and of the rows of each token, through Triton's interpreter, against ATen and float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import foldcc
from foldcc.codegen import plan, rows, source
from foldcc.codegen.regions import Region
from foldcc.ir.node import name_of
from foldcc.mesh import FoldedMesh
from foldcc.ops.experts import by_expert, count, expert_of_row, gather_rows, unpermute, unpermute_weights
from tests.models import WITH_AUX_LOSS, tiny_model, token_batch

aten = torch.ops.aten
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.float64: 1e-12}
DTYPES = st.sampled_from(list(TOLERANCE))
SEEDS = st.integers(0, 1000)
few = settings(max_examples=6, deadline=None)
Find = Callable[[fx.Graph, set[fx.Node]], list[Region]]
Mutation = Callable[[str], str]


class Poisoned:
    """torch, whose new tensors are full of what no kernel may leave behind."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, **kwargs: Any) -> Tensor:
        made = torch.empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else -1)


def launcher(region: Region, mutation: Mutation = str) -> Callable[..., Any]:
    """What a region's text, changed by a mutation, defines."""
    text = region.source("kernel")
    assert mutation is str or mutation(text) != text
    module: Any = source.load(source.write("test", f"{source.HEAD}\n\n{mutation(text)}\n"))
    module.torch = Poisoned()
    return module.kernel


def kernels(find: Find, fn: Callable[..., Any], *inputs: Any, mutation: Mutation = str) -> tuple[Tensor, ...]:
    """The results of a function that is one region altogether, by its kernels."""
    graph = make_fx(fn)(*inputs).graph
    (found,) = find(graph, set())
    given = dict(zip((n for n in graph.nodes if n.op == "placeholder"), inputs, strict=True))
    results = launcher(found, mutation)(*(given[n] for n in found.inputs))
    by_node = dict(zip(found.outputs, results if len(found.outputs) > 1 else (results,), strict=True))
    returned: Any = next(n for n in graph.nodes if n.op == "output").args[0]
    return tuple(by_node[n] for n in (returned if isinstance(returned, (tuple, list)) else (returned,)))


def error(result: Tensor, reference: Tensor) -> float:
    """The root mean square of a result's deviation, relative to that of the reference; of nothing, zero."""
    assert result.shape == reference.shape
    if not reference.numel():
        return 0.0
    deviation = (result.double() - reference.double()).norm() / reference.double().norm()
    return float(deviation.nan_to_num(nan=torch.inf))


def scattered(random: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers that are not contiguous."""
    made = torch.randn(*(2 * n + 1 for n in shape), generator=random).to(dtype)
    return made[tuple(slice(1, 2 * n + 1, 2) for n in shape)]


@pytest.fixture(autouse=True, scope="module")
def _kept_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("FOLDCC_CACHE")
    os.environ["FOLDCC_CACHE"] = str(Path(tmp_path_factory.mktemp("kernels")))
    yield
    os.environ.pop("FOLDCC_CACHE")
    if before is not None:
        os.environ["FOLDCC_CACHE"] = before


# --- the plan ---


def planned(experts: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda ids: (aten.sort.stable(ids.reshape(-1), stable=True)[1], count(ids, experts))


def routed(random: torch.Generator, tokens: int, k: int, experts: int, alone: bool) -> Tensor:
    """Chosen experts, [tokens, k], not contiguous; all the same one if `alone`."""
    if alone:
        return torch.full((k, tokens), experts - 1).t()
    return torch.randint(experts, (k, tokens), generator=random).t()


@few
@given(tokens=st.integers(0, 100), k=st.integers(1, 4), experts=st.integers(1, 70), alone=st.booleans(), seed=SEEDS)
@example(tokens=0, k=2, experts=8, alone=False, seed=0)
@example(tokens=1, k=1, experts=1, alone=False, seed=0)
@example(tokens=170, k=3, experts=5, alone=False, seed=0)
@example(tokens=129, k=1, experts=60, alone=True, seed=0)
def test_the_order_and_the_counts_are_those_of_a_stable_sort(tokens: int, k: int, experts: int, alone: bool, seed: int) -> None:
    ids = routed(torch.Generator().manual_seed(seed), tokens, k, experts, alone)
    for result, expected in zip(kernels(plan.find, planned(experts), ids), planned(experts)(ids), strict=True):
        assert result.dtype == torch.int64 and torch.equal(result, expected)


@pytest.mark.parametrize(
    "mutation",
    [
        lambda text: text.replace("start + rank", "start"),
        lambda text: text.replace("local[None, :] < local[:, None]", "local[None, :] > local[:, None]"),
        lambda text: text.replace(" + tl.load(before + b * E + e, mask=i < n, other=0)", ""),
        lambda text: text.replace("kernel_place[(n_blocks,)]", "kernel_place[(n_blocks - 1,)]"),
        lambda text: text.replace("i, mask=i < n)", "i * 0, mask=i < n)"),
    ],
    ids=["no rank", "not stable", "blocks forgotten", "last block dropped", "all zero"],
)
def test_a_wrong_order_is_seen(mutation: Mutation) -> None:
    ids = routed(torch.Generator().manual_seed(0), 150, 2, 5, False)
    assert not torch.equal(kernels(plan.find, planned(5), ids, mutation=mutation)[0], planned(5)(ids)[0])


@pytest.mark.parametrize(
    "fn",
    [
        lambda ids: aten.sort.stable(ids.reshape(-1), stable=True)[1],
        lambda ids: (*aten.sort.stable(ids.reshape(-1), stable=True), count(ids, 8)),
        lambda ids: (aten.sort.stable(ids.reshape(-1), stable=True)[1], count(ids + 1, 9)),
        lambda ids: (aten.sort.stable(ids.reshape(-1), stable=True, descending=True)[1], count(ids, 8)),
        lambda ids: (aten.sort.stable(ids.t().reshape(-1), stable=True)[1], count(ids + 0, 8)),
    ],
    ids=["no count", "values are read", "other ids", "descending", "other ids, transposed"],
)
def test_other_sorts_are_left_alone(fn: Callable[[Tensor], Any]) -> None:
    ids = torch.randint(8, (6, 2))
    assert not plan.find(make_fx(fn)(ids).graph, set())


CHUNKS = st.lists(st.sampled_from([0, 0, 1, 2, 7, 1030]), min_size=1, max_size=6)


@few
@given(experts=st.integers(1, 5), chunks=CHUNKS)
@example(experts=3, chunks=[0])
@example(experts=1, chunks=[5])
def test_chunks_are_put_together_by_expert(experts: int, chunks: list[int]) -> None:
    sizes = torch.tensor((chunks * experts)[: len(chunks) * experts])
    some = torch.zeros(int(sizes.sum()), 3)

    def fn(rows: Tensor, chunks: Tensor) -> Any:
        return by_expert(rows, chunks, experts)

    for result, expected in zip(kernels(plan.find, fn, some, sizes), fn(some, sizes), strict=True):
        assert result.dtype == torch.int64 and torch.equal(result, expected)


@few
@given(counts=st.lists(st.sampled_from([0, 1, 3, 90]), min_size=1, max_size=20))
@example(counts=[0, 0])
@example(counts=[300])
def test_every_row_knows_its_expert(counts: list[int]) -> None:
    some = torch.zeros(sum(counts), 2)
    per_expert = torch.tensor([x for n in counts for x in (n, 0)])[::2]
    (result,) = kernels(plan.find, expert_of_row, some, per_expert)
    assert torch.equal(result, expert_of_row(some, per_expert))


@pytest.mark.parametrize(
    "mutation",
    [lambda text: text.replace("<= i[:, None]", "< i[:, None]"), lambda text: text.replace("(triton.cdiv(n, ", "(n // (")],
    ids=["one too late", "last tile dropped"],
)
def test_a_wrong_expert_is_seen(mutation: Mutation) -> None:
    some, counts = torch.zeros(300, 2), torch.tensor([100, 0, 3, 197])
    (result,) = kernels(plan.find, expert_of_row, some, counts, mutation=mutation)
    assert not torch.equal(result, expert_of_row(some, counts))


# --- rows ---


def tokens_and_rows(seed: int, tokens: int, k: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, their order, weights and a gradient; none is contiguous."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(tokens * k, generator=random).repeat_interleave(2)[::2]
    some = scattered(random, tokens * k, hidden, dtype=dtype)
    return some, order, scattered(random, tokens, k, dtype=dtype), scattered(random, tokens, hidden, dtype=dtype)


SHAPES = {
    "seed": SEEDS,
    "tokens": st.integers(0, 6),
    "k": st.integers(1, 5),
    "hidden": st.sampled_from([1, 2, 24, 60, 1025]),
    "dtype": DTYPES,
}
EDGES: list[dict[str, Any]] = [
    {"tokens": 0, "k": 2, "hidden": 16},
    {"tokens": 1, "k": 1, "hidden": 3},
    {"tokens": 3, "k": 8, "hidden": 1500},
]


def edges(test: Callable[..., None]) -> Callable[..., None]:
    for edge in EDGES:
        test = example(seed=0, dtype=torch.float32, **edge)(test)
    return test


@few
@given(**SHAPES)
@edges
def test_each_token_sums_its_weighted_rows(seed: int, tokens: int, k: int, hidden: int, dtype: torch.dtype) -> None:
    some, order, weights, _ = tokens_and_rows(seed, tokens, k, hidden, dtype)
    (result,) = kernels(rows.find, unpermute, some, order, weights)
    assert result.dtype == dtype
    assert error(result, unpermute(some.double(), order, weights.double())) <= TOLERANCE[dtype]


@few
@given(**SHAPES)
@edges
def test_each_token_sums_its_rows(seed: int, tokens: int, k: int, hidden: int, dtype: torch.dtype) -> None:
    some, order, *_ = tokens_and_rows(seed, tokens, k, hidden, dtype)
    (result,) = kernels(rows.find, lambda rows, order: gather_rows(rows, order, k), some, order)
    assert error(result, gather_rows(some.double(), order, k)) <= TOLERANCE[dtype]


@few
@given(**SHAPES)
@edges
def test_the_gradient_of_the_weights(seed: int, tokens: int, k: int, hidden: int, dtype: torch.dtype) -> None:
    some, order, weights, grad = tokens_and_rows(seed, tokens, k, hidden, dtype)
    (result,) = kernels(rows.find, unpermute_weights, grad, some, order, weights)
    reference = unpermute_weights(grad.double(), some.double(), order, weights.double())
    # A dot product may cancel: its rounding is measured by the size of its terms.
    size = (grad.double().norm(dim=1, keepdim=True) * some.double().square().mean().sqrt()).expand_as(reference)
    assert error(result.double() + size, reference + size) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    "mutation",
    [
        lambda text: text.replace("c, total", "c, total * 0"),
        lambda text: text.replace("[:, None] * row", "[:, None] * 0 + row"),
        lambda text: text.replace("triton.cdiv(H, 1024)", "H // 1024"),
        lambda text: text.replace("range(K)", "range(K - 1)"),
        lambda text: text.replace("other=0), i, mask", "other=0), n - 1 - i, mask"),
    ],
    ids=["all zero", "unweighted", "last tile dropped", "last choice dropped", "other rows"],
)
def test_a_wrong_sum_is_seen(mutation: Mutation) -> None:
    some, order, weights, _ = tokens_and_rows(0, 3, 2, 1500, torch.float32)
    (result,) = kernels(rows.find, unpermute, some, order, weights, mutation=mutation)
    assert error(result, unpermute(some.double(), order, weights.double())) > 0.05


@pytest.mark.parametrize(
    "mutation",
    [
        lambda text: text.replace("tl.sum(total, 1)", "tl.sum(total, 1) * 0"),
        lambda text: text.replace("range(0, H, BH)", "range(0, H - BH, BH)"),
    ],
    ids=["all zero", "last tile dropped"],
)
def test_a_wrong_gradient_is_seen(mutation: Mutation) -> None:
    some, order, weights, grad = tokens_and_rows(0, 3, 2, 1500, torch.float32)
    (result,) = kernels(rows.find, unpermute_weights, grad, some, order, weights, mutation=mutation)
    reference = unpermute_weights(grad.double(), some.double(), order, weights.double())
    assert error(result, reference) > 0.05


# --- programs ---


def blocks_of(family: str) -> list[fx.Graph]:
    """The graphs of a folded model's program, forward and backward."""
    model = tiny_model(family, aux_loss=family in WITH_AUX_LOSS)
    program = foldcc.parallelize(model, FoldedMesh.parse("dp=2,tp=2|ep=4"), example_inputs=token_batch(4)).program
    return [b.graph for whole in (program.graph, program.backward) for b in whole.children()]  # type: ignore[misc]


def covered(graphs: Sequence[fx.Graph], find: Find) -> set[fx.Node]:
    """Nodes that regions compute; every region's text is written, and parses."""
    found: set[fx.Node] = set()
    for graph in graphs:
        for region in find(graph, set()):
            compile(region.source("kernel"), "kernel", "exec")
            assert not found & set(region.outputs)
            found |= set(region.nodes)
    return found


@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("qwen2_moe", marks=pytest.mark.slow)])
def test_the_plans_and_the_rows_of_programs_are_found(family: str) -> None:
    graphs = blocks_of(family)
    found = covered(graphs, plan.find) | covered(graphs, rows.find)
    operators = ["aten.sort", *(f"foldcc.{name}" for name in ("count", "by_expert", "expert_of_row"))]
    operators += [f"foldcc.{name}" for name in ("unpermute", "gather_rows", "unpermute_weights")]
    every = {n for g in graphs for n in g.nodes if n.op == "call_function" and name_of(n.target) in operators}
    assert {name_of(n.target) for n in every} >= set(operators) - {"foldcc.expert_of_row"}  # only where experts have biases
    assert every <= found
