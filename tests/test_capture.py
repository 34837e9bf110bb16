"""Capture: every way in which a model may bring attention and experts, in both tracers, and nothing is left behind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import foldcc
import foldcc.ops
from foldcc.capture import capture, modules
from foldcc.errors import FoldError
from foldcc.ir.program import Program
from foldcc.mesh import FoldedMesh
from foldcc.testing import check_equivalence
from tests import versions
from tests.models import FAMILIES, LAYER_KINDS, crossed, tiny_model, token_batch
from tests.versions import dynamo_traces_modules_that_functions_are_given

TRACERS = ("export", "dynamo")
SOME = ("llama", "qwen2_moe", "deepseek_v3", "gpt_oss")  # one of those that are written alike
both_tracers = pytest.mark.parametrize("tracer", versions.TRACERS)


def captured(model: nn.Module, tracer: str, **kwargs: Any) -> Program:
    return capture(model, (), kwargs, FoldedMesh.parse("dp=2"), device=torch.device("cpu"), tracer=tracer)


def operators(program: Program) -> Counter[str]:
    return Counter(str(n.target) for n in program.graph.graph.nodes if n.op == "call_function")


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]))


def activations(features: int = 16) -> Tensor:
    return torch.randn(4, 8, features, generator=torch.Generator().manual_seed(0))


# --- Transformers -----------------------------------------------------------------------------------------------------


@dynamo_traces_modules_that_functions_are_given
@pytest.mark.parametrize("family", [f if f in SOME else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_both_tracers_capture_the_same_operators(family: str) -> None:
    layers = LAYER_KINDS[family]
    model, batch = tiny_model(family, num_hidden_layers=layers), token_batch(4)
    first, second = (operators(captured(model, tracer, **batch)) for tracer in TRACERS)
    assert first == second
    assert first["foldcc.attention.default"] == layers
    dense = {"llama": 1, "qwen3": 1, "deepseek_v3": 1}.get(family, 0)
    assert first["foldcc.experts.default"] == layers - dense


class Loss(nn.Module):
    """Only the loss of a language model; what it computes at padding is nobody's business."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Tensor) -> Tensor:
        loss: Tensor = self.model(**kwargs).loss
        return loss


def padded_batch() -> dict[str, Tensor]:
    """Four rows: padded left, padded right, whole, and nothing but padding."""
    ids = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, 11:] = 0
    mask[3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 5] = -100  # the token after the padding would be predicted from padding
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_padding_is_carried(family: str) -> None:
    check_equivalence(Loss(tiny_model(family)), "dp=2,tp=2|ep=4", kwargs=padded_batch())


@both_tracers
def test_padding_is_carried_by_both_tracers(tracer: str) -> None:
    program = captured(tiny_model("mixtral", num_hidden_layers=1), tracer, **padded_batch())
    nodes = program.graph.graph.find_nodes(op="call_function", target=foldcc.ops.attention)
    assert all(isinstance(node.args[4], fx.Node) for node in nodes)


@both_tracers
def test_given_positions_are_carried_where_a_mask_says_that_rows_are_one_sequence(tracer: str) -> None:
    positions = torch.arange(3, 19).expand(4, 16).contiguous()
    captured(tiny_model("llama", num_hidden_layers=1), tracer, **padded_batch(), position_ids=positions)


def state(model: nn.Module) -> list[Any]:
    """All that a model's modules and configurations hold, hooks and modes included."""
    found: list[Any] = []
    for module in model.modules():
        found.append(dict(vars(module)))
        found += [dict(x) for x in vars(module).values() if isinstance(x, dict)]
        if hasattr(module, "config"):
            found.append(dict(vars(module.config)))
    return found


def registries() -> list[dict[str, Any]]:
    from transformers import masking_utils
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tables = (ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS)
    return [dict(vars(masking_utils)), *(dict(table._global_mapping) for table in tables)]


@both_tracers
def test_capturing_leaves_the_model_and_the_library_as_they_were(tracer: str) -> None:
    model = tiny_model("mixtral", num_hidden_layers=1)
    model.model.layers[0].eval()  # a mixture of modes is kept as well
    before = state(model), registries()
    captured(model, tracer, **token_batch(4))
    assert (state(model), registries()) == before


