"""Who attends to whom: capture against the model's own eager and sdpa implementations, for masks of many shapes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foldcc
from foldcc.capture import masks
from foldcc.capture.masks import Pattern, as_patterns
from foldcc.errors import FoldError
from foldcc.ir.node import argument
from foldcc.ops import attention, captured_record
from foldcc.testing import check_equivalence

_SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_DECODER = {"num_hidden_layers": 1, "num_key_value_heads": 2, "use_cache": False}
_CAPPED = {"head_dim": 4, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _DECODER),
    "window": ("MistralForCausalLM", {**_DECODER, "sliding_window": 3}),
    "sinks": (
        "GptOssForCausalLM",
        {**_DECODER, "sliding_window": 3, "head_dim": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    # Its first layer has a window, its second one none; scores of this size meet the cap.
    "soft cap": ("Gemma2ForCausalLM", {**_DECODER, **_CAPPED, "num_hidden_layers": 2, "sliding_window": 3}),
    "bidirectional": ("BertForMaskedLM", {"num_hidden_layers": 1}),
    # It does not ask the library for attention, and adds its mask itself.
    "own": (
        "GPTNeoXJapaneseForCausalLM",
        {"num_hidden_layers": 1, "use_cache": False, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "chunks": (
        "Llama4ForCausalLM",
        {**_DECODER, "attention_chunk_size": 3, "num_local_experts": 2, "intermediate_size_mlp": 16, "head_dim": 4},
    ),
    # It reads its mask where it chooses keys.
    "chosen keys": (
        "DeepseekV32ForCausalLM",
        {
            **_DECODER,
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 4,
            "index_topk": 3,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "first_k_dense_replace": 1,
        },
    ),  # fmt: skip
    # Its first layer is global, its second one local.
    "bidirectional_window": ("ModernBertForMaskedLM", {"num_hidden_layers": 2, "local_attention": 6}),
}
# Of each sample, the valid positions: padding on the right, on the left, on both sides, holes, whole rows.
_ROWS = (
    *("11111111", "11111000", "10000000"),
    *("00011111", "00000001"),
    *("00111100", "00010000"),
    *("11011011", "10000001", "00100100"),
    *("00000000", "00000000"),
)


class _Weighted(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, weight: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits * weight


def _model(name: str, implementation: str) -> nn.Module:
    import transformers

    kind, own = _MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind).config_class(**{**_SIZES, **own})
    config._attn_implementation = implementation
    if name == "bidirectional":
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return _Weighted(model)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((n, "eager" if n in ("sinks", "soft cap", "own") else "sdpa") for n in _MODELS),
        *(pytest.param(n, "eager", marks=pytest.mark.slow) for n in _MODELS if n not in ("sinks", "soft cap", "own")),
    ],
)
def test_a_query_attends_to_what_it_attends_to_in_the_model(name: str, implementation: str) -> None:
    """At every position, padding too, with all gradients.

    Only where a query may attend to nothing do the model's own implementations differ from each other: eager attention
    without sinks takes the mean of all values, sdpa zero. There, our node does as sdpa, and eager is compared without.
    """
    valid = torch.tensor([[int(c) for c in row] for row in _ROWS])
    ids = torch.randint(1, 32, valid.shape, generator=torch.Generator().manual_seed(0)).masked_fill(valid == 0, 0)
    weight = valid if implementation == "eager" and name != "sinks" else torch.ones_like(valid)
    random = torch.randn(*valid.shape, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = {"input_ids": ids, "attention_mask": valid, "weight": random * weight[..., None]}
    check_equivalence(_model(name, implementation), "dp=2,tp=2", kwargs=given)


def test_a_soft_cap_is_folded_proved_and_runs_in_bfloat16() -> None:
    ids = torch.randint(1, 32, (4, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids}
    plain = _model("soft cap", "eager").model
    folded = foldcc.parallelize(copy.deepcopy(plain), "dp=2,tp=2", example_inputs=inputs, verify=False)
    nodes = [n for _, n in folded.stages["shard"].program.nodes() if n.target is attention]
    assert [argument(n, "softcap") for n in nodes] == [0.5, 0.5]  # of the layer with a window, and of the other
    assert foldcc.verify(folded, rounds=1).ok
    narrow = foldcc.parallelize(copy.deepcopy(plain).to(torch.bfloat16), "dp=2,tp=2", example_inputs=inputs, verify=False)
    wanted = plain(**inputs).loss
    assert abs(folded(**inputs).loss - wanted) < 1e-5 * wanted
    assert abs(narrow(**inputs).loss - wanted) < 1e-2 * wanted
    for layer in plain.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert abs(plain(**inputs).loss - wanted) > 1e-4 * wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_that_may_attend_to_nothing_gets_zeros_and_no_gradient(dtype: torch.dtype, sinks: bool) -> None:
    local_attention = captured_record(attention).local
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 6, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    valid = torch.tensor([[0, 0, 1, 1, 1, 0], [0] * 6], dtype=torch.bool)
    sink = torch.randn(4, dtype=dtype) if sinks else None
    y = local_attention(q, k, v, sink, valid, 0.5, True, 0)
    assert torch.equal(y, attention(q, k, v, sink, valid, 0.5, True, 0))
    y.sum().backward()
    assert not y[0, :2].any()
    assert not y[1].any()
    assert y[0, 2:].abs().amin() > 0
    assert not q.grad[0, :, :2].any()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
        assert not x.grad[1].any()


# Transformers 5.23 has one function for this, 5.24 two that it applies one after the other, and earlier versions the second.
_COMPOSED = {
    "5.22": lambda made, x, at, rows: made["and_masks"](x, made["packed_sequence_mask_function"](rows)),
    "5.23": lambda made, x, at, rows: made["packed_sequence_compatibility_function"](x, at, rows),
    "5.24": lambda made, x, at, rows: made["and_masks"](
        made["remap_positions_for_packed_sequence"](x, at), made["packed_sequence_mask_function"](rows)
    ),
}


def _remapped(function: Any, at: Tensor) -> Any:
    return lambda batch, head, query, key: function(batch, head, at[batch, query], at[batch, key])


def _compatible(function: Any, at: Tensor, rows: Tensor) -> Any:
    remapped = _remapped(function, at)
    return lambda batch, head, q, k: remapped(batch, head, q, k) & (rows[batch, q] == rows[batch, k])


# Those that the installed version lacks.
_COMPOSERS = dict(zip(masks._NOT_IN_ALL, (_compatible, _remapped), strict=True))


@pytest.mark.parametrize("version", _COMPOSED)
def test_packed_rows_are_patterns_whichever_way_a_version_of_transformers_composes_them(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And as functions they compute what the library's own do."""
    from transformers import masking_utils

    for name in masks._NOT_IN_ALL:
        monkeypatch.setattr(masking_utils, name, getattr(masking_utils, name, _COMPOSERS[name]), raising=False)
    library = dict(vars(masking_utils))
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])
    sequences = masking_utils.find_packed_sequence_indices(positions)
    given = torch.arange(2)[:, None, None, None], torch.zeros(1, 1, 1, 1), torch.arange(6)[:, None], torch.arange(6)
    for window, name in ((0, "causal_mask_function"), (2, "sliding_window_causal_mask_function")):

        def composed(made: dict[str, Any], name: str = name, window: int = window) -> Any:
            whole = made[name](window) if window else made[name]
            return _COMPOSED[version](made, whole, positions, sequences)

        with as_patterns():
            found = composed(vars(masking_utils))
        assert found.one == Pattern(True, window)
        assert found.rows is sequences
        assert torch.equal(found(*given), composed(library)(*given))
        assert not torch.equal(found(*given), Pattern(True, window)(*given).expand(2, 1, 6, 6))


