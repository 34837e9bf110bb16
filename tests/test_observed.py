"""Operators without a rule: what small runs show of them, and that nothing is divided that mixes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_joint_rules import ids, real, traced
from torch import Tensor, nn

import foldcc
from foldcc import FoldedMesh
from foldcc.errors import FoldError
from foldcc.layout import Shard
from foldcc.passes.annotate import UnknownOperator
from foldcc.rules.observed import observed_linear, observed_reads, observed_rule
from foldcc.testing import check_equivalence
from tests.versions import since

aten = torch.ops.aten


def divisible(call: tuple[Any, ...]) -> list[set[int]]:
    """For each operand, the dimensions that may be divided."""
    rule = observed_rule(traced(call))
    patterns = () if rule is None else rule.operands
    whole = set() if rule is None else rule.whole
    return [{d for d, dim in enumerate(p or ()) if not whole & set(dim)} for p in patterns]


@pytest.mark.parametrize(("call", "expected"), [
    ((aten.roll.default, real(4, 6, 3), [2], [1]), [{0, 2}]),
    ((aten.logcumsumexp.default, real(4, 6), 1), [{0}]),
    ((aten.avg_pool2d.default, real(4, 3, 4, 4), [2, 2]), [{0, 1}]),
    ((aten.group_norm.default, real(4, 6, 5), 3, real(6), real(6)), [{0}, set(), set()]),
    ((aten.cdist.default, real(4, 6, 3), real(4, 5, 3)), [{0, 1}, {0, 1}]),
    ((aten.index.Tensor, real(4, 6), [None, ids(6, 3)]), [{0}, set(), {0}]),
    ((aten.triangular_solve.default, real(4, 3, 2), real(4, 3, 3)), [{0}, {0}]),
    ((aten.repeat.default, real(4, 6), [1, 2]), [{0}]),
    ((aten.isin.Tensor_Tensor, ids(4, 6), ids(3, 3)), [{0}, set()]),
    ((aten._embedding_bag.default, real(4, 6), ids(4, 6), ids(1, 1)), []),
    ((aten._weight_norm.default, real(16, 16), real(16, 1), 0), [{0}, {0}]),  # its kernel reads past operands that do not fit
], ids=lambda c: str(c[0]) if isinstance(c, tuple) else "")  # fmt: skip
def test_dimensions_of_which_each_entry_is_computed_alone_may_be_divided(call: Any, expected: list[set[int]]) -> None:
    assert divisible(call) == expected


@pytest.mark.parametrize("call", [
    (aten.roll.default, real(4, 6), [1], [0]),
    (aten.roll.default, real(4, 6), [6]),
    (aten.roll.default, torch.empty(8192, 64, dtype=torch.float64), [4096], [0]),  # too large to be tried as it is
    (aten.flip.default, real(4, 6), [0]),
    (aten.std.correction, real(4, 6), [0]),
    (aten.index.Tensor, real(4, 6), [ids(4, 4)]),
    (aten.index.Tensor, real(2, 6), [ids(2, 2)]),
    (aten.as_strided.default, real(4, 6), [4, 3], [6, 1]),
    (aten.repeat.default, real(4, 6), [2, 1]),
    (aten.bernoulli.default, real(4, 6).sigmoid()),
    (aten.diagonal.default, real(4, 4), 0, 0, 1),
    (aten.native_group_norm.default, real(4, 6, 5), real(6), real(6), 4, 6, 5, 3, 1e-5),  # is told the number of samples
], ids=lambda c: str(c[0]))  # fmt: skip
def test_samples_that_are_moved_mixed_or_counted_are_not_divided(call: tuple[Any, ...]) -> None:
    assert all(0 not in dims for dims in divisible(call)[:1])


def test_a_gradient_that_counts_over_all_samples_is_no_sum_of_parts() -> None:
    assert divisible((aten.embedding.default, real(6, 4), ids(6, 8, 3), -1, False)) == [{1}, {0, 1}]
    assert divisible((aten.embedding.default, real(6, 4), ids(6, 8, 3), -1, True)) == [{1}, set()]


@pytest.mark.parametrize(("call", "expected"), [
    ((aten.roll.default, real(4, 6), [1], [0]), {0}),
    ((aten.col2im.default, real(4, 4, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]), {0}),
    ((aten.cdist.default, real(4, 6, 3), real(4, 5, 3)), set()),
    ((aten.logcumsumexp.default, real(4, 6), 1), set()),
    ((aten.bernoulli.default, real(4, 6).sigmoid()), set()),
    ((aten.index.Tensor, real(4, 6), [None, ids(6, 3)]), {0}),
], ids=lambda c: str(c[0]) if isinstance(c, tuple) else "")  # fmt: skip
def test_terms_of_a_sum_pass_what_is_seen_to_be_linear(call: tuple[Any, ...], expected: set[int]) -> None:
    assert {i for group in observed_linear(traced(call)) for i in group} == expected


# --- in a model -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("observed::mixed", mutates_args=())
def mixed(x: Tensor, w: Tensor) -> Tensor:
    """Mixes the places of each sample."""
    return torch.einsum("bsd,de->bse", x.cumsum(1), w)


@mixed.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], w.shape[1])


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    x, w = ctx.saved_tensors
    return torch.einsum("bse,de->bsd", g, w).flip(1).cumsum(1).flip(1), torch.einsum("bsd,bse->de", x.cumsum(1), g)


mixed.register_autograd(_backward, setup_context=_save)


class Mixing(nn.Module):
    def __init__(self, over_samples: bool = False):
        super().__init__()
        self.first, self.w, self.last = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)
        self.over_samples = over_samples

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y.std(0) * y if self.over_samples else mixed(y, self.w))


@pytest.mark.filterwarnings("error::foldcc.passes.annotate.UnknownOperator")
@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "dp=4"])
def test_a_custom_operator_keeps_samples_apart(mesh: str) -> None:
    check_equivalence(Mixing(), mesh, (torch.randn(4, 6, 8),))
    for dtype in (torch.float32, torch.bfloat16):
        folded = foldcc.parallelize(
            Mixing().to(dtype), FoldedMesh.parse(mesh), example_inputs=(torch.randn(4, 6, 8).to(dtype),)
        )
        (node,) = (n for _, n in folded.stages["shard"].program.nodes() if n.target is torch.ops.observed.mixed.default)
        assert isinstance(node.meta["layout"].states["dp"], Shard)


class Pooled(nn.Module):
    """Averages of neighbours, whose derivative is told the shape by the values."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool1d(self.down(torch.relu(self.up(x))), 2)


