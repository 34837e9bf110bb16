"""Initial values are functions of a seed, a parameter's name and positions: the same on every fold, drawn where they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny_model, token_batch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import foldcc
from foldcc.testing import run_distributed


class Plain(nn.Module):
    """Initialised as PyTorch's own modules are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(64, 32, padding_idx=-2), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return (x + self.down(torch.relu(self.up(self.norm(x))))).square().mean()


IDS = torch.arange(64).view(4, 16)


def initialised(mesh: Any, seed: int = 0, **options: Any) -> foldcc.FoldedModule:
    with torch.device("meta"):
        model = Plain()
    folded = foldcc.parallelize(model, mesh, example_inputs={"ids": IDS}, **options).to_empty(device="cpu")
    foldcc.init_parameters(folded, seed)
    return folded


def test_weights_are_the_same_on_every_fold_and_others_with_another_seed() -> None:
    first = initialised("dp=1").state_dict()
    other = initialised("dp=2,tp=2", 1).state_dict()
    for mesh in ("dp=2,tp=2",):
        for name, x in initialised(mesh).state_dict().items():
            assert torch.equal(x, first[name])
            assert torch.equal(x, other[name]) == ("norm" in name)


def test_weights_have_the_distributions_that_modules_ask_for() -> None:
    folded = initialised("dp=2,tp=2")
    assert float(folded.embed.weight.detach().std()) == pytest.approx(1, abs=0.05) and not folded.norm.bias.any()
    assert not folded.embed.weight[-2].any() and bool(folded.embed.weight[:-2].any(1).all())
    bound = 32**-0.5
    assert 0.95 * bound < float(folded.up.weight.detach().abs().max()) < bound
    assert float(folded.up.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def held() -> dict[str, Tensor]:
    mesh = foldcc.init_folded_mesh("cpu", attention={"dp": 2, "tp": 2})
    folded = initialised(mesh, zero=3)
    assert isinstance(folded.up.weight, DTensor) and folded.up.weight.to_local().numel() == folded.up.weight.numel() // 4
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in folded.state_dict().items()}


def test_processes_draw_the_parts_that_they_hold() -> None:
    first = initialised("dp=1").state_dict()
    for found in run_distributed(held, 4):
        for name, x in found.items():
            assert torch.equal(x, first[name]), name


def test_a_transformers_model_is_initialised_as_its_library_says() -> None:
    weights = []
    for mesh in ("dp=1", "dp=2,tp=2|ep=4"):
        with torch.device("meta"):
            model = tiny_model("mixtral", num_hidden_layers=1)
        folded = foldcc.parallelize(model, mesh, example_inputs=token_batch(4)).to_empty(device="cpu")
        foldcc.init_parameters(folded, 3)
        weights.append(folded.state_dict())
        assert torch.isfinite(folded(**token_batch(4)).loss)
    assert float(weights[0]["model.layers.0.mlp.experts.gate_up_proj"].std()) == pytest.approx(0.02, rel=0.05)
    for name, x in weights[0].items():
        assert torch.equal(x, weights[1][name])


class Odd(Plain):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.scale = nn.Parameter(torch.ones(8))

    def reset_parameters(self) -> None:
        if self.how == "copied":
            self.scale.copy_(torch.arange(8.0))
        elif self.how == "read":
            self.scale.normal_()
            self.scale.div_(self.scale.norm())

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale.sum()


@pytest.mark.parametrize(
    ("how", "message"),
    [("copied", "runs aten.copy_"), ("read", "runs aten.linalg_vector_norm"), ("not", "Nothing initialises scale")],
)
def test_what_is_no_function_of_positions_is_an_error(how: str, message: str) -> None:
    folded = foldcc.parallelize(Odd(how), "dp=2", example_inputs={"ids": IDS})
    with pytest.raises(foldcc.FoldError, match=message):
        foldcc.init_parameters(folded, 0)


class Mute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).sum()


def test_a_module_that_does_not_initialise_itself_and_one_on_meta_are_errors() -> None:
    folded = foldcc.parallelize(Mute(), "dp=2", example_inputs=(torch.randn(4, 8),))
    with pytest.raises(foldcc.FoldError, match="Mute does not say how"):
        foldcc.init_parameters(folded, 0)
    with pytest.raises(foldcc.FoldError, match="scale is on meta"):
        foldcc.init_parameters(foldcc.parallelize(Mute().to("meta"), "dp=2", example_inputs=(torch.randn(4, 8),)), 0)
