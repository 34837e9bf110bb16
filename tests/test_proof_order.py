"""What orders, rounds or casts elements of the field goes by one order in which data keeps its own meaning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import foldcc
from foldcc.mesh import FoldedMesh
from foldcc.program import Program
from foldcc.testing import in_float64
from foldcc.testing.mutate import equivalent, mutants
from foldcc.verification.field import Field
from foldcc.verification.mode import FieldMode
from tests.test_verify import broken_at

aten = torch.ops.aten
FIELD = Field(seed=3)


@pytest.mark.parametrize(
    "left_out",
    [
        lambda x: x.clamp(min=0),
        lambda x: x.clamp(max=1.0),
        lambda x: x.clamp(min=-0.5, max=0.5),
        lambda x: torch.maximum(x, torch.zeros_like(x)),
        lambda x: torch.minimum(x, -x),
        lambda x: torch.where(x > 0.5, x, x * 2),
        lambda x: x * (x >= x.roll(1)),
        lambda x: x.masked_fill(x < 0, 1.0),
        lambda x: x.abs(),
        lambda x: x.sign(),
        lambda x: x.round(),
        lambda x: x.round(decimals=2),
        lambda x: x.floor(),
        lambda x: x.ceil(),
        lambda x: x.frac(),
        lambda x: x % 1.0,
        lambda x: x.fmod(2.0),
        lambda x: x.long().double(),
        lambda x: x.sort().values,
        lambda x: x.cummax(0).values,
        lambda x: x[x.argsort()],
        lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])).double(),
        F.relu,
        F.relu6,
        F.leaky_relu,
        F.elu,
        F.selu,
        F.hardswish,
        F.hardtanh,
        lambda x: F.threshold(x, 0.1, 0.0),
    ],
)
def test_leaving_out_what_orders_changes_many_elements(left_out) -> None:
    x = FIELD.random((1000,), torch.Generator().manual_seed(0))
    with FieldMode(FIELD):
        y = left_out(x)
    assert 0.2 < float((y != x).double().mean())


def test_data_keeps_its_meaning_through_arithmetic() -> None:
    with FieldMode(FIELD):
        at = torch.arange(40) / 10
        assert (at > 1.95).tolist() == [i > 19 for i in range(40)]
        assert at.floor().long().tolist() == [i // 10 for i in range(40)]
        assert ((torch.arange(5) - 2.0).clamp(min=-1) + 2).long().tolist() == [1, 1, 2, 3, 4]


# --- programs in which one operator is left out ---

V, S, H = 32, 6, 8
IDS = torch.arange(4 * S).reshape(4, S) % V


class Model(nn.Module):
    """An embedding, what is tried, and a head."""

    def __init__(self, middle: Callable[..., Tensor], vocab: int = V, padding: int | None = None, **buffers: Tensor):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, H, padding_idx=padding), nn.Linear(H, 4, bias=False)
        self.middle = middle
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, ids: Tensor, **more: Tensor) -> Tensor:
        buffers = dict(self.named_buffers())
        return self.head(self.middle(self.embed(ids), ids, **buffers, **more)).square().mean()


def attending(x: Tensor, allowed: Tensor) -> Tensor:
    return (x @ x.transpose(1, 2)).masked_fill(~allowed, -math.inf).softmax(-1) @ x


def count_clamped(x: Tensor, ids: Tensor) -> Tensor:
    return x / (ids > 20).float().sum().clamp(min=1.0)


def largest_of_zero(x: Tensor, ids: Tensor) -> Tensor:
    return torch.maximum(x, torch.zeros_like(x))


def causal_by_buffer(x: Tensor, ids: Tensor, causal: Tensor) -> Tensor:
    return attending(x, causal[:S, :S] != 0)


def special_token(x: Tensor, ids: Tensor) -> Tensor:
    return torch.where((ids == 7)[..., None], x * 10, x)


def padding_token(x: Tensor, ids: Tensor) -> Tensor:
    return torch.where((ids != 3)[..., None], x, x.new_zeros(()))


def buckets(x: Tensor, ids: Tensor) -> Tensor:
    """T5's: exact for near positions, logarithmic for far ones."""
    far = torch.arange(S)[None] - torch.arange(S)[:, None]
    n = far.abs()
    large = 2 + (torch.log(n.float() / 2) / math.log(3) * 2).long()
    bucket = torch.where(n < 2, n, torch.minimum(large, torch.full_like(large, 3)))
    return (x @ x.transpose(1, 2) + x[0, 0][bucket]) @ x


def quantised(x: Tensor, ids: Tensor) -> Tensor:
    return torch.round(x * 16) / 16


def by_position(x: Tensor, ids: Tensor) -> Tensor:
    return x * torch.cos(torch.arange(S) / 10)[:, None]


def group_masked(x: Tensor, ids: Tensor, groups: Tensor) -> Tensor:
    """DeepSeek's choice of groups: scores of other groups are left out."""
    return (x + torch.where(groups == 0, 0.0, -math.inf)).softmax(-1)


