"""Mixers along a divided sequence: convolutions that look back are given a halo, and a state along it has its heads divided."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foldcc
from foldcc import ops
from foldcc.testing import check_equivalence, in_float64, run_distributed
from foldcc.testing.equivalence import relative_error
from tests.models import token_batch
from tests.test_context import gradients
from tests.test_sequences import Broken, _one_further, sent

HEADS, WIDTH = 8, 3


class Mixer(nn.Module):
    """A short convolution, and a state for each head, which forgets and learns from one position to the next."""

    def __init__(self, *, depthwise: bool = True, padded: bool = False, taps: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        wide = 3 * HEADS * WIDTH
        self.up, self.down, self.padded = nn.Linear(8, wide), nn.Linear(HEADS * WIDTH, 8), padded
        self.conv = nn.Conv1d(
            wide, wide, taps, groups=wide if depthwise else 1, bias=not padded, padding=0 if padded else taps - 1
        )
        self.forget = nn.Parameter(torch.randn(HEADS))

    def convolved(self, x: Tensor) -> Tensor:
        y = self.up(x).transpose(1, 2)
        y = self.conv(F.pad(y, (self.conv.kernel_size[0] - 1, 0))) if self.padded else self.conv(y)[:, :, : x.shape[1]]
        return F.silu(y).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, WIDTH)) for t in self.convolved(x).chunk(3, -1))
        state, seen = torch.zeros(len(x), HEADS, WIDTH, WIDTH, dtype=x.dtype), []
        for i in range(x.shape[1]):
            state = state * self.forget.sigmoid()[:, None, None] + k[:, i].unsqueeze(-1) * v[:, i].unsqueeze(-2)
            seen.append((q[:, i].unsqueeze(-2) @ state).squeeze(-2))
        return (x + self.down(torch.stack(seen, 1).flatten(2))).square().mean()


class Convolution(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.down(self.convolved(x)[..., : HEADS * WIDTH])).square().mean()


def given(length: int, samples: int = 4) -> Tensor:
    return torch.randn(samples, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def compare(plain: nn.Module, mesh: str, x: Tensor, **options: Any) -> foldcc.FoldedModule:
    model = foldcc.parallelize(copy.deepcopy(plain), mesh, example_inputs=(x,), **{"verify": True, **options})
    for m in (plain, model):
        m.zero_grad()
        m(x).backward()
    for name, p in plain.named_parameters():
        assert p.grad is None or relative_error(model.get_parameter(name).grad, p.grad) < 1e-10, name
    return model


@pytest.mark.parametrize(
    ("mesh", "length", "changes"),
    [
        ("cp=3", 12, {}),
        ("dp=2,cp=2", 8, {"depthwise": False}),
        ("cp=4", 8, {"padded": True, "taps": 4}),  # as far as two ranks before
    ],
)
def test_a_convolution_is_given_what_stands_before(mesh: str, length: int, changes: dict[str, Any]) -> None:
    model = compare(Convolution(**changes).double(), mesh, given(length), zero=3)
    assert model.summary().flops_ratio < 1.01 and sent(model, ops.halo) > 0


def test_what_a_convolution_sends_does_not_depend_on_the_length() -> None:
    models = [
        foldcc.parallelize(Convolution().double(), "cp=2", example_inputs=(given(length),), verify=False) for length in (16, 64)
    ]
    assert len({sent(m, ops.halo, ops.halo_sum) for m in models}) == 1


def test_a_convolution_that_looks_ahead_stays_one() -> None:
    class Ahead(Convolution):
        def convolved(self, x: Tensor) -> Tensor:
            return self.conv(self.up(x).transpose(1, 2))[:, :, 1 : 1 + x.shape[1]].transpose(1, 2)

    model = compare(Ahead().double(), "cp=2", given(8), verify=False)
    assert not any(n.target is ops.causal_conv for _, n in model.stages["shard"].program.nodes())


@pytest.mark.parametrize(("mesh", "zero"), [("dp=2,cp=2,tp=2", 3), ("cp=4", 1)])
def test_a_state_along_the_sequence_has_its_heads_divided(mesh: str, zero: int) -> None:
    model = compare(Mixer().double(), mesh, given(8), zero=zero)
    assert model.summary().flops_ratio < 1.01
    assert any(c.operator == "exchange" for c in model.collectives())


def test_in_bfloat16_and_without_gradients_and_at_another_length() -> None:
    plain = Mixer()
    x = given(8).float()
    model = foldcc.parallelize(copy.deepcopy(plain), "cp=2")
    narrow = foldcc.parallelize(copy.deepcopy(plain), "cp=2", example_inputs=(x,), precision=foldcc.Precision(), verify=False)
    with torch.no_grad():
        for length in (8, 12):
            y = given(length).float()
            assert torch.allclose(model(y), plain(y), atol=1e-6)
    assert torch.allclose(narrow(x), plain(x), rtol=0.02)


def test_a_halo_of_other_positions_is_found() -> None:
    model = foldcc.parallelize(Convolution().double(), "cp=2", example_inputs=(given(8),), verify=False)
    proof = foldcc.verify(model.with_passes(Broken(change=_one_further)))
    assert not proof.ok and proof.stage == "broken"


def on_processes(wanted: dict[str, Tensor]) -> None:
    mesh = foldcc.FoldedMesh.parse("cp=4", device_type="cpu")
    model = foldcc.parallelize(Mixer(), mesh, example_inputs=(given(8).float(),), verify=False)
    model(given(8).float()).backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad.full_tensor().double(), wanted[name]) < 1e-5, name


def test_on_processes() -> None:
    plain = Mixer().double()
    plain(given(8)).backward()
    run_distributed(on_processes, 4, {name: p.grad for name, p in plain.named_parameters()})


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["cp=2,tp=2|ep=4", "cp=4|ep=4"])
def test_layers_of_qwen3_next(mesh: str) -> None:
    """A gated delta rule in chunks of 64, of which the second is padded, and attention."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3NextConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, max_position_embeddings=128, linear_num_key_heads=4, linear_num_value_heads=8,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=24, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    plain, batch = transformers.Qwen3NextForCausalLM(config).double(), token_batch(2, 72)
    with in_float64():
        model = foldcc.parallelize(copy.deepcopy(plain), mesh, example_inputs=batch)
        assert model.summary().flops_ratio < 1.01
        plain.config._experts_implementation = "eager"
        wanted = gradients(plain, **batch)
        for name, gradient in gradients(model, **batch).items():
            assert relative_error(gradient, wanted[name]) < 1e-10, name


