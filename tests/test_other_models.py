"""Models of other kinds fold as they are: encoder-decoders of Transformers, and a ViT and a ResNet in plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import foldcc
from foldcc.testing import check_equivalence, in_float64, run_distributed
from foldcc.testing.equivalence import compared, relative_error
from tests.models import crossed


def folded_alike(model: nn.Module, mesh: str, batch: dict[str, Tensor]) -> tuple[foldcc.FoldedModule, nn.Module]:
    """A model folded and proved, and its original, after a step of both in float64 in which all is the same."""
    reference = copy.deepcopy(model.double())
    given = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    with in_float64():
        folded = foldcc.parallelize(model, mesh, example_inputs=given, verify=True)
        result = compared(folded, reference, (), given)
    assert not folded.proof.missing
    assert result.largest < 1e-10, result
    return folded, reference


# --- encoder-decoders -------------------------------------------------------------------------------------------------

_SIZES: dict[str, dict[str, Any]] = {
    # The first decoder layer's position bias is that of the second as well; it has buckets for near and for far ones.
    "T5": {
        "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 10, "pad_token_id": 0, "decoder_start_token_id": 0,
    },
    "Bart": {
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32, "attention_dropout": 0.1,
    },
}  # fmt: skip


def translator(name: str) -> nn.Module:
    """An encoder-decoder whose embeddings and head are one weight, with dropout."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=96, d_model=32, use_cache=False, **_SIZES[name])
    model: nn.Module = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return model.train()


def sentences(samples: int = 4, source: int = 12, target: int = 8) -> dict[str, Tensor]:
    """Pairs of other lengths, padded on the right, on the target side with -100."""
    random = torch.Generator().manual_seed(samples)
    ids, labels = (torch.randint(3, 96, (samples, n), generator=random) for n in (source, target))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels[0, 4:], labels[-1, 6:] = -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.filterwarnings("error::foldcc.passes.annotate.UnknownOperator")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_encoder_decoders_are_folded_with_padding_and_dropout(name: str) -> None:
    model, batch = translator(name), sentences()
    folded, reference = folded_alike(model, "dp=2,tp=2", batch)
    assert folded.summary().flops_ratio == pytest.approx(1, abs=0.01)
    with torch.no_grad():
        found, wanted = (m.eval()(**sentences(6, 10, 14)) for m in (folded, reference))
    torch.testing.assert_close(found.logits, wanted.logits)
    torch.testing.assert_close(found.loss, wanted.loss)


# --- images -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return y


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width, 4)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class ViT(nn.Module):
    """Patches, a token of the class before them, learned positions, and the class read from it and from the patches' mean."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.cls, self.positions = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width) / 4)
        self.blocks = nn.Sequential(Encoder(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = self.norm(self.blocks(x))
        y: Tensor = self.head(torch.cat([x[:, 0], x[:, 1:].mean(1)], -1))
        return y


class Bottleneck(nn.Module):
    def __init__(self, source: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(source, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.down = nn.Sequential(nn.Conv2d(source, 2 * width, 1, stride, bias=False), nn.BatchNorm2d(2 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)), inplace=True)))
        return F.relu(y + self.down(x), inplace=True)


class ResNet(nn.Module):
    """A stem that pools, two stages, channels weighted by their means, and the class read from means over places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(Bottleneck(8, 8, 1), Bottleneck(16, 16, 2))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1), nn.Sigmoid())
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(self.pool(self.stem(images)))
        y: Tensor = self.head(F.adaptive_avg_pool2d(x * self.squeeze(x), 1).flatten(1))
        return y


class Classified(nn.Module):
    """A classifier as it is trained: with labels, a loss beside the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(images)
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=0.1), "logits": logits}


def classifier(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Classified(kind())


def pictures(samples: int = 8, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(samples)
    images = torch.randn(samples, 3, 16, 16, generator=random, dtype=dtype)
    return {"images": images, "labels": torch.randint(10, (samples,), generator=random)}


@pytest.mark.filterwarnings("error::foldcc.passes.annotate.UnknownOperator")
@pytest.mark.parametrize(("kind", "mesh"), crossed([ResNet, ViT], ["dp=2,tp=2", "dp=4"]))
def test_classifiers_of_images_are_folded_with_their_running_statistics(kind: type[nn.Module], mesh: str) -> None:
    folded, reference = folded_alike(classifier(kind), mesh, pictures())
    assert folded.summary().flops_ratio == pytest.approx(1, abs=0.05)
    with torch.no_grad():
        found, wanted = (m.eval()(**pictures(12))["logits"] for m in (folded, reference))
    torch.testing.assert_close(found, wanted)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def trained_on_a_rank() -> dict[str, Any]:
    batch = {name: x.chunk(2)[dist.get_rank()] for name, x in pictures(dtype=torch.float32).items()}
    folded = foldcc.parallelize(classifier(ResNet), foldcc.FoldedMesh.parse("dp=2", "cpu"))
    loss = folded(**batch)["loss"]
    loss.backward()
    found = {
        "loss": loss.item(),
        "gradients": {name: whole(p.grad) for name, p in folded.named_parameters()},
        "buffers": {name: x.clone() for name, x in folded.named_buffers()},
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return found | {"in bfloat16": folded(**batch)["loss"].item()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Another program was compiled")
def test_a_classifier_trains_on_processes_as_in_one() -> None:
    model, batch = classifier(ResNet), pictures(dtype=torch.float32)
    loss = model(**batch)["loss"]
    loss.backward()
    for found in run_distributed(trained_on_a_rank, 2, timeout=300):
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert found["in bfloat16"] == pytest.approx(loss.item(), rel=0.02)
        for name, p in model.named_parameters():
            assert relative_error(found["gradients"][name], p.grad) < 1e-5, name
        for name, x in model.named_buffers():
            torch.testing.assert_close(found["buffers"][name], x, rtol=1e-5, atol=1e-6, msg=name)


# --- losses -----------------------------------------------------------------------------------------------------------

LOSSES: dict[str, Any] = {
    "smoothed": lambda x, ids, w: F.cross_entropy(x, ids, label_smoothing=0.1),
    "weighted": lambda x, ids, w: F.cross_entropy(x, ids, w, label_smoothing=0.2),
    "probabilities": lambda x, ids, w: F.cross_entropy(x, x.detach().flip(0).softmax(-1), w, label_smoothing=0.1),
    "places": lambda x, ids, w: F.cross_entropy(x.unflatten(0, (-1, 2)).mT, ids.unflatten(0, (-1, 2)), w, reduction="none"),
    "summed": lambda x, ids, w: F.cross_entropy(x, ids, w, reduction="sum", label_smoothing=0.1),
    "logarithms": lambda x, ids, w: F.nll_loss(x.log_softmax(-1), ids) + nn.NLLLoss(w)(x.log_softmax(-1), ids),
}


class Losses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 12)
        self.register_buffer("weight", torch.rand(12))

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        return {name: loss(self.head(x).flatten(0, 1), ids.flatten(), self.weight) for name, loss in LOSSES.items()}


@pytest.mark.filterwarnings("error::foldcc.passes.annotate.UnknownOperator")
def test_losses_over_classes_are_sums_over_ranks() -> None:
    ids = torch.arange(24).view(4, 6) % 12
    ids[0, :5] = -100
    given = {"x": torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)), "ids": ids}
    check_equivalence(Losses(), "dp=2,tp=2", kwargs=given, verify=True)
