"""Folding changes nothing: loss, outputs and every gradient in float64, for every family, and on every mesh of the plan."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foldcc.mesh import FoldedMesh
from foldcc.testing import check_equivalence
from tests.models import FAMILIES, WITH_AUX_LOSS, crossed, tiny_model, token_batch

QUICK = ("dp=2,tp=2|ep=4", "dp=2,tp=4|ep=4,etp=2", "dp=3,tp=2|ep=2")
SLOW = (
    "tp=2|ep=2",
    "tp=4|ep=2,etp=2",  # fewer key/value heads than tp
    "dp=4,tp=2|ep=8",
    "dp=8|ep=4",
)


def batch_for(mesh: str) -> dict[str, torch.Tensor]:
    return token_batch(2 * FoldedMesh.parse(mesh).size("dp"))


@pytest.mark.parametrize(("family", "mesh"), crossed(FAMILIES, QUICK, *SLOW))
def test_folding_changes_nothing(family: str, mesh: str) -> None:
    check_equivalence(tiny_model(family), mesh, kwargs=batch_for(mesh))


@pytest.mark.parametrize(("family", "mesh"), crossed(WITH_AUX_LOSS, QUICK, *SLOW))
def test_a_router_loss_is_taken_over_the_global_batch(family: str, mesh: str) -> None:
    check_equivalence(tiny_model(family, aux_loss=True), mesh, kwargs=batch_for(mesh))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_mesh_without_parallelism_is_the_model_itself(family: str) -> None:
    check_equivalence(tiny_model(family, num_hidden_layers=1), "dp=1", kwargs=token_batch(2))


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=2|ep=2,etp=2"])
def test_tied_embeddings_get_one_gradient(mesh: str) -> None:
    check_equivalence(tiny_model("mixtral", num_hidden_layers=1, tie_word_embeddings=True), mesh, kwargs=batch_for(mesh))


class Fused(nn.Module):
    """Attention whose queries, keys and values are rows of one weight, with fewer keys than queries."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = (heads, 2, 2)
        self.qkv, self.out = nn.Linear(16, 4 * sum(self.heads)), nn.Linear(4 * heads, 16)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split([4 * n for n in self.heads], -1)
        q, k, v = (y.unflatten(-1, (n, 4)).transpose(1, 2) for y, n in zip(parts, self.heads, strict=True))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads", [4, 8])
def test_a_fused_projection_to_heads_and_fewer_key_value_heads(heads: int) -> None:
    check_equivalence(nn.Sequential(Fused(heads), Fused(heads)), "dp=2,tp=2", args=(torch.randn(4, 6, 16),))


class Convolved(nn.Module):
    """Convolutions of a sequence to more channels and back, the second one row-parallel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Conv1d(8, 16, 3, padding=1), nn.ConvTranspose1d(16, 8, 3, padding=1)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.relu(self.up(self.first(x).transpose(1, 2)))
        return self.last(self.down(wide).transpose(1, 2))


def test_convolutions_after_each_other_are_column_and_row_parallel() -> None:
    check_equivalence(Convolved(), "dp=2,tp=2", args=(torch.randn(4, 6, 8),))


def test_a_rank_without_a_valid_token_weighs_nothing() -> None:
    batch = token_batch(4)
    batch["labels"][:2] = -100  # all that the first data-parallel rank holds
    check_equivalence(tiny_model("mixtral", num_hidden_layers=1), "dp=2,tp=2|ep=4", kwargs=batch)


@pytest.mark.parametrize("hot", [0, 7])
def test_all_tokens_on_few_experts(hot: int) -> None:
    """Most experts, and whole ranks, get no token at all."""
    model = tiny_model("mixtral", num_hidden_layers=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.zero_()
                parameter[hot] = 1e-3
                parameter[(hot + 1) % 8] = 1e-3
    check_equivalence(model, "dp=2,tp=2|ep=4", kwargs=batch_for("dp=2,tp=2|ep=4"))


def test_gradients_through_other_outputs() -> None:
    """A loss that is computed outside of the model, from the logits."""
    import foldcc
    from foldcc.testing import in_float64

    model = tiny_model("mixtral", num_hidden_layers=1, experts_implementation="eager").double()
    ids = token_batch(4)["input_ids"]
    with in_float64():
        folded = foldcc.parallelize(model, FoldedMesh.parse("dp=2,tp=2|ep=4"), example_inputs={"input_ids": ids})
        folded(input_ids=ids).logits.pow(2).mean().backward()
        model(input_ids=ids).logits.pow(2).mean().backward()
    grads = dict(folded.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name].grad, parameter.grad, rtol=1e-10, atol=1e-14)


def test_gradients_accumulate_over_calls() -> None:
    import foldcc
    from foldcc.testing import in_float64

    model = tiny_model("llama", num_hidden_layers=1, experts_implementation="eager").double()
    first, second = token_batch(4, seed=1), token_batch(4, seed=2)
    with in_float64():
        folded = foldcc.parallelize(model, FoldedMesh.parse("dp=2,tp=2"), example_inputs=first)
        for batch in (first, second):
            folded(**batch).loss.backward()
            model(**batch).loss.backward()
    grads = dict(folded.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name].grad, parameter.grad, rtol=1e-10, atol=1e-14)


def test_a_new_shape_compiles_a_new_program_with_the_same_parameters() -> None:
    import foldcc
    from foldcc.testing import in_float64

    model = tiny_model("mixtral", num_hidden_layers=1, experts_implementation="eager").double()
    with in_float64():
        folded = foldcc.parallelize(model, FoldedMesh.parse("dp=2,tp=2|ep=4"), example_inputs=token_batch(4, 16))
        for batch, length in ((4, 16), (2, 8), (6, 16)):
            inputs = token_batch(batch, length)
            assert abs(folded(**inputs).loss - model(**inputs).loss) < 1e-12
