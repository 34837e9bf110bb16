"""The kit for tests: what its strategies draw fits together and does what it says, and its checks can fail."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foldcc import FoldedMesh, FoldError
from foldcc.testing import (
    Case,
    Decoder,
    DecoderConfig,
    ExpertsConfig,
    Routing,
    check_equivalence,
    decoder_batch,
    dense_models,
    folded_meshes,
    inputs,
    meshes,
    models,
    moe_models,
    programs,
    routings,
    uneven_batch,
)
from foldcc.testing.routing import KINDS

MESH = FoldedMesh.parse("dp=2,tp=2|ep=4")


def drawn(strategy: st.SearchStrategy[Any], wanted: Callable[[Any], bool]) -> Any:
    """An example of what is wanted; an error if none is found."""
    return find(strategy, wanted, settings=settings(phases=[Phase.generate], database=None, derandomize=True))


# --- programs ---------------------------------------------------------------------------------------------------------


def equivalent(examples: int, **options: Any) -> Callable[[Callable[[Case], None]], Callable[[], None]]:
    checks = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), **options)
    return lambda test: checks(given(programs(world=8))(test))


@equivalent(4, derandomize=True)
def test_a_drawn_program_is_equivalent_to_its_model(case: Case) -> None:
    check_equivalence(case.model, case.mesh, kwargs=case.inputs)


@pytest.mark.slow
@equivalent(500)
def test_many_drawn_programs_are_equivalent_to_their_models(case: Case) -> None:
    check_equivalence(case.model, case.mesh, kwargs=case.inputs)


def test_values_between_blocks_may_have_other_strides_than_traced() -> None:
    """As many key/value heads as heads: attention's gradients come transposed."""
    model = Decoder(DecoderConfig(layers=1, heads=2, kv_heads=2))
    check_equivalence(model, "dp=2", kwargs=decoder_batch(model, FoldedMesh.parse("dp=2"), valid=[3, 0], length=4))


def test_the_simplest_program_is_small() -> None:
    case = drawn(programs(world=8), lambda case: True)
    assert str(case.mesh) == "dp=8" and case.inputs["ids"].shape == (8, 2)
    assert case.model.config.layers == 1 and case.model.config.moe is None


@pytest.mark.slow
def test_what_fails_shrinks_to_few_axes_layers_and_tokens() -> None:
    case = find(programs(world=8), lambda case: case.model.config.moe is not None and case.mesh.size("ep") > 1)
    assert case.mesh.size("tp") == 1 and case.inputs["ids"].shape == (8, 2)
    assert case.model.config.layers == 1 and not case.model.config.biased and not case.model.config.moe.shared


def test_programs_of_your_own_model_and_inputs() -> None:
    """What `programs` is given in place of the kit's is what it draws from."""
    own = programs(6, models=st.just, inputs=lambda model, mesh: st.just({"mesh": mesh}))  # type: ignore[arg-type]
    case = drawn(own, lambda case: case.mesh.size("etp") == 3)
    assert case.model is case.mesh and case.inputs == {"mesh": case.mesh} and case.mesh.world_size == 6


# --- meshes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 4, 6, 8])
def test_every_fold_of_a_world_is_listed_once(world: int) -> None:
    found = folded_meshes(world)
    legal = set()
    for dp, tp, ep, etp in itertools.product(range(1, world + 1), repeat=4):
        try:
            mesh = FoldedMesh.parse(f"dp={dp},tp={tp}|ep={ep},etp={etp}")
        except FoldError:
            continue
        if mesh.world_size == world:
            legal.add(mesh)
    assert set(found) == legal and len(found) == len(legal)


def test_every_mesh_is_drawn() -> None:
    for mesh in folded_meshes(4):
        assert drawn(meshes(4), mesh.__eq__) == mesh


# --- models -----------------------------------------------------------------------------------------------------------


@given(model=models(MESH))
@settings(max_examples=30, deadline=None)
def test_no_weight_is_constant_or_zero(model: Decoder) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0 and (parameter != 0).all(), name


@given(model=moe_models(MESH))
@settings(max_examples=30, deadline=None)
def test_a_model_with_experts_has_them_in_some_layer(model: Decoder) -> None:
    assert any(name.endswith("router.weight") for name, _ in model.named_parameters())


@given(model=dense_models(MESH))
@settings(max_examples=30, deadline=None)
def test_a_dense_model_has_no_experts(model: Decoder) -> None:
    assert not any(name.endswith("router.weight") for name, _ in model.named_parameters())