class Short(nn.Module):
    """A short convolution of each channel between two products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.conv = nn.Conv1d(32, 32, 3, groups=32, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.conv(self.up(x).transpose(1, 2))[:, :, : x.shape[1]].transpose(1, 2).sigmoid())
        return y


def test_channels_of_their_own_are_divided_over_tp() -> None:
    model, x = Short(), torch.randn(4, 6, 8)
    assert foldcc.parallelize(model, "dp=2,tp=2", example_inputs=(x,)).summary().flops_ratio == 1
    check_equivalence(model, "dp=2,tp=2", (x,))


class Images(nn.Module):
    """Convolutions, batch norms and poolings of images, in the three ways in which an average counts."""

    def __init__(self) -> None:
        super().__init__()
        pools = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), nn.AvgPool2d(3, 1, 1)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *pools)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.body(x).mean((2, 3))), y)


def test_samples_of_images_are_divided_through_poolings_and_the_proof_follows() -> None:
    model, batch = Images(), {"x": torch.randn(8, 3, 10, 9), "y": torch.randint(4, (8,))}
    check_equivalence(model, "dp=2,tp=2", kwargs=batch)
    folded = foldcc.parallelize(model, "dp=4", example_inputs=batch)
    assert folded.summary().flops_ratio == 1 and foldcc.verify(folded).ok
