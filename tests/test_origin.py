"""verify begins at the module: a mistake of capture, which both programs share, is refuted by the module's own run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import foldcc
from foldcc.capture import masks, transformers
from foldcc.capture.shrunk import shrunk
from foldcc.module import FoldedModule
from foldcc.verification.field import Field
from foldcc.verification.origin import against_a_copy
from foldcc.verification.proof import Proof
from tests.models import tiny_model, token_batch

_SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "use_cache": False,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Granite": {"attention_multiplier": 3.0},
    "Mistral": {"sliding_window": 3},
    "Mixtral": {**_EXPERTS, "output_router_logits": True},
    "GptOss": {**_EXPERTS, "sliding_window": 3, "head_dim": 4},
    "DeepseekV3": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    },
}


def folded(name: str, *, mask: bool = False, **changes: Any) -> FoldedModule:
    import transformers as library

    torch.manual_seed(0)
    config = getattr(library, f"{name}Config")(**{**_SIZES, **_MODELS[name], **changes})
    model = getattr(library, f"{name}ForCausalLM")(config)
    inputs = token_batch(2, 8, vocabulary=32)
    given = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])} if mask else inputs
    return foldcc.parallelize(model, "tp=2", example_inputs=given)


def proof_of(name: str, *, mask: bool = False) -> Proof:
    return foldcc.verify(folded(name, mask=mask), rounds=1)


def the_module_itself(proof: Proof) -> bool:
    return proof.ok and not proof.missing and any("those of the module itself" in line for line in proof.proved)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        *((n, n in ("Llama", "Mistral")) for n in _MODELS),
        *(pytest.param(n, n == "GptOss", marks=pytest.mark.slow) for n in ("Llama", "Mistral", "GptOss")),
    ],
)
def test_what_is_captured_is_proved_to_be_what_the_module_computes(name: str, mask: bool) -> None:
    proof = proof_of(name, mask=mask)
    assert the_module_itself(proof), str(proof)
    assert "gradients" in proof.proved[-1]


# --- capture mistakes, on both sides of the proof of the folded program ---

attention = import_module("foldcc.ops.attention")  # the package has its node under this name
_allowed, _attention, _experts = attention.allowed_pairs, transformers._attention, transformers.experts


def diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    def allowed(q: Tensor, k: Tensor, valid: Tensor | None, *rest: Any) -> Tensor:
        found = _allowed(q, k, valid, *rest)
        return found if valid is None else found | torch.eye(q.shape[2], dtype=torch.bool)

    monkeypatch.setattr(attention, "allowed_pairs", allowed)


def without(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    def attend(*args: Any, **options: Any) -> Any:
        return _attention(*args, **{**options, option: None})

    monkeypatch.setattr(transformers, "_attention", attend)


def window(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = masks._functions
    wider = {"sliding_window_causal_mask_function": lambda size: masks.Pattern(True, size + 1)}
    monkeypatch.setattr(masks, "_functions", lambda: functions() | wider)


def dropped_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "experts", lambda *args, **options: _experts(*args, **{**options, "b_down": None}))


def gate_and_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts whose gate and up alternate, read as if they stood one after the other."""

    def experts(*args: Any, activation_fn: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
        def apart(rows: Tensor) -> Tensor:
            gate, up = rows.chunk(2, -1)
            return activation_fn(torch.stack([gate, up], -1).flatten(-2))

        return _experts(*args, activation_fn=apart, **options)

    monkeypatch.setattr(transformers, "experts", experts)


def rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours are turned in the model, halves in what is captured of it."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as model

    adapted = transformers.adapted

    @contextmanager
    def mistaken(*args: Any) -> Iterator[None]:
        with adapted(*args), masks.changed(vars(model), {"apply_rotary_pos_emb_interleave": model.apply_rotary_pos_emb}):
            yield

    monkeypatch.setattr(transformers, "adapted", mistaken)


@pytest.mark.parametrize(
    ("name", "plant", "at"),
    [
        ("Llama", diagonal, "self_attn"),
        ("Granite", lambda patch: without(patch, "scaling"), "self_attn"),
        ("Mistral", window, "self_attn"),
        ("GptOss", lambda patch: without(patch, "s_aux"), "self_attn"),
        ("DeepseekV3", rotary, "self_attn"),
        ("GptOss", gate_and_up, "mlp"),
        ("GptOss", dropped_bias, "mlp"),
    ],
    ids=["diagonal", "scale", "window", "sinks", "rotary", "gate_and_up", "bias"],
)
def test_a_mistake_of_capture_is_refuted_by_the_module(
    name: str, plant: Callable[[pytest.MonkeyPatch], None], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    proof = proof_of(name, mask=plant is diagonal)
    assert not proof.ok
    assert "The capture is wrong" in str(proof) and "what the module itself computes" in str(proof)
    assert proof.difference is not None and proof.difference.capture and at in proof.difference.node


# --- models that are too large to run ---


def copy_of(name: str) -> Proof:
    """What the small copy of a model on `meta` shows."""
    with torch.device("meta"):
        model = folded(name, num_hidden_layers=3)
    captured = model.stages["capture"].program
    nothing = Proof(program="", mesh="", stage="", prime=0, rounds=1, bound=0.0, proved=())
    return against_a_copy(nothing, model._programs.newest.origin, captured, [Field()])


def test_of_a_large_model_a_small_copy_is_run() -> None:
    proof = copy_of("Mistral")
    assert the_module_itself(proof), str(proof)
    assert "on a copy of the model with 1 layers" in proof.proved[-1]


def test_a_mistake_of_capture_is_refuted_by_a_small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    window(monkeypatch)
    proof = copy_of("Mistral")
    assert proof.difference is not None and proof.difference.capture and "self_attn" in proof.difference.node


@pytest.mark.parametrize("name", ["DeepseekV3", "GptOss", "Qwen3Moe", "Glm4Moe"])
def test_a_copy_has_a_layer_of_each_kind_and_keeps_what_is_equal(name: str) -> None:
    import transformers as library

    config = getattr(library, f"{name}Config")()
    with torch.device("meta"):
        model = getattr(library, f"{name}ForCausalLM")(config)
    copy, _ = shrunk(model)
    assert sum(p.numel() for p in copy.parameters()) < 100_000
    small = copy.config
    assert small.num_attention_heads > small.num_key_value_heads or config.num_attention_heads == config.num_key_value_heads
    assert [type(m) for m in copy.model.layers[-1].modules()] == [type(m) for m in model.model.layers[-1].modules()]
    assert {type(layer.mlp) for layer in copy.model.layers} == {type(layer.mlp) for layer in model.model.layers}


def test_a_large_model_without_a_configuration_is_said_to_be_unproved() -> None:
    proof = own(Own(), reduced=True)
    assert proof.ok
    (line,) = proof.missing
    assert line.startswith("the capture is not proved: ") and "no configuration" in line
    assert f"not proved  {line}" in str(proof)


# --- modules of one's own ---


class Own(nn.Module):
    """A constant that is no buffer, a norm without an epsilon, a loop with in-place sums, and a checkpoint."""

    def __init__(self, reentrant: bool | None = None, detached: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm = nn.Linear(8, 8), nn.RMSNorm(8)
        self.scale, self.reentrant, self.detached = torch.tensor([0.3, 0.7] * 4), reentrant, detached

    def forward(self, x: Tensor) -> Tensor:
        run = self.inside
        y = run(x) if self.reentrant is None else checkpoint(run, x, use_reentrant=self.reentrant)
        total = torch.zeros_like(y)
        for i in range(2):
            total[:, i::2] += y[:, i::2] * self.scale[i]
        return total.square().mean()

    def inside(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x)) * self.scale


def own(model: nn.Module, *, dtype: torch.dtype = torch.float32, **options: Any) -> Proof:
    example = (torch.randn(4, 8, dtype=dtype),)
    return foldcc.verify(foldcc.parallelize(model, "dp=2", example_inputs=example), rounds=1, **options)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_module_of_ones_own_is_run_too(reentrant: bool | None) -> None:
    proof = own(Own(reentrant))
    assert the_module_itself(proof), str(proof)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_of_any_dtype_is_run(dtype: torch.dtype) -> None:
    proof = own(Own().to(dtype), dtype=dtype)
    assert the_module_itself(proof), str(proof)


class Unlike(nn.Module):
    """What is traced of it is not what it runs."""

    def __init__(self, run: Callable[[Tensor], Tensor]):
        super().__init__()
        self.inner, self.run = nn.Linear(8, 8), run

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return (y if torch.compiler.is_exporting() else self.run(y)).square().mean()


def test_a_gradient_that_capture_leaves_out_is_refuted() -> None:
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad / 2

    proof = own(Unlike(Half.apply))
    assert proof.difference is not None and proof.difference.capture
    assert proof.parameter == "inner.weight"


def test_an_operator_without_a_meaning_in_the_module_is_named_and_the_rest_is_proved() -> None:
    proof = own(Unlike(lambda x: x.logcumsumexp(-1)))
    assert proof.ok
    (line,) = proof.missing
    assert "the capture is not proved" in line and "logcumsumexp" in line


def test_the_module_is_left_as_it_was() -> None:
    model = Own()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    attributes = dict(vars(model))
    own(model)
    assert dict(vars(model)) == attributes and torch.get_default_dtype() == torch.float32
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_hooks_are_not_called_with_elements_of_a_field_and_what_they_watch_is_no_part_of_the_module() -> None:
    model, seen = Own(), []
    for inner in model.children():
        inner.register_forward_hook(lambda *given: seen.append(given))
        inner.register_full_backward_hook(lambda *given: seen.append(given))
    assert the_module_itself(own(model)) and not seen


def test_the_module_is_called_as_it_was_when_it_was_captured() -> None:
    """With a number that is an input of the program, asked for hidden states, with frozen weights, without gradients."""
    batch = token_batch(2, 8, vocabulary=32)
    original = tiny_model("llama", num_hidden_layers=1, vocab_size=32)
    original.get_input_embeddings().weight.requires_grad_(False)
    again = foldcc.parallelize(original, "tp=2")
    for number in (5, 7):
        again(**batch, num_items_in_batch=number, output_hidden_states=True)
    assert "any int" in again.programs[-1]
    again.eval()
    proof = foldcc.verify(again, rounds=1)
    assert the_module_itself(proof), str(proof)
    assert "4 outputs and the gradients of 11 parameters" in proof.proved[-1]
    with torch.no_grad():
        again(**batch)
    proof = foldcc.verify(again, rounds=1)
    assert the_module_itself(proof), str(proof)
    assert "gradients of" not in proof.proved[-1]


def test_a_model_in_float16_is_said_to_be_unproved() -> None:
    proof = own(Own().half(), dtype=torch.float16)
    assert proof.ok and "float16" in proof.missing[0]
