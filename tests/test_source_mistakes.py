"""Options that change a result: a line that forgets one of them fails here."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from foldcc.mesh import FoldedMesh
from foldcc.ops import groups
from foldcc.runtime import clip
from foldcc.testing import check_equivalence
from tests.models import tiny_model, token_batch


class _Head(nn.Module):
    """An embedding, an activation, and a loss, each with options."""

    def __init__(self, act: Any = F.silu, reduction: str = "mean", padding_idx: int | None = None, **loss: Any):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, 16, padding_idx=padding_idx)
        self.up, self.head = nn.Linear(16, 16), nn.Linear(16, 32)
        self.act, self.reduction, self.loss = act, reduction, loss

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.act(self.up(self.embedding(ids)))).flatten(0, 1)
        loss = F.cross_entropy(logits, labels.flatten(), reduction=self.reduction, **self.loss)
        return loss / 7 if self.reduction == "sum" else loss


def _equal(model: nn.Module) -> None:
    random = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(32, (4, 8), generator=random) for _ in range(2))
    ids[:, :3], labels[:3, 2:5] = 5, 5
    check_equivalence(model, "dp=2,tp=2", kwargs={"ids": ids, "labels": labels})


@pytest.mark.parametrize(
    "options",
    [{"ignore_index": 5}, {"label_smoothing": 0.2}, {"reduction": "sum"}, {"reduction": "sum", "ignore_index": 5}],
    ids=str,
)
def test_every_option_of_a_loss_counts(options: dict[str, Any]) -> None:
    _equal(_Head(**options))


@pytest.mark.parametrize("option", ["ignore_index", "shift_labels"])
def test_options_of_a_library_models_loss_count(option: str) -> None:
    batch = token_batch(4)
    labels = batch["labels"] = batch["labels"].clamp(min=0)
    labels[0, 3:] = 5
    value = {"ignore_index": 5, "shift_labels": labels.roll(-2, 1)}[option]
    check_equivalence(tiny_model("llama", num_hidden_layers=1), "dp=2,tp=2", kwargs={**batch, option: value})


@pytest.mark.parametrize(
    "act",
    [partial(F.gelu, approximate="tanh"), partial(F.leaky_relu, negative_slope=0.3), partial(F.elu, alpha=0.5)],
    ids=["gelu", "leaky_relu", "elu"],
)
def test_an_activation_keeps_its_arguments(act: Any) -> None:
    _equal(_Head(act))


def test_the_padding_row_of_an_embedding_has_no_gradient_on_any_rank() -> None:
    _equal(_Head(padding_idx=5))


def test_attention_has_the_scale_that_the_model_gives_it() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_multiplier=3.0,
        num_key_value_heads=2,
        initializer_range=0.5,
        use_cache=False,
    )
    check_equivalence(transformers.GraniteForCausalLM(config), "dp=2,tp=2", kwargs=token_batch(2, 8))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_gradients_are_clipped_by_any_norm_as_in_torch(p: float, max_norm: float) -> None:
    torch.manual_seed(0)
    own = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]
    for parameter in own:
        parameter.grad = torch.randn_like(parameter)
    same = [nn.Parameter(x.detach().clone()) for x in own]
    for x, y in zip(same, own, strict=True):
        x.grad = y.grad.clone()
    norm, wanted = clip.clip_grad_norm_(own, max_norm, p), nn.utils.clip_grad_norm_(same, max_norm, p)
    torch.testing.assert_close(norm, wanted)
    for x, y in zip(own, same, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("axes", ["dp,tp", "tp,dp", "edp,ep", "ep,edp", "tp"])
def test_a_place_in_a_group_is_the_one_that_the_groups_of_the_mesh_have(axes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = FoldedMesh.parse("dp=3,tp=2|ep=2")
    with groups.active(mesh):
        for group in mesh.groups(tuple(axes.split(","))):
            for place, rank in enumerate(group):
                monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
                assert groups.index(axes) == place
