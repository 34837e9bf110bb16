"""Zig-zag: of twice as many blocks of a sequence as ranks, each rank of cp has one from each end, and computes the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import foldcc
from foldcc import FoldError, ops
from foldcc.inspect.flops import local_flops
from foldcc.layout import Layout
from foldcc.ops.collectives import cut, join
from foldcc.testing import in_float64, run_distributed
from foldcc.testing.equivalence import relative_error
from tests.models import FAMILIES, WITH_AUX_LOSS, tiny_model, token_batch
from tests.test_context import gradients
from tests.test_sequences import Broken, padded, ways


def folded(family: str, mesh: str, batch: dict[str, Tensor], way: str | None, **options: Any) -> foldcc.FoldedModule:
    plain = tiny_model(family, aux_loss=family in WITH_AUX_LOSS, **options.pop("changes", {}))
    return foldcc.parallelize(plain, mesh, example_inputs=batch, attention=way, order="zigzag", verify=False, **options)


def test_the_parts_of_ranks_and_back() -> None:
    x = torch.arange(24).view(2, 12)
    assert cut(x, 1, -1, 3, 0).tolist() == [[0, 1, 10, 11], [12, 13, 22, 23]]
    assert cut(x, 1, -2, 3, 1).tolist() == [[1, 4, 7, 10], [13, 16, 19, 22]]
    for outer in (-1, -2):
        assert torch.equal(join([cut(x, 1, outer, 3, i) for i in range(3)], 1, outer), x)


def test_a_layout_says_it_and_parses() -> None:
    text = "[(batch@dp seq@(cp~,tp)), hidden]"
    layout = Layout.parse(text, {}, {"dp": 2, "cp": 2, "tp": 2})
    assert str(layout) == text and layout.states["cp"].zigzag and not layout.states["tp"].zigzag


def compare(family: str, mesh: str, way: str | None, batch: dict[str, Tensor], **options: Any) -> foldcc.FoldedModule:
    plain = tiny_model(family, aux_loss=family in WITH_AUX_LOSS, **options.pop("changes", {})).double()
    with in_float64():
        model = foldcc.parallelize(
            copy.deepcopy(plain), mesh, example_inputs=batch, attention=way, order="zigzag", verify=True, **options
        )
        assert "seq@cp~" in str(model.plan) and not model.proof.impossible
        if hasattr(plain.config, "_experts_implementation"):
            plain.config._experts_implementation = "eager"
        wanted = gradients(plain, **batch)
        for name, gradient in gradients(model, **batch).items():
            assert relative_error(gradient, wanted[name]) < 1e-10, name
        assert relative_error(model(**batch).logits, plain(**batch).logits) < 1e-10
    return model


@pytest.mark.parametrize(
    ("family", "mesh", "way", "options"),
    [
        ("gpt_oss", "cp=2,tp=2|ep=4", "ring", {"zero": 3, "changes": {"num_hidden_layers": 1, "sliding_window": 6}}),
        ("mixtral", "dp=2,cp=2|ep=4", "gathered", {"zero": 1, "changes": {"num_hidden_layers": 1}}),
    ],
)
def test_gradients_are_those_of_one_process(family: str, mesh: str, way: str, options: dict[str, Any]) -> None:
    """With padding and, of the first, a window and sinks."""
    model = compare(family, mesh, way, padded(), **options)
    assert set(ways(model)) == {way}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", ["dp=2,cp=2,tp=2|ep=8", "cp=4,tp=2|ep=8", "dp=2,cp=3|ep=6", "pp=2,dp=2,cp=2|ep=4", "pp=2,cp=2,tp=2|ep=2,etp=2"]
)
@pytest.mark.parametrize("way", ["ring", "gathered"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_folds_that_mix_axes(family: str, way: str, mesh: str) -> None:
    changes: dict[str, Any] = {}
    if family not in ("llama", "qwen3"):
        named = {"mixtral": "num_local_experts", "gpt_oss": "num_local_experts", "deepseek_v3": "n_routed_experts"}
        changes[named.get(family, "num_experts")] = 24
    batch, zero = token_batch(4, 24), {"ring": 3, "gathered": 1}[way]
    if mesh.startswith("pp"):
        compare(family, mesh, way, batch, zero=0, micro_batches=1, changes=changes)
    else:
        compare(family, mesh, way, batch, zero=zero, changes=changes)


def test_dropout_draws_the_masks_that_it_draws_without() -> None:
    batch, found = token_batch(4), []
    plain = tiny_model("llama", num_hidden_layers=1, attention_dropout=0.3, hidden_size=16).double()
    with in_float64():
        for mesh, order in (("cp=2", "zigzag"), ("dp=2", None)):
            model = foldcc.parallelize(copy.deepcopy(plain), mesh, example_inputs=batch, order=order, verify=False)
            torch.manual_seed(0)
            found.append(gradients(model, **batch))
    zigzag, other = found
    assert all(relative_error(zigzag[name], other[name]) < 1e-10 for name in other)


def test_it_is_chosen_where_it_saves_more_than_the_way_back_sends() -> None:
    found = {}
    for length in (16, 1024):
        plain = tiny_model("llama", num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=length).to("meta")
        batch = {name: x.to("meta") for name, x in token_batch(4, length).items()}
        model = foldcc.parallelize(plain, "cp=4", example_inputs=batch, verify=False)
        found[length] = "seq@cp~" in str(model.plan), sum(c.operator == "exchange" for c in model.collectives())
    # Once forward, and once backward: behind the last layer, and not of the logits.
    assert found == {16: (False, 0), 1024: (True, 2)}


def test_ranks_have_half_of_the_pairs_to_do() -> None:
    flops = {}
    for order in ("natural", "zigzag"):
        plain = tiny_model("llama", num_hidden_layers=1, vocab_size=32, max_position_embeddings=1024).to("meta")
        batch = {name: x.to("meta") for name, x in token_batch(1, 1024, vocabulary=32).items()}
        model = foldcc.parallelize(plain, "cp=4", example_inputs=batch, attention="ring", order=order, verify=False)
        flops[order] = local_flops(model.stages.lowered[-1].program)["model.layers.0.self_attn"]
    assert flops["zigzag"] * 4 * 4 == flops["natural"] * (2 * 4 + 1)


@pytest.mark.parametrize(
    ("mesh", "length", "options", "message", "valid"),
    [
        ("cp=2", 16, {"order": "nonsense"}, "order='nonsense' is no order of a sequence", "zigzag, natural"),
        ("tp=2", 16, {"order": "zigzag"}, "order='zigzag' says which positions a rank of cp has, and cp=1", "a mesh with cp"),
        (
            "cp=2",
            16,
            {"order": "zigzag", "attention": "halo"},
            "attention='halo' is not for order='zigzag'",
            "gathered, ring; or",
        ),
        (
            "cp=4",
            12,
            {"order": "zigzag"},
            "order='zigzag' cannot be on cp=4: q=12 cannot be cut in 8 equal parts",
            "gathered, ring",
        ),
        ("cp=2", 16, {"order": "zigzag", "plan": "plan cp=2 · order=natural"}, "order='zigzag' is asked for", "one of both"),
    ],
)
def test_what_cannot_be_is_refused(mesh: str, length: int, options: dict[str, Any], message: str, valid: str) -> None:
    with pytest.raises(FoldError) as error:
        foldcc.parallelize(tiny_model("llama", num_hidden_layers=1), mesh, example_inputs=token_batch(4, length), **options)
    assert message in str(error.value) and valid in str(error.value)


def test_a_plan_says_it_and_makes_it_again() -> None:
    model = folded("llama", "cp=2", token_batch(4), "ring", changes={"num_hidden_layers": 1})
    text = str(model.plan)
    assert "attention=ring · order=zigzag" in text and foldcc.Plan.parse(text) == model.plan
    plain = tiny_model("llama", num_hidden_layers=1)
    again = foldcc.parallelize(plain, "cp=2", example_inputs=token_batch(4), plan=text, verify=False)
    assert again.plan == model.plan


def _in_one_stretch(graph: torch.fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=ops.exchange.overload):
        node.args = (*node.args[:3], [abs(x) for x in node.args[3]], *node.args[4:5], [abs(x) for x in node.args[5]])


def _no_mask(graph: torch.fx.Graph) -> None:
    for name in ("attend_block", "attend_block_backward"):
        for node in graph.find_nodes(op="call_function", target=getattr(torch.ops.foldcc, name).default):
            node.update_arg(len(node.args) - 3, False)


def _other_pair(graph: torch.fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.lt.Tensor):
        node.target = torch.ops.aten.le.Tensor
        node.args = node.args[::-1]


@pytest.mark.parametrize("mistake", [_in_one_stretch, _no_mask, _other_pair])
def test_a_mistake_is_found(mistake: Any) -> None:
    model = folded("llama", "cp=2", token_batch(4), "ring", changes={"num_hidden_layers": 1})
    proof = foldcc.verify(model.with_passes(Broken(change=mistake)))
    assert not proof.ok and proof.stage == "broken"


def on_processes(wanted: dict[str, Tensor], logits: Tensor) -> None:
    batch = padded()
    mesh = foldcc.FoldedMesh.parse("cp=4|ep=4", device_type="cpu")
    plain = tiny_model("gpt_oss", num_hidden_layers=1, sliding_window=7)
    model = foldcc.parallelize(plain, mesh, example_inputs=batch, attention="ring", order="zigzag", verify=False)
    for _ in range(2):
        model.zero_grad()
        result = model(**batch)
        result.loss.backward()
    assert relative_error(result.logits.full_tensor().double(), logits) < 1e-5
    for name, p in model.named_parameters():
        if name in wanted:
            assert relative_error(p.grad.full_tensor().double(), wanted[name]) < 1e-5, name


def test_on_processes() -> None:
    with in_float64():
        plain = tiny_model("gpt_oss", num_hidden_layers=1, sliding_window=7).double()
        plain.config._experts_implementation = "eager"
        logits = plain(**padded()).logits.detach()
        run_distributed(on_processes, 4, gradients(plain, **padded()), logits)
