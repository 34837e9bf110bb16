"""Who attends to whom: capture against the model's own eager and sdpa implementations, for masks of many shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foldcc.ops import attention
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
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _DECODER),
    "window": ("MistralForCausalLM", {**_DECODER, "sliding_window": 3}),
    "sinks": (
        "GptOssForCausalLM",
        {**_DECODER, "sliding_window": 3, "head_dim": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "bidirectional": ("BertForMaskedLM", {"num_hidden_layers": 1}),
    # It does not ask the library for attention, and adds its mask itself.
    "own": (
        "GPTNeoXJapaneseForCausalLM",
        {"num_hidden_layers": 1, "use_cache": False, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
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
    [(n, i) for n in _MODELS for i in ("eager", "sdpa") if (n, i) not in (("sinks", "sdpa"), ("own", "sdpa"))],
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_that_may_attend_to_nothing_gets_zeros_and_no_gradient(dtype: torch.dtype, sinks: bool) -> None:
    from foldcc.ops import local_attention

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
