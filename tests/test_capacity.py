"""Experts with a capacity drop the same choices in one process and on every fold, and what is dropped is not sent."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from itertools import product

import pytest
import torch
from models import tiny_model, token_batch
from test_gloo import whole
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import foldcc
from foldcc import Capacity, FoldError, ops
from foldcc.capture.capacity import capacity_of
from foldcc.capture.shrunk import shrunk
from foldcc.ops.capacity import _defined, _places, limited, places
from foldcc.ops.captured import captured_record, registered
from foldcc.testing import Decoder, DecoderConfig, ExpertsConfig, Routing, check_equivalence, in_float64, run_distributed

B, S, E, K = 4, 8, 8, 2
T = B * S
KINDS = ("any", "hot expert", "empty experts")


def routed(kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Chosen experts and weights of T tokens, many of which are equal."""
    random = torch.Generator().manual_seed(seed)
    likes = torch.rand(T, E, generator=random)
    if kind == "hot expert":
        likes[:, 3] += 1
    if kind == "empty experts":
        likes[:, ::2] -= 1
    return likes.topk(K).indices, torch.randint(1, 5, (T, K), generator=random) / 8


def decoder(capacity: Capacity | None, **options: object) -> Decoder:
    return Decoder(DecoderConfig(layers=1, moe=ExpertsConfig(capacity=capacity, **options)))


def decoder_batch(batch: int = B, length: int = S) -> dict[str, Tensor]:
    given = token_batch(batch, length, vocabulary=48)
    return {"ids": given["input_ids"], "labels": given["labels"]}


# --- which choices stay ---