def test_a_derivative_that_reads_no_number_of_an_operand_is_linear_whatever_that_is() -> None:
    x = torch.randn(4, 3, 8)
    assert observed_reads(
        traced((aten.avg_pool2d_backward.default, x[..., :4], x, [1, 2], [1, 2], [0, 0], False, True, None))
    ) == {0}
    check_equivalence(Pooled(), "dp=2,tp=2", (x,))


def test_the_warning_says_on_which_axes_an_operator_is_replicated() -> None:
    with pytest.warns(UnknownOperator, match=r"aten.std.dim has no factor rule; its operands are replicated on dp\."):
        check_equivalence(Mixing(over_samples=True), "dp=2,tp=2", (torch.randn(4, 6, 8),))


class Inverse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x @ self.w)


@since((2, 13), "has no operator for this effect")
def test_an_operator_with_an_effect_is_named() -> None:
    with pytest.raises(FoldError, match="aten._linalg_check_errors.default has an effect") as told:
        foldcc.parallelize(Inverse(), FoldedMesh.parse("dp=2"), example_inputs=(torch.randn(4, 6, 6),))
    assert "inv_ex" in str(told.value)


# --- what is computed several times ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "warned"), [(7, True), (8, False)])
def test_what_several_ranks_compute_is_said_once_with_the_number(width: int, warned: bool) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = foldcc.parallelize(nn.Linear(width, width), "tp=4", example_inputs=(torch.randn(3, 5, width),))
        with torch.no_grad():
            model(torch.randn(3, 5, width))
    told = [str(w.message) for w in said if "times the FLOPs of the model" in str(w.message)]
    assert len(told) == warned
    assert not warned or "compute 4.00 times" in told[0]


IMAGES = {"image_size": 8, "patch_size": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
TEXT = {"vocab_size": 32, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}


@pytest.mark.parametrize("name", ["ViTForImageClassification", "Gemma3ForCausalLM"])
def test_models_with_operators_of_their_own_are_computed_once(name: str) -> None:
    import transformers

    images = name.startswith("ViT")
    config = transformers.ViTConfig if images else transformers.Gemma3TextConfig
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = getattr(transformers, name)(config(**sizes, **(IMAGES if images else TEXT)))
    ids = torch.zeros(8, 8, dtype=torch.long)
    batch = {"pixel_values": torch.randn(8, 3, 8, 8), "labels": ids[:, 0]} if images else {"input_ids": ids, "labels": ids}
    assert foldcc.parallelize(model, "dp=4", example_inputs=batch).summary().flops_ratio <= 1.01