def additive(x: Tensor, ids: Tensor, groups: Tensor) -> Tensor:
    return (x + groups).softmax(-1)


def float_mask(x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.float()[..., None] > 0.5, x, x * 3)


def flushed(x: Tensor, ids: Tensor) -> Tensor:
    return torch.where(x.abs() < 1e-3, torch.zeros_like(x), x)


def left_out(target: Any, kept: int = 0) -> Callable[[fx.Node], Any]:
    """Takes the operand for the result."""
    return lambda n: n.target is target and n.args[kept]


def zeroed(target: Any) -> Callable[[fx.Node], Any]:
    def edit(n: fx.Node) -> Any:
        if n.target is not target:
            return False
        with n.graph.inserting_after(n):
            zeros = n.graph.call_function(aten.zeros_like.default, (n,))
        zeros.meta = dict(n.meta)
        return zeros

    return edit


CAUSAL = torch.ones(8, 8).tril()
GROUPS = torch.tensor([0.0, -math.inf] * (H // 2))
LEFT_OUT = [
    (count_clamped, left_out(aten.div.Tensor), {}, {}),
    (count_clamped, left_out(aten.clamp.default), {}, {}),
    (largest_of_zero, left_out(aten.maximum.default), {}, {}),
    (causal_by_buffer, left_out(aten.masked_fill.Scalar), {"causal": CAUSAL}, {}),
    (special_token, left_out(aten.where.self, 2), {"vocab": 20_000}, {}),
    (padding_token, left_out(aten.where.self, 1), {"vocab": 20_000, "padding": 3}, {}),
    (buckets, left_out(aten.minimum.default), {}, {}),
    (buckets, zeroed(aten.abs.default), {}, {}),
    (quantised, left_out(aten.round.default), {}, {}),
    (by_position, zeroed(aten.arange.default), {}, {}),
    (group_masked, left_out(aten.add.Tensor), {"groups": GROUPS}, {}),
    (additive, left_out(aten.add.Tensor), {"groups": GROUPS}, {}),
    (float_mask, left_out(aten.where.self, 1), {}, {"mask": torch.ones(4, S, dtype=torch.long)}),
    (flushed, left_out(aten.where.self, 2), {}, {}),
]


def folded(middle: Callable[..., Tensor], more: dict[str, Tensor] | None = None, **options: Any) -> foldcc.FoldedModule:
    with in_float64():
        model = Model(middle, **options).double()
        return foldcc.parallelize(model, FoldedMesh.parse("dp=2"), example_inputs={"ids": IDS, **(more or {})}, kernels="aten")


def test_what_went_one_way_only_is_not_proved() -> None:
    proof = foldcc.verify(folded(lambda x, ids: x / (ids + 2).float().mean().clamp(min=1.0)))
    assert proof.ok and any("aten.clamp" in x for x in proof.undecided)
    assert any("aten.clamp" in line for line in str(proof).splitlines() if line.startswith("  not proved"))


@pytest.mark.parametrize(("middle", "edit", "options", "more"), LEFT_OUT, ids=lambda x: getattr(x, "__name__", ""))
def test_an_operator_that_orders_is_missed_when_it_is_left_out(
    middle: Callable[..., Tensor], edit: Callable[[fx.Node], Any], options: dict[str, Any], more: dict[str, Tensor]
) -> None:
    model = folded(middle, more, **options)
    assert foldcc.verify(model, rounds=1).ok

    def edited(program: Program) -> None:
        for block in program.blocks.values():
            for node in list(block.graph.nodes):
                if other := edit(node):
                    node.replace_all_uses_with(other, delete_user_cb=lambda user, other=other: user is not other)
                    block.graph.eliminate_dead_code()
                    block.recompile()
                    return
        raise AssertionError("nothing was edited")

    assert not foldcc.verify(broken_at(model, "annotate", edited)).ok


class Counted(nn.Module):
    """A mean over the tokens with a label, whose count is kept from being zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, H), nn.Linear(H, V, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        each = F.cross_entropy(self.head(self.embed(ids)).flatten(0, 1), labels.flatten(), reduction="none")
        valid = (labels.flatten() != -100).float()
        return (each * valid).sum() / valid.sum().clamp(min=1.0)


def test_no_mutant_of_a_loss_whose_count_is_clamped_lives() -> None:
    batch = {"ids": IDS, "labels": IDS}
    model = foldcc.parallelize(Counted(), FoldedMesh.parse("dp=2,tp=2"), example_inputs=batch, kernels="aten")
    every = [m for m in mutants(model) if equivalent(m) is None]
    assert len(every) > 60
    for mutant in every[::6]:
        try:
            assert not foldcc.verify(mutant.apply(), rounds=1).ok, mutant
        except (RuntimeError, ValueError, IndexError):  # it does not run
            continue