def test_what_is_no_pattern_is_a_function() -> None:
    from transformers import masking_utils as library

    place = torch.arange(4)
    given = torch.zeros(1, 1, dtype=torch.long), place[:1], place[:, None], place
    for other in (lambda b, h, q, k: k == 0, Pattern(False)):
        wanted = {
            name: getattr(library, name)(library.causal_mask_function, other)(*given) for name in ("or_masks", "and_masks")
        }
        with as_patterns():
            made = {name: getattr(library, name)(library.causal_mask_function, other) for name in wanted}
        assert not any(isinstance(x, Pattern) for x in made.values())
        assert all(torch.equal(made[name](*given), x) for name, x in wanted.items())


def test_rows_of_several_sequences_attend_within_each() -> None:
    positions = torch.stack([torch.arange(8), *(torch.arange(8) % n for n in (3, 5))], 0)[[0, 1, 2, 1]].contiguous()
    ids = torch.randint(1, 32, (4, 8), generator=torch.Generator().manual_seed(0))
    model = _model("llama", "eager").model
    found = check_equivalence(model, "dp=2,tp=2", kwargs={"input_ids": ids, "labels": ids, "position_ids": positions})
    assert found.largest < 1e-10
    plain = foldcc.parallelize(
        copy.deepcopy(model), "dp=2,tp=2", example_inputs={"input_ids": ids, "labels": ids}, verify=False
    )
    (node,) = (n for _, n in plain.stages["shard"].program.nodes() if n.target is attention)
    assert argument(node, "causal")  # positions that the model counts itself are those of one sequence, and no mask is made
    assert argument(node, "mask") is None
    assert abs(plain(input_ids=ids, labels=ids).loss - model(input_ids=ids, labels=ids, position_ids=positions).loss) > 1e-4


def test_a_model_that_reads_its_mask_is_proved_with_padding() -> None:
    ids = torch.randint(1, 32, (4, 8), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    proof = foldcc.verify(foldcc.parallelize(_model("chosen keys", "sdpa").model, "tp=2", example_inputs=given), rounds=1)
    assert proof.ok, str(proof)
    assert not proof.missing


@pytest.mark.parametrize("grouped", [False, True])
def test_a_mask_says_who_attends_or_is_added_to_scores(grouped: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2 if grouped and i else 4, 6, 8, dtype=torch.float64) for i in range(3))
    allowed = torch.rand(2, 1, 6, 6) > 0.5
    allowed[..., 0] = True
    added = torch.randn(4, 6, 6, dtype=torch.float64)
    wanted = torch.nn.functional.scaled_dot_product_attention
    for mask in (allowed, added, added.masked_fill(~allowed, float("-inf"))):
        y = attention(q, k, v, None, None, 0.5, False, 0, mask=mask)
        torch.testing.assert_close(y.transpose(1, 2), wanted(q, k, v, attn_mask=mask, scale=0.5, enable_gqa=grouped))
    y = attention(q, k, v, None, None, 0.5, True, 0, mask=added)
    both = added.masked_fill(torch.ones(6, 6).triu(1) > 0, float("-inf"))
    torch.testing.assert_close(y, attention(q, k, v, None, None, 0.5, False, 0, mask=both))


def test_a_version_of_transformers_that_composes_masks_in_another_way_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    monkeypatch.delattr(masking_utils, "causal_mask_function")
    with pytest.raises(FoldError, match="transformers.masking_utils has no causal_mask_function"), as_patterns():
        pass