@both_tracers
def test_a_capture_that_fails_leaves_the_model_and_the_library_as_they_were(tracer: str) -> None:
    model = tiny_model("llama", num_hidden_layers=1).train()
    before = state(model), registries()
    with pytest.raises(foldcc.FoldError, match="is bool, of shape"):
        captured(model, tracer, **token_batch(4), attention_mask=torch.ones(4, 1, 16, 16, dtype=torch.bool))
    assert (state(model), registries()) == before


# --- scaled_dot_product_attention -------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, *, kv_heads: int = 4, mask: str = "", **options: Any):
        super().__init__()
        self.mask, self.options = mask, options
        self.q, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.k, self.v = (nn.Linear(16, 4 * kv_heads, bias=False) for _ in range(2))
        if mask == "learned":
            self.bias = weight(1, 4, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mask = None
        if self.mask == "bool":
            mask = torch.ones(8, 8, dtype=torch.bool).tril()
        elif self.mask == "by sample":
            mask = x.sum(-1)[:, None, None, :].expand(-1, 1, 8, -1)
        elif self.mask == "learned":
            mask = self.bias
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] < 4, **self.options)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize(("options", "kv_heads"), crossed([{}, {"is_causal": True}, {"scale": 0.3}], (4, 2)), ids=str)
def test_scaled_dot_product_attention_is_recognised(options: dict[str, Any], kv_heads: int) -> None:
    model = Attention(kv_heads=kv_heads, **options)
    for tracer in TRACERS:
        assert operators(captured(model, tracer, x=activations()))["foldcc.attention.default"] == 1
    check_equivalence(model, "dp=2,tp=2", (activations(),))


@pytest.mark.parametrize(("mask", "kv_heads"), crossed(["bool", "by sample", "learned"], (4, 2)))
@pytest.mark.filterwarnings("error::foldcc.passes.annotate.UnknownOperator")
def test_attention_with_a_mask_is_recognised(mask: str, kv_heads: int) -> None:
    model = Attention(kv_heads=kv_heads, mask=mask)
    for tracer in TRACERS:
        assert operators(captured(model, tracer, x=activations()))["foldcc.attention.default"] == 1
    check_equivalence(model, "dp=2,tp=2", (activations(),))


# --- operators without a rule ---------------------------------------------------------------------------------------


class Places(nn.Module):
    """Operators that are made of others, and an index that counts all samples and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        sample, place = torch.arange(x.shape[0])[:, None, None], torch.arange(x.shape[1]) + 0
        y = y[sample, place][:, 0] * torch.outer(place // 2, torch.ones(16)).to(y.dtype)
        y = torch.concat([y.diff(dim=-1, prepend=y[..., :1]), y.repeat(1, 1, 2), y.repeat_interleave(2, -1)], -1)
        return self.second(y[..., 5:21]) * (place > 2)[:, None] * ((place > 5) | (place < 1))[:, None]


@pytest.mark.filterwarnings("error::foldcc.passes.annotate.UnknownOperator")
def test_operators_without_a_rule_are_what_they_are_made_of() -> None:
    assert not any("index" in name for name in operators(captured(Places(), "export", x=activations())))
    check_equivalence(Places(), "dp=2,tp=2", (activations(),))
    drawn = Places()
    drawn.forward = lambda x: x * torch.poisson(x.abs())  # type: ignore[method-assign]
    state = torch.get_rng_state()
    with pytest.raises(FoldError, match="poisson"):
        foldcc.parallelize(drawn, "dp=2", example_inputs=(activations(),))
    assert torch.equal(torch.get_rng_state(), state)


class Counting(Places):
    """Counts choices, and adds up what they weigh, by `bincount`."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        chosen = y.argmax(-1).flatten() % 16
        weights = y.detach().amax(-1).flatten()
        return y * torch.bincount(chosen, weights, y.shape[-1]).to(y.dtype) + chosen.bincount(minlength=y.shape[-1])


@pytest.mark.parametrize("tracer", ["export", "dynamo"])
def test_bincount_is_a_sum_over_the_ranks_that_divide_what_is_counted(tracer: str) -> None:
    check_equivalence(Counting(), "dp=2,tp=2", (activations(),), capture=tracer)