@pytest.mark.parametrize(("kind", "keep"), [*product(KINDS, ("probability", "position"))])
def test_each_expert_keeps_the_first_in_order_and_no_more_than_its_capacity(kind: str, keep: str) -> None:
    ids, weights = routed(kind)
    for factor, group in ((1.0, 8), (0.6, 16), (1.25, None), (8.0, 4)):
        most, size = -(-int(100 * factor) * (group or T) * K // (100 * E)), group or T
        found = limited(ids, weights, E, Capacity(factor=factor, group=group, keep=keep))
        for g, e in product(range(T // size), range(E)):
            there = [(t, k) for t in range(g * size, (g + 1) * size) for k in range(K) if ids[t, k] == e]
            if keep == "probability":
                there.sort(key=lambda at: -float(weights[at]))  # stable: of equal ones the first
            for i, at in enumerate(there):
                assert float(found[at]) == (float(weights[at]) if i < most else 0.0)


@pytest.mark.parametrize(("kind", "by_weight"), [*product(KINDS, (True, False))])
def test_places_are_what_counting_expert_by_expert_gives(kind: str, by_weight: bool) -> None:
    ids, weights = (x.view(2, -1, K) for x in routed(kind))
    for factor in (0.5, 1.0, 1.3):
        assert torch.equal(*(f(ids, weights, E, factor, by_weight, False) for f in (_places, _defined)))


def test_what_is_dropped_gives_no_gradient_and_the_rest_is_as_it_was() -> None:
    ids, weights = routed("hot expert")
    weights.requires_grad_()
    kept = limited(ids, weights, E, Capacity(factor=1.0))
    kept.sum().backward()
    assert torch.equal(weights.grad, (kept != 0).float()) and 0 < int((kept == 0).sum()) < T * K


def test_a_factor_is_read_as_it_is_written() -> None:
    ids, weights = torch.zeros(80, 1, dtype=torch.int64), torch.ones(80, 1)
    assert int(limited(ids, weights, 8, Capacity(factor=1.1)).sum()) == 11  # 1.1 * 10.0 is more than 11


def test_rows_are_spread_and_cut_as_their_transposes_say() -> None:
    counts, wide = torch.tensor([2, 0, 3]), torch.randn(12, 4)
    for there, back, known in ((ops.spread, ops.collected, 4), (ops.leading, ops.extended, None)):
        rows = torch.randn(7, 4, requires_grad=True)
        given = there(rows, counts, *([known] if known else []))
        (gradient,) = torch.autograd.grad(given, rows, wide[: len(given)])
        assert torch.equal(gradient, back(wide[: len(given)], counts, 7)) and not gradient[5:].any()
        if known:
            assert (
                torch.equal(given[:2], rows[:2]) and torch.equal(given[8:11], rows[2:5]) and not given[[2, 3, 4, 7, 11]].any()
            )


# --- the same on every fold ---

FOLDS = [
    ("dp=2,cp=2|ep=2", Capacity(factor=1.0, group=S // 2), {}),
    ("dp=2,tp=2|ep=2,etp=2", Capacity(factor=1.0, group=2 * S, keep="position", pad=True), {"zero": 3}),
    pytest.param("dp=2,tp=2|etp=4", Capacity(factor=0.5), {"recompute": "blocks"}, marks=pytest.mark.slow),
    pytest.param("dp=2,tp=2|etp=4", Capacity(factor=0.5, pad=True), {"recompute": "blocks"}, marks=pytest.mark.slow),
    pytest.param("dp=2,tp=2", Capacity(factor=0.8, group=S), {}, marks=pytest.mark.slow),
    pytest.param("dp=2,tp=2", Capacity(factor=1.0, group=S // 2, pad=True), {}, marks=pytest.mark.slow),
    pytest.param("dp=2,cp=2|ep=2", Capacity(factor=0.8, group=S, pad=True), {"zero": 3}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("mesh", "capacity", "options"), FOLDS)
def test_choices_are_dropped_alike_on_every_fold(mesh: str, capacity: Capacity, options: dict[str, object]) -> None:
    check_equivalence(decoder(capacity, biased=True), mesh, kwargs=decoder_batch(), **options)


@pytest.mark.parametrize("pad", [False, True])
def test_whatever_the_routing_and_in_every_mode(pad: bool) -> None:
    mesh = foldcc.FoldedMesh.parse("dp=2,tp=2|ep=2,etp=2")
    with in_float64():
        model = decoder(Capacity(factor=1.0, group=S, pad=pad)).double()
        folded = foldcc.parallelize(model, mesh)
        for kind, batch in (("hot expert", 4), ("empty experts", 4), ("ties", 4), ("one rank", 8 if pad else 4)):
            routing = Routing(kind=kind).preferences(model.config.moe, mesh, batch, S)
            given = {**decoder_batch(batch), "routing": routing}
            for m in (model, folded):
                m.zero_grad()
                m(**given).loss.backward()
            for name, p in model.named_parameters():
                torch.testing.assert_close(folded.get_parameter(name).grad, p.grad)
        with torch.no_grad():
            torch.testing.assert_close(folded(**given).logits, model(**given).logits)


def test_a_library_s_model_is_given_a_capacity_which_its_copies_have() -> None:
    model = tiny_model("mixtral", num_hidden_layers=1)
    batch = token_batch(4)
    plain = model(**batch).loss
    foldcc.set_capacity(model, Capacity(factor=1.0, group=16))
    dropped = copy.deepcopy(model)(**batch).loss
    assert dropped != plain and torch.equal(pickle.loads(pickle.dumps(model))(**batch).loss, dropped)
    check_equivalence(model, "dp=2,tp=2|ep=4", kwargs=batch, verify=True)
    foldcc.set_capacity(model, None)
    assert torch.equal(model(**batch).loss, plain)


def test_a_small_copy_that_stands_for_a_large_model_has_its_capacity() -> None:
    model = tiny_model("mixtral")
    foldcc.set_capacity(model, Capacity(factor=1.0, group=4096, keep="position"))
    assert capacity_of(shrunk(model)[0]) == Capacity(factor=1.0, keep="position")  # of groups that its tokens divide into


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("mesh", ["dp=2,tp=2|ep=4", "dp=2,cp=2|ep=2", "dp=3,tp=2|ep=2", "dp=2,tp=2|ep=2,etp=2"])
@pytest.mark.parametrize(
    "capacity",
    [
        Capacity(factor=1.0, group=16),
        Capacity(factor=1.0, group=4, keep="position", pad=True),
        Capacity(factor=1.25, group=32),
    ],
)
def test_every_family_drops_alike(family: str, mesh: str, capacity: Capacity) -> None:
    model = tiny_model(family)
    foldcc.set_capacity(model, capacity)
    check_equivalence(model, mesh, kwargs=token_batch(2 * foldcc.FoldedMesh.parse(mesh).size("dp")))


@pytest.mark.slow
def test_narrow_weights_with_many_ties_drop_alike() -> None:
    """The router's weights are the same numbers on both sides, so that the same choices stay."""
    model, batch = decoder(Capacity(factor=0.8, group=S)).bfloat16(), decoder_batch()
    folded = foldcc.parallelize(model, "dp=4|ep=4", example_inputs=batch)
    torch.testing.assert_close(folded(**batch).logits, model(**batch).logits, rtol=0.05, atol=0.05)


def on_processes() -> list[dict[str, Tensor]]:
    with in_float64():
        mesh = foldcc.init_folded_mesh("cpu", attention={"tp": 2}, moe={"ep": 2})
        found = []
        for pad in (False, True):
            model = decoder(Capacity(factor=1.0, group=S, pad=pad)).double()
            folded = foldcc.parallelize(model, mesh, example_inputs=decoder_batch())
            folded(**decoder_batch()).loss.backward()
            found.append({n: whole(p.grad) for n, p in folded.named_parameters()})
        return found


def test_groups_of_several_ranks_drop_alike_on_processes() -> None:
    model = decoder(Capacity(factor=1.0, group=S)).double()
    with in_float64():
        model(**decoder_batch()).loss.backward()
    for found in (each for rank in run_distributed(on_processes, 2, timeout=400) for each in rank):
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-10, atol=1e-12)


# --- what it costs ---


def layouts(mesh: str, group: int | None) -> list[str]:
    given = decoder_batch()
    folded = foldcc.parallelize(decoder(Capacity(factor=1.0, group=group)), mesh, example_inputs=given, verify=False)
    return [str(n.meta["layout"]) for _, n in folded.stages["shard"].program.nodes() if n.target is places.overload]


def test_whole_groups_are_divided_and_others_are_gathered() -> None:
    assert layouts("dp=2,tp=2|ep=4", S // 2) == ["[(batch@dp w5@tp), w6, k]"]
    assert layouts("dp=2,tp=2|ep=4", None) == ["[1, (batch seq), k] I(dp,tp)"]


def test_what_is_dropped_is_not_sent() -> None:
    seen: list[tuple[int, int]] = []
    mesh = foldcc.FoldedMesh.parse("dp=4|ep=4")
    model = decoder(Capacity(factor=1.0, group=S))
    given = {**decoder_batch(), "routing": Routing(kind="hot expert").preferences(model.config.moe, mesh, B, S)}
    folded = foldcc.parallelize(model, mesh, example_inputs=given, verify=False)
    simulate = ops.all_to_all_v.simulate
    assert simulate is not None

    def noted(calls: list[tuple[object, ...]]) -> list[Tensor]:
        seen.append((sum(len(c[0]) for c in calls), sum(int(c[1].sum()) for c in calls)))
        return simulate(calls)

    object.__setattr__(ops.all_to_all_v, "simulate", noted)
    try:
        folded(**given)
    finally:
        object.__setattr__(ops.all_to_all_v, "simulate", simulate)
    rows = {n for n, _ in seen}
    assert seen and all(n == sent < T * K for n, sent in seen) and len(rows) == 1


def test_padded_experts_have_static_sizes_and_even_exchanges() -> None:
    capacity = Capacity(factor=1.0, group=S, pad=True)
    folded = foldcc.parallelize(decoder(capacity), "dp=2,tp=2|ep=2,etp=2", example_inputs=decoder_batch(), verify=False)
    nodes = [n for main in folded.program.mains for b in main.children() for n in b.graph.nodes if n.op == "call_function"]
    assert all(isinstance(size, int) for n in nodes for x in pytree.tree_leaves(n.meta["val"]) for size in x.shape)
    targets = {str(n.target).split(".")[1] for n in nodes if str(n.target).startswith("foldcc.")}
    assert not targets & {"splits", "by_expert", "leading", "all_to_all_v", "all_gather_v", "reduce_scatter_v"}
    (spread,) = (n for _, n in folded.stages["dispatch"].program.nodes() if n.target is ops.spread.overload)
    assert spread.args[2] == B // 2 * S * K // E  # of the two sequences of which a rank has a part


def test_a_choice_whose_weight_a_model_masks_is_that_of_no_expert() -> None:
    class Thresholded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, E)
            self.up, self.down = nn.Parameter(torch.randn(E, 8, 8)), nn.Parameter(torch.randn(E, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).topk(K)
            return ops.experts(x, ids, weights.masked_fill(weights < 0.2, 0), self.up, self.down, activation_fn=torch.relu)

    torch.manual_seed(0)
    model, x = Thresholded(), torch.randn(T, 8)
    folded = foldcc.parallelize(model, "dp=4|ep=4", example_inputs=(x,), verify=False)
    assert any(n.target is ops.leading.overload for _, n in folded.stages["dispatch"].program.nodes())
    for m in (model, folded):
        m(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(folded.get_parameter(name).grad, p.grad)


# --- what is wrong is found ---


def test_groups_that_are_cut_are_found() -> None:
    right = captured_record(places.overload)
    registered(replace(right, rule="n g [k], n g [k] -> n g [k]"))
    try:
        folded = foldcc.parallelize(
            decoder(Capacity(factor=0.8, group=S)), "dp=2,tp=2|ep=4", example_inputs=decoder_batch(), verify=False
        )
        assert not foldcc.verify(folded).ok
    finally:
        registered(right)


def test_a_capacity_that_capture_loses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral", num_hidden_layers=1)
    foldcc.set_capacity(model, Capacity(factor=1.0, group=16))
    monkeypatch.setattr("foldcc.capture.capacity.limited", _unlimited)
    with pytest.raises(FoldError, match="as it was captured is NOT equal to the module"):
        foldcc.parallelize(model, "dp=2,tp=2|ep=4", example_inputs=token_batch(4), verify=True)


def _unlimited(ids: Tensor, weights: Tensor, experts: int, capacity: Capacity) -> Tensor:
    return weights if torch.compiler.is_exporting() else limited(ids, weights, experts, capacity)


# --- errors ---


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"factor": 0}, "factor=0 is no capacity"),
        ({"factor": float("inf")}, "factor=inf is no capacity"),
        ({"factor": 1.0, "group": 0}, "group=0 is no number of tokens"),
        ({"factor": 1.0, "keep": "last"}, "keep='last' says of no choice.*\n.*probability, position"),
    ],
)
def test_what_is_no_capacity(given: dict[str, object], says: str) -> None:
    with pytest.raises(FoldError, match=says):
        Capacity(**given)


@pytest.mark.parametrize(
    ("capacity", "says"),
    [
        (Capacity(factor=1.0, group=6), r"Groups of 6 tokens do not divide 32 tokens \(32 = 5 \* 6 \+ 2\).\n.*1, 2, 4, 8, 16"),
        (Capacity(factor=1.0, group=2), r"1.0 \* 2 tokens \* 2 choices / 8 experts = 0.5, a capacity of no token.\n.*8 / \(2"),
    ],
)
def test_a_capacity_that_does_not_fit_the_tokens_is_an_error_of_parallelize(capacity: Capacity, says: str) -> None:
    with pytest.raises(FoldError, match=says):
        foldcc.parallelize(decoder(capacity), "dp=2", example_inputs=decoder_batch())


def test_a_factor_alone_is_no_capacity() -> None:
    for given in (lambda: foldcc.set_capacity(tiny_model("mixtral"), 1.25), lambda: limited(*routed("any"), E, 1.25)):
        with pytest.raises(FoldError, match="capacity is a foldcc.Capacity, not 1.25"):
            given()


def test_only_models_with_the_library_s_experts_are_given_a_capacity() -> None:
    for model in (nn.Linear(2, 2), tiny_model("llama"), decoder(None)):
        with pytest.raises(FoldError, match="has no experts of Transformers"):
            foldcc.set_capacity(model, Capacity(factor=1.0))
    with pytest.raises(FoldError, match="is folded, and its programs are made"):
        foldcc.set_capacity(foldcc.parallelize(nn.Linear(2, 2), "dp=2"), Capacity(factor=1.0))