OPTIONS: dict[str, Callable[[DecoderConfig], bool]] = {
    "several layers": lambda c: c.layers > 1,
    "fewer key/value heads than tp": lambda c: c.kv_heads < 2,
    "as many key/value heads as heads": lambda c: c.kv_heads == c.heads,
    "a vocabulary that tp does not divide": lambda c: c.vocab % 8 != 0,
    "fused": lambda c: c.fused,
    "LayerNorm": lambda c: c.norm == "layer",
    "qk norm": lambda c: c.qk_norm,
    "tied": lambda c: c.tied,
    "a dense layer first": lambda c: c.moe is not None and c.moe.first == 1,
    "experts with biases": lambda c: c.moe is not None and c.moe.biased,
    "interleaved experts": lambda c: c.moe is not None and c.moe.interleaved,
    "transposed experts": lambda c: c.moe is not None and c.moe.transposed,
    "experts without a gate": lambda c: c.moe is not None and not c.moe.gated,
    "a sigmoid router": lambda c: c.moe is not None and c.moe.scoring == "sigmoid",
    "a shared expert": lambda c: c.moe is not None and c.moe.shared > 0,
    "a router loss": lambda c: c.moe is not None and c.moe.aux_loss > 0,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_a_model_is_drawn(option: str) -> None:
    drawn(models(MESH), lambda model: OPTIONS[option](model.config))


@given(model=models(MESH))
@settings(max_examples=10, deadline=None)
def test_a_model_prints_as_what_makes_it_again(model: Decoder) -> None:
    again = eval(repr(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_making_a_model_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    Decoder(DecoderConfig())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_token_gets_the_weighted_sum_of_its_experts() -> None:
    moe = ExpertsConfig(experts=4, chosen=2, width=3, biased=True, transposed=True, scoring="sigmoid")
    layer = Decoder(DecoderConfig(layers=1, moe=moe)).layers[0].mlp
    x, routing = torch.randn(1, 1, 16), torch.tensor([[[0, 3, 1, 2]]])
    wanted = torch.zeros(16)
    for e in (1, 3):
        gate, up = (x[0, 0] @ layer.w_up[e] + layer.b_up[e]).chunk(2)
        y = (F.silu(gate) * up) @ layer.w_down[e] + layer.b_down[e]
        wanted += layer.router(x)[0, 0, e].sigmoid() * y
    torch.testing.assert_close(layer(x, routing)[0][0, 0], wanted)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: ExpertsConfig(experts=4, chosen=5), "5 of 4 experts are chosen"),
        (lambda: ExpertsConfig(gated=False, interleaved=True), "nothing to interleave"),
        (lambda: DecoderConfig(heads=4, kv_heads=3), "4 heads do not share 3 key/value heads"),
        (lambda: DecoderConfig(head_dim=3), "head_dim is 3"),
    ],
)
def test_a_model_that_cannot_be(config: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoldError, match=message):
        config()


# --- inputs -----------------------------------------------------------------------------------------------------------


def valid_tokens(batch: dict[str, Tensor], mesh: FoldedMesh) -> list[int]:
    """How many labels count, on each data-parallel rank."""
    return [int((labels != -100).sum()) for labels in batch["labels"].chunk(mesh.size("dp"))]


DENSE = Decoder(DecoderConfig(layers=1))


@given(batch=inputs(DENSE, MESH))
def test_some_token_is_valid_and_no_first_label_is(batch: dict[str, Tensor]) -> None:
    assert batch["ids"].shape == batch["labels"].shape and batch["ids"].shape[0] % 2 == 0
    assert any(valid_tokens(batch, MESH))
    assert (batch["labels"][:, 0] == -100).all()


@pytest.mark.parametrize(
    "wanted",
    [
        lambda valid, batch: valid[0] != valid[1] and all(valid),
        lambda valid, batch: valid[0] == 0,
        lambda valid, batch: valid[1] == 0,
        lambda valid, batch: len(batch["ids"]) > 2,
    ],
    ids=["uneven", "none on the first rank", "none on the last rank", "several samples"],
)
def test_every_kind_of_batch_is_drawn(wanted: Callable[[list[int], dict[str, Tensor]], bool]) -> None:
    drawn(inputs(DENSE, MESH), lambda batch: wanted(valid_tokens(batch, MESH), batch))


@pytest.mark.parametrize("valid", [[3, 0], [1, 7], [14, 14]])
def test_a_batch_has_as_many_valid_tokens_as_asked_for(valid: list[int]) -> None:
    batch = uneven_batch(MESH, vocab=32, valid=valid, samples=2, names=("tokens", "labels"))
    assert valid_tokens(batch, MESH) == valid
    assert batch["tokens"].shape == (4, 8) and int(batch["tokens"].max()) < 32


@pytest.mark.parametrize("valid", [[0, 0], [8, 1], [1], [1, -1]])
def test_a_batch_that_cannot_be(valid: list[int]) -> None:
    with pytest.raises(FoldError, match="valid tokens on dp=2"):
        uneven_batch(MESH, vocab=32, valid=valid)


def test_a_model_of_your_own_says_how_many_tokens_there_are() -> None:
    batch = drawn(inputs(nn.Linear(2, 2), MESH, vocab=7), lambda batch: True)
    assert batch.keys() == {"input_ids", "labels"} and int(batch["input_ids"].max()) < 7
    with pytest.raises(FoldError, match="Linear does not say how many tokens there are"):
        drawn(inputs(nn.Linear(2, 2), MESH), lambda batch: True)