def test_a_number_beyond_what_bincount_is_told_of_is_an_error() -> None:
    model = nn.Embedding(16, 8)
    model.forward = lambda x: model.weight[: x.shape[1]] * x.flatten().bincount(minlength=8)  # type: ignore[method-assign]
    ids = torch.zeros(4, 8, dtype=torch.int64)
    folded = foldcc.parallelize(model, "dp=2", example_inputs=(ids,))
    torch.testing.assert_close(folded(ids + 7), model(ids + 7))
    with pytest.raises(RuntimeError, match="index 8 is out of bounds"):
        folded(ids + 8)


class Chunked(Places):
    """Positions that see those before them in their chunk."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).unflatten(1, (2, -1))
        seen = torch.einsum("bcld,bcsd->bcls", y, y).tril()
        return self.second(torch.einsum("bcls,bcsd->bcld", seen, y).flatten(1, 2))


@pytest.mark.filterwarnings("error::foldcc.passes.annotate.UnknownOperator")
def test_einsum_is_the_products_that_it_is_made_of() -> None:
    assert not any("einsum" in name for name in operators(captured(Chunked(), "export", x=activations())))
    check_equivalence(Chunked(), "dp=2,tp=2", (activations(),))


# --- complex numbers --------------------------------------------------------------------------------------------------


class Rotated(nn.Module):
    """Queries and keys that are turned by their positions, as complex numbers, of which a buffer holds some."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("table", torch.polar(torch.ones(32, 2), torch.rand(32, 2)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1]).to(x.dtype), torch.tensor([1.0, 0.3], dtype=x.dtype))
        turned = torch.polar(torch.ones_like(angles), angles)[:, None] * 0.5
        places = torch.arange(x.shape[1]).flip(0)[:, None].expand(-1, 2)
        turned = turned * self.table[: x.shape[1]].view(-1, 1, 2) * self.table.gather(0, places)[:, None]

        def turn(y: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (4, 2, 2))) * turned).flatten(-2).transpose(1, 2)

        y = F.scaled_dot_product_attention(turn(self.q(x)), turn(self.k(x)).conj(), turn(x))
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.filterwarnings("error::foldcc.passes.annotate.UnknownOperator")
def test_complex_numbers_are_pairs_of_real_ones() -> None:
    model = Rotated()
    for tracer in TRACERS:
        values = (n.meta["val"] for _, n in captured(model, tracer, x=activations()).nodes())
        assert not any(x.is_complex() for x in values if isinstance(x, Tensor))
    check_equivalence(model, "dp=2,tp=2", (activations(),))
    proof = foldcc.verify(foldcc.parallelize(model, "dp=2,tp=2", example_inputs=(activations(),)))
    assert proof.ok
    assert not proof.missing


class Logarithms(nn.Module):
    def __init__(self, leaves: bool):
        super().__init__()
        self.leaves, self.inner = leaves, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.view_as_complex(self.inner(x).unflatten(-1, (8, 2)))
        return z if self.leaves else z.log().real


@pytest.mark.parametrize(("leaves", "why"), [(False, "what aten.log does to complex"), (True, "enter or leave the program")])
def test_complex_numbers_that_are_no_pairs(leaves: bool, why: str) -> None:
    with pytest.raises(FoldError, match=why):
        foldcc.parallelize(Logarithms(leaves), "dp=2", example_inputs=(activations(),))


