"""Parameters in a narrower dtype than the router train as in one process."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import foldcc


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_router_weights_keep_their_own_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        use_cache=False,
    )
    config._experts_implementation = "eager"
    plain = MixtralForCausalLM(config).to(dtype)
    ids = torch.randint(0, 64, (4, 8))
    want = plain(input_ids=ids, labels=ids).loss
    want.backward()
    gradients = {n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}
    plain.zero_grad()
    mesh = foldcc.FoldedMesh.parse("dp=2,tp=2|ep=4", device_type="virtual")
    model = foldcc.parallelize(plain, mesh, example_inputs={"input_ids": ids, "labels": ids})
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, want, rtol=4 * eps if dtype != torch.float64 else 1e-6, atol=0)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        error = (p.grad.double() - gradients[name].double()).norm() / gradients[name].double().norm()
        assert error < (16 * eps if dtype != torch.float64 else 1e-5), name
