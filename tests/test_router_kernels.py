"""The router's kernel, through Triton's interpreter, against float64: one region from scores to weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from tests.test_plan_kernels import (
    DTYPES,
    SEEDS,
    TOLERANCE,
    Mutation,
    _kept_elsewhere,  # noqa: F401
    blocks_of,
    error,
    few,
    kernels,
    launcher,
    scattered,
)  # isort: split

from foldcc.codegen import router
from foldcc.codegen.regions import is_free
from foldcc.ir.node import name_of

Router = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # logits, bias -> weights, ids, and what was searched


def normalised(k: int) -> Router:
    def route(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = (logits + bias).softmax(-1)
        weights, ids = scores.topk(k)
        return weights / weights.sum(-1, keepdim=True), ids, scores

    return route


def softmax_of_the_best(k: int) -> Router:
    def route(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = logits * 2 + bias
        best, ids = scores.topk(k)
        return best.softmax(1), ids, scores

    return route


def in_groups(k: int, groups: int, kept: int) -> Router:
    def route(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = logits.sigmoid()
        choice = scores + bias
        size = choice.shape[1] // groups
        of_group = choice.view(-1, groups, size).topk(min(2, size))[0].sum(-1)
        best = of_group.topk(kept, sorted=False)[1]
        mask = torch.zeros_like(of_group).scatter(1, best, 1).unsqueeze(-1)
        mask = mask.expand(-1, groups, size).reshape(choice.shape)
        choice = choice.masked_fill(~mask.bool(), float("-inf"))
        ids = choice.topk(k, sorted=False)[1]
        weights = scores.gather(1, ids)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids, choice

    return route


def right(route: Router, logits: Tensor, bias: Tensor, mutation: Mutation = str) -> bool:
    """Whether the kernel's weights are those of float64, and its ids name such elements, each once."""
    weights, ids, scores = kernels(router.find, route, logits, bias, mutation=mutation)
    expected, best, searched = route(logits.double(), bias.double())
    if not logits.shape[0]:
        return bool(weights.shape == expected.shape and ids.shape == best.shape)
    if ids.dtype != torch.int64 or ids.min() < 0 or ids.max() >= logits.shape[1]:
        return False
    if any(len(set(row)) < len(row) for row in ids.tolist()):
        return False
    tolerance = TOLERANCE[logits.dtype]
    found, wanted = (searched.gather(1, i).sort(descending=True)[0] for i in (ids, best))
    finite = searched.isfinite()
    return bool(
        error(found, wanted) <= tolerance
        and error(weights.sort()[0], expected.sort()[0]) <= tolerance
        and torch.equal(scores.isfinite(), finite)
        and error(scores[finite], searched[finite]) <= tolerance
    )


def logits_and_bias(seed: int, tokens: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return scattered(random, tokens, experts, dtype=dtype), scattered(random, experts, dtype=torch.float32).to(dtype)


EXPERTS = st.sampled_from([1, 2, 7, 8, 60, 128, 200])
TOKENS = st.sampled_from([0, 1, 2, 33, 70])


@pytest.mark.parametrize("kind", [normalised, softmax_of_the_best])
@few
@given(seed=SEEDS, tokens=TOKENS, experts=EXPERTS, k=st.integers(1, 8), dtype=DTYPES)
@example(seed=0, tokens=5, experts=13, k=13, dtype=torch.float32)
@example(seed=0, tokens=3, experts=1000, k=10, dtype=torch.float32)
@example(seed=0, tokens=0, experts=8, k=2, dtype=torch.float32)
def test_the_weights_are_those_of_float64(
    kind: Callable[[int], Router], seed: int, tokens: int, experts: int, k: int, dtype: torch.dtype
) -> None:
    assert right(kind(min(k, experts)), *logits_and_bias(seed, tokens, experts, dtype))


@few
@given(seed=SEEDS, tokens=TOKENS, groups=st.sampled_from([1, 2, 8]), of_group=st.sampled_from([1, 4, 32]), dtype=DTYPES)
@example(seed=0, tokens=9, groups=8, of_group=32, dtype=torch.float32)
def test_groups_limit_the_choice(seed: int, tokens: int, groups: int, of_group: int, dtype: torch.dtype) -> None:
    kept = (groups + 1) // 2
    route = in_groups(min(6, kept * of_group), groups, kept)
    logits, bias = logits_and_bias(seed, tokens, groups * of_group, dtype)
    assert right(route, logits, bias.float())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_of_equal_scores_the_first_are_chosen_and_none_twice(dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 7, dtype=dtype)
    logits[1, 2:] = float("-inf")
    logits[2] = -0.0
    logits[3, 5] = 1
    weights, ids = kernels(router.find, lambda x: x.topk(4), logits)
    assert ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [5, 0, 1, 2]]
    assert torch.equal(weights, logits.gather(1, ids))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_no_number_comes_first_as_in_torch(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, float("nan"), float("inf"), -3.0]], dtype=dtype)
    weights, ids = kernels(router.find, lambda x: x.topk(3), logits)
    assert ids.tolist() == logits.topk(3)[1].tolist() and weights[0].isnan().tolist() == [True, False, False]