# --- experts ----------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A Mixture-of-Experts layer that calls foldcc.ops.experts itself."""

    def __init__(self, *, gated: bool, transposed: bool, interleaved: bool, biased: bool):
        super().__init__()
        self.gated, self.transposed, self.interleaved = gated, transposed, interleaved
        wide = 12 if gated else 6
        self.router = weight(4, 16)
        self.w_up = weight(4, 16, wide) if transposed else weight(4, wide, 16)
        self.w_down = weight(4, 6, 16) if transposed else weight(4, 16, 6)
        self.b_up, self.b_down = (weight(4, wide), weight(4, 16)) if biased else (None, None)
        self.act = nn.SiLU()

    def gate(self, x: Tensor) -> Tensor:
        if not self.gated:
            y: Tensor = self.act(x)
            return y
        gate, up = (x[..., ::2], x[..., 1::2]) if self.interleaved else x.chunk(2, -1)
        return self.act(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, ids = F.linear(tokens, self.router).softmax(-1).topk(2)
        y = foldcc.ops.experts(
            tokens, ids, weights, self.w_up, self.w_down, activation_fn=self.gate, b_up=self.b_up, b_down=self.b_down,
            transposed=self.transposed, interleaved=self.interleaved,
        )  # fmt: skip
        return y.view_as(x)


@pytest.mark.parametrize(
    ("transposed", "biased", "tracer"),
    [
        (False, False, "export"),
        (True, True, "export"),
        pytest.param(False, True, "dynamo", marks=dynamo_traces_modules_that_functions_are_given),
        pytest.param(True, False, "dynamo", marks=dynamo_traces_modules_that_functions_are_given),
    ],
)
@pytest.mark.parametrize(("gated", "interleaved"), [(False, False), (True, False), (True, True)])
def test_experts_are_called_directly(gated: bool, interleaved: bool, transposed: bool, biased: bool, tracer: str) -> None:
    model = Experts(gated=gated, transposed=transposed, interleaved=interleaved, biased=biased)
    check_equivalence(model, "dp=2,tp=2|ep=2,etp=2", (activations(),), capture=tracer)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 6, bias=False), nn.Linear(6, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


class LoopOverExperts(nn.Module):
    """A layer as it is often written: experts are modules, and each finds its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def routed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        found = self.gate(tokens).softmax(-1).topk(2)
        return found.values, found.indices

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, ids = self.routed(tokens)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(ids == number)
            y = y.index_add(0, token, expert(tokens[token]) * weights[token, choice, None])
        return y.view_as(x)


def stacked(layer: LoopOverExperts, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    weights, ids = layer.routed(tokens)
    up, down = (torch.stack([getattr(e, name).weight for e in layer.experts]) for name in ("up", "down"))
    return foldcc.ops.experts(tokens, ids, weights, up, down, activation_fn=F.gelu).view_as(x)


@pytest.fixture
def registered() -> Iterator[None]:
    foldcc.register_experts(LoopOverExperts, stacked)
    yield
    del modules._EXPERTS[LoopOverExperts]


@pytest.mark.parametrize(("mesh", "tracer"), [("dp=2,tp=2|ep=4", "export"), ("dp=2,tp=2|ep=2,etp=2", "dynamo")])
@pytest.mark.usefixtures("registered")
def test_a_loop_over_experts_is_replaced_by_what_is_registered_for_it(mesh: str, tracer: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), LoopOverExperts())
    check_equivalence(model, mesh, (activations(),), capture=tracer)


def test_experts_that_have_no_weights_return_their_tokens() -> None:
    import transformers

    sizes = {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 16, "expert_ffn_hidden_size": 8, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    chosen = {"v_head_dim": 4, "head_dim": 4, "moe_topk": 3, "n_routed_experts": 4, "zero_expert_num": 2}
    config = transformers.LongcatFlashConfig(**sizes, **heads, **chosen)
    torch.manual_seed(0)
    model = transformers.LongcatFlashForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    proof = foldcc.verify(foldcc.parallelize(model, "tp=2|ep=2", example_inputs=token_batch(2)), rounds=1)
    assert proof.ok
    assert not proof.missing


# --- graph modules, calling conventions, modes ------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """Tied weights, a buffer, and outputs of a chosen structure."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("offset", torch.arange(16.0))

    def forward(self, x: Tensor, returns: str = "tensor") -> Any:
        y = self.first(x) + self.offset
        z = self.second(y.relu())
        return {"tensor": z, "tuple": (z, y.mean()), "dict": {"z": z, "rest": [y, None, 3]}}[returns]


@both_tracers
@pytest.mark.parametrize("returns", ["tensor", "tuple", "dict"])
def test_outputs_keep_their_structure(returns: str, tracer: str) -> None:
    model, x = TwoLayers(), activations()
    check_equivalence(model, "dp=2,tp=2", (x,), {"returns": returns}, capture=tracer)
    folded = foldcc.parallelize(model, FoldedMesh.parse("dp=2"), example_inputs=(x, returns), capture=tracer)
    found, wanted = folded(x, returns), model(x, returns)
    assert type(found) is type(wanted)
    if returns == "dict":
        assert found["rest"][1:] == [None, 3]


def test_tied_weights_stay_one_parameter() -> None:
    folded = foldcc.parallelize(TwoLayers(), FoldedMesh.parse("tp=2"), example_inputs=(activations(),))
    assert folded.first.weight is folded.second.weight
    assert [name for name, _ in folded.named_parameters()] == ["first.weight", "first.bias"]


def test_a_traced_module_is_accepted_as_it_is() -> None:
    traced = fx.symbolic_trace(TwoLayers(), concrete_args={"returns": "tensor"})
    check_equivalence(traced, "dp=2,tp=2", (activations(),))


@pytest.mark.parametrize("by_name", [False, True])
def test_the_module_of_an_exported_program_is_accepted_as_it_is(by_name: bool) -> None:
    x = activations().double()
    args, kwargs = ((), {"x": x}) if by_name else ((x,), {})
    module = torch.export.export(Attention(is_causal=True).double(), args, kwargs).module()
    folded = foldcc.parallelize(module, FoldedMesh.parse("dp=2,tp=2"), example_inputs=kwargs or args)
    found, wanted = folded(*args, **kwargs), module(*args, **kwargs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    found.sum().backward()
    wanted.sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(folded.get_parameter(name).grad, parameter.grad, rtol=1e-12, atol=1e-12)


class Mode(nn.Module):
    """Drops out while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return F.dropout(y, 0.5, self.training)


def test_a_program_belongs_to_a_mode() -> None:
    model = Mode().eval()
    folded = foldcc.parallelize(model, FoldedMesh.parse("dp=2"), example_inputs=(activations(),))
    torch.testing.assert_close(folded(activations()), model(activations()))
    folded.train()
    assert float((folded(activations()) == 0).float().mean()) == pytest.approx(0.5, abs=0.1)
    assert not model.training


@both_tracers
def test_a_model_on_meta_has_the_program_of_a_model_with_weights(tracer: str) -> None:
    import transformers

    model, batch = tiny_model("mixtral", num_hidden_layers=1), token_batch(4)
    with torch.device("meta"):
        on_meta = transformers.MixtralForCausalLM(model.config)
    assert operators(captured(on_meta, tracer, **{k: x.to("meta") for k, x in batch.items()})) == operators(
        captured(model, tracer, **batch)
    )


# --- where gradients stop ---------------------------------------------------------------------------------------------


class Stopped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = weight(16, 16), weight(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w
        with torch.no_grad():
            scale = (y @ self.v).sum(-1, keepdim=True)
            with torch.enable_grad():
                y = y + y @ self.v
        return y * scale + (y @ self.w).detach()


@both_tracers
def test_gradients_stop_where_the_model_stops_them(tracer: str) -> None:
    check_equivalence(Stopped(), "dp=2,tp=2", (activations(),), capture=tracer)


def test_router_losses_of_a_model_on_meta_count_experts_as_those_of_one_with_weights() -> None:
    with torch.device("meta"):
        model = tiny_model("qwen3_moe", aux_loss=True)
    folded = foldcc.parallelize(model, "dp=2,tp=2|ep=4", example_inputs=token_batch(4))
    held = foldcc.parallelize(tiny_model("qwen3_moe", aux_loss=True), "dp=2,tp=2|ep=4", example_inputs=token_batch(4))
    count = [sum(n.target is torch.ops.aten.histc.default for _, n in m.program.nodes()) for m in (folded, held)]
    assert count[0] == count[1] > 0


def test_writing_into_the_data_of_a_parameter_is_an_error_that_says_what_to_do() -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.up.weight.data.clamp_(-0.1, 0.1)
            return self.up(x).square().mean()

    with pytest.raises(foldcc.FoldError, match="makes a value that no tracer sees: it writes into the data") as told:
        foldcc.parallelize(Clamped(), "dp=2", example_inputs=(torch.randn(4, 8),))
    assert "optimizer.step()" in str(told.value)