# --- routings ---------------------------------------------------------------------------------------------------------

MOE = ExpertsConfig(experts=8, chosen=2)
ROUTED = Decoder(DecoderConfig(layers=1, moe=MOE))


def load(routing: Routing) -> Tensor:
    """How many of 12 tokens each of 8 experts gets; two experts are on each rank of ep."""
    preferences = routing.preferences(MOE, MESH, 3, 4)
    assert preferences is not None and preferences.shape == (3, 4, 8) and preferences.dtype == torch.int64
    return torch.bincount(preferences.topk(2).indices.flatten(), minlength=8)


@pytest.mark.parametrize("which", range(5))
def test_routings_do_what_they_say(which: int) -> None:
    kinds = {kind: Routing(kind=kind, which=which) for kind in KINDS}
    assert kinds["own"].preferences(MOE, MESH, 3, 4) is None
    assert load(kinds["balanced"]).tolist() == [3] * 8
    assert load(kinds["hot expert"])[which] == 12
    assert load(kinds["empty experts"])[1 - which % 2 :: 2].sum() == 0
    by_rank = {kind: load(kinds[kind]).view(4, 2).sum(1) for kind in ("idle rank", "one rank")}
    assert by_rank["idle rank"][which % 4] == 0 and by_rank["idle rank"].sum() == 24
    assert by_rank["one rank"][which % 4] == 24
    ties = kinds["ties"].preferences(MOE, MESH, 3, 4)
    assert ties is not None
    third, second = ties.flatten(0, 1).sort(-1).values[:, -3:-1].unbind(1)
    assert (second == third).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_routing_is_drawn(kind: str) -> None:
    assert drawn(routings(), lambda routing: routing.kind == kind).kind == kind
    assert drawn(routings(ROUTED, MESH), lambda routing: routing.kind == kind).kind == kind


@given(routing=routings(ROUTED, "dp=4,tp=2|ep=8"))
def test_a_routing_that_needs_more_room_is_not_drawn(routing: Routing) -> None:
    assert routing.kind != "one rank"  # two experts of one on each rank


@pytest.mark.parametrize(("kind", "mesh"), [("idle rank", "dp=4"), ("one rank", "dp=4"), ("one rank", "dp=8|ep=8")])
def test_a_routing_without_room(kind: Any, mesh: str) -> None:
    with pytest.raises(FoldError, match=f"Routing '{kind}' is not possible with 2 of 8 experts"):
        Routing(kind=kind).preferences(MOE, FoldedMesh.parse(mesh), 3, 4)


def test_an_unknown_routing() -> None:
    with pytest.raises(FoldError, match="no routing 'random'"):
        Routing(kind="random")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_dispatch_does_not_depend_on_where_tokens_go(kind: Any) -> None:
    batch = decoder_batch(ROUTED, MESH, valid=[5, 2], samples=2, length=4, routing=Routing(kind=kind, which=1))
    check_equivalence(ROUTED, MESH, kwargs=batch)


# --- check_equivalence ------------------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """Computes something else while it is captured."""

    def __init__(self, wrong: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear, self.wrong = nn.Linear(8, 8), wrong

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return self.wrong(y) if torch.compiler.is_exporting() else y


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda y: y * (1 + 1e-8), r"1\.0e-08  output"),
        (lambda y: y + 1e-6 * (y - y.detach()), r"e(\+00|-1\d)  output.*\n +1\.0e-06  gradient of linear"),
        (lambda y: y.detach() + y.mean() * 0, r"1\.0e\+00  gradient of linear"),
        (lambda y: y * float("nan"), "inf  output"),
    ],
    ids=["value", "gradient", "lost gradient", "nan"],
)
def test_what_differs_is_named(wrong: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_equivalence(Wrong(wrong), "dp=2", (torch.randn(4, 8),))


class Keys(nn.Module):
    """Attention without positions, where a bias on all keys has no effect: its gradient is zero, up to rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def test_a_gradient_that_is_zero_by_algebra_is_no_difference() -> None:
    assert check_equivalence(Keys(), "dp=2,tp=2", (torch.randn(4, 6, 8),)).gradients["k.bias"] < 1e-10


def test_arguments_are_given_by_position_and_by_name() -> None:
    x = torch.randn(4, 6, 8)
    for args, kwargs in (((x, 0.3), {}), ((x,), {"scale": 0.3}), ((), {"x": x, "scale": 0.3})):
        check_equivalence(Keys(), "dp=2", args, kwargs)
    with pytest.raises(FoldError, match="args is a dict"):
        check_equivalence(Keys(), "dp=2", {"x": x})  # type: ignore[arg-type]
    with pytest.raises(FoldError, match="args is a Tensor"):
        check_equivalence(Keys(), "dp=2", x)  # type: ignore[arg-type]