def test_more_than_one_leading_dimension() -> None:
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)).transpose(0, 1)

    def route(x: Tensor) -> Any:
        weights, ids = x.softmax(-1).topk(3)
        return weights, ids, weights.sum(-1)

    for result, expected in zip(kernels(router.find, route, logits), route(logits), strict=True):
        assert torch.allclose(result, expected, rtol=1e-5) and result.dtype == expected.dtype


MUTATIONS: dict[str, Mutation] = {
    "all zero": lambda text: text.replace("_out + ", "_out + 0 * "),
    "unweighted": lambda text: text.replace(" = topk_values / ", " = topk_values + 0 * "),
    "padding is chosen": lambda text: text.replace("tl.where((c1_0_64 < 60)", "tl.where((c1_0_64 < 64)"),
    "last tile dropped": lambda text: text.replace("(triton.cdiv(70, ", "(70 // ("),
    "the same twice": lambda text: text.replace("topk_best, -4611686018427387904,", "topk_best, topk_best,"),
    "the smallest": lambda text: text.replace(">> 31) & 2147483647", ">> 31) & 2147483647 ^ 2147483647"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_router_is_seen(mutation: str) -> None:
    logits, bias = logits_and_bias(0, 70, 60, torch.float32)
    assert right(normalised(4), logits - 30, bias)
    assert not right(normalised(4), logits - 30, bias, MUTATIONS[mutation])


def test_groups_that_cannot_be_tiles_are_left_to_aten() -> None:
    logits, bias = logits_and_bias(0, 5, 60, torch.float32)
    graph = make_fx(in_groups(2, 4, 2))(logits, bias).graph
    for region in router.find(graph, set()):
        assert "aten.view" not in {name_of(n.target) for n in region.nodes if n.op == "call_function"}


def test_what_is_claimed_is_left_alone() -> None:
    graph = make_fx(normalised(2))(torch.randn(3, 8), torch.randn(8)).graph
    softmax = next(n for n in graph.nodes if n.op == "call_function" and name_of(n.target) == "aten._softmax")
    (region,) = router.find(graph, {softmax})
    assert softmax in region.inputs
    assert not router.find(graph, set(region.nodes))


OTHERS = ("mixtral", "qwen3_moe", "gpt_oss")


@pytest.mark.parametrize("family", ["deepseek_v3", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])
def test_the_router_of_a_program_is_one_region(family: str) -> None:
    """From the logits, which a matrix product makes, to the ids that are counted and the weights of the rows."""
    for graph in blocks_of(family):
        regions = router.find(graph, set())
        owner = {n: r for r in regions for n in r.nodes if not is_free(n)}
        calls = [n for n in graph.nodes if n.op == "call_function"]
        assert all(n in owner for n in calls if name_of(n.target) == "aten.topk")
        for count, sums in zip(
            *([n for n in calls if name_of(n.target) == f"foldcc.{x}"] for x in ("count", "unpermute")), strict=True
        ):
            region = owner[count.args[0]]
            assert region is owner[sums.args[2]] and {count.args[0], sums.args[2]} <= set(region.outputs)
            products = [x for x in region.inputs if x.op == "call_function"]
            assert [name_of(x.target) in ("aten.mm", "aten.addmm") for x in products] == [True]
        for region in regions:
            assert_as_in_aten(region)


def assert_as_in_aten(region: Any) -> None:
    random = torch.Generator().manual_seed(0)
    values: dict[fx.Node, Any] = {}
    for n in region.inputs:
        values[n] = torch.randn(n.meta["val"].shape, generator=random).to(n.meta["val"].dtype)
    results = launcher(region)(*values.values())
    for n in region.nodes:
        args, kwargs = fx.node.map_arg((n.args, dict(n.kwargs)), values.__getitem__)
        values[n] = n.target(*args, **kwargs)
    for n, result in zip(region.outputs, results if len(region.outputs) > 1 else (results,), strict=True):
        assert result.dtype == values[n].dtype and result.shape == values[n].shape
        assert torch.allclose(result, values[n], rtol=1e-5, atol=0), n.name
