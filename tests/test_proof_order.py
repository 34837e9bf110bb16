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
from foldcc.ir.program import Program
from foldcc.mesh import FoldedMesh
from foldcc.testing import in_float64
from foldcc.testing.mutate import equivalent, mutants
from foldcc.verification.field import Field
from foldcc.verification.mode import FieldMode
from tests.test_proof_alarms import rewritten
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


# --- programs in which one operator is another ---


def instead(target: Any, *args: Any) -> Callable[[Any, fx.Node], fx.Node]:
    """Calls another operator on an operator's first operand and these."""
    return lambda emit, n: emit(target, n.args[0], *args)


def first(emit: Any, n: fx.Node) -> fx.Node:
    return n.args[0]


def later(emit: Any, n: fx.Node) -> fx.Node:
    """Of two branches, the second one always."""
    return n.args[2]


def at_id(which: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, ids, **buffers: torch.where(which(ids, **buffers)[..., None], x * 2, x)


def times(factor: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, ids, **more: x * factor(ids, **more)[..., None]


def segments(x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return attending(x, mask[:, :, None] == mask[:, None, :])


def of_any_segment(emit: Any, n: fx.Node) -> fx.Node:
    return emit(aten.eq.Tensor, *(emit(aten.clamp.default, x, 0, 1) for x in n.args))


def nucleus(x: Tensor, ids: Tensor) -> Tensor:
    likely = x.softmax(-1).sort(-1, descending=True).values
    return likely * (likely.cumsum(-1) < 0.9)


def faked(x: Tensor, ids: Tensor) -> Tensor:
    return (torch.clamp(torch.round(x / 0.1) + 8, 0, 15) - 8) * 0.1


def straight_through(x: Tensor, ids: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


def later_positions(ids: Tensor, mask: Tensor) -> Tensor:
    return mask.sum(1, keepdim=True) - 1


LARGE = {"vocab": 20_000}
MASK = {"mask": torch.ones(4, S, dtype=torch.long)}
FLOAT_MASK = {"mask": torch.ones(4, S, dtype=torch.double)}
BOUNDARIES = {"at": torch.tensor([-1.0, 0.25, 2.0], dtype=torch.double)}
TOKENS = {"at": torch.tensor([5, 100, 19_000]), **LARGE}
OTHERWISE = {
    "a threshold": (lambda x, ids: torch.where(x > 0.5, x, x * 2), aten.gt.Scalar, instead(aten.gt.Scalar, 0.51), {}, {}),
    "a tiny threshold": (lambda x, ids: torch.where(x.abs() < 1e-8, 0 * x, x), aten.where.self, later, {}, {}),
    "the end of half precision": (lambda x, ids: x.clamp(-65504.0, 65504.0), aten.clamp.default, first, {}, {}),
    "the bound of a norm": (lambda x, ids: F.normalize(x, dim=-1), aten.clamp_min.default, first, {}, {}),
    "rounding": (quantised, aten.round.default, instead(aten.floor.default), {}, {}),
    "rounding of data": (
        lambda x, ids: x * torch.floor((torch.arange(S) - 3.0) / 2)[:, None],
        aten.floor.default,
        instead(aten.trunc.default),
        {},
        {},
    ),
    "quantisation": (faked, aten.clamp.default, instead(aten.clamp.default, 0, 16), {}, {}),
    "rounding without a gradient": (straight_through, aten.round.default, first, {}, {}),
    "a cast": (lambda x, ids: x.int().to(x.dtype) * x, aten._to_copy.default, first, {}, {}),
    "an order": (lambda x, ids: x.sort(-1).values, aten.sort.default, instead(aten.sort.default, -1, True), {}, {}),
    "a choice": (lambda x, ids: x * x.argmax(-1, True), aten.argmax.default, instead(aten.argmin.default, -1, True), {}, {}),
    "how many are chosen": (
        lambda x, ids: torch.where(x >= x.topk(3, -1).values[..., -1:], x, x * 2),
        aten.topk.default,
        instead(aten.topk.default, 4, -1),
        {},
        {},
    ),
    "a likely part": (nucleus, aten.lt.Scalar, instead(aten.lt.Scalar, 0.8), {}, {}),
    "one side of a band": (lambda x, ids: torch.where((x > 0.1) & (x < 1.0), x, -x), aten.bitwise_and.Tensor, first, {}, {}),
    "boundaries": (
        lambda x, ids, at: x * torch.bucketize(x, at),
        aten.bucketize.Tensor,
        lambda emit, n: emit(aten.bucketize.Tensor, n.args[0], emit(aten.slice.Tensor, n.args[1], 0, 1)),
        BOUNDARIES,
        {},
    ),
    "the middle one": (
        lambda x, ids: x * x.median(-1, True).values,
        aten.median.dim,
        instead(aten.kthvalue.default, 5, -1, True),
        {},
        {},
    ),
    "an offset of ids": (at_id(lambda ids: ids - 100 == 7), aten.where.self, later, LARGE, {}),
    "a residue of ids": (at_id(lambda ids: ids % 1000 == 3), aten.where.self, later, LARGE, {}),
    "a quotient of ids": (
        times(lambda ids: ids // 1000),
        aten.floor_divide.default,
        instead(aten.floor_divide.default, 1001),
        LARGE,
        {},
    ),
    "ids as numbers": (at_id(lambda ids: ids.float() > 19_990.5), aten.where.self, later, LARGE, {}),
    "one of two tokens": (at_id(lambda ids: (ids == 5) | (ids == 19_000)), aten.bitwise_or.Tensor, first, LARGE, {}),
    "tokens of a buffer": (at_id(lambda ids, at: (ids[..., None] == at).any(-1)), aten.where.self, later, TOKENS, {}),
    "tokens of a set": (at_id(lambda ids, at: torch.isin(ids, at)), aten.where.self, later, TOKENS, {}),
    "buckets of ids": (
        times(lambda ids, at: torch.searchsorted(at, ids)),
        aten.searchsorted.Tensor,
        lambda emit, n: emit(aten.searchsorted.Tensor, n.args[0], emit(aten.add.Tensor, n.args[1], 1)),
        TOKENS,
        {},
    ),
    "the place of a token": (times(lambda ids: (ids == 31).int().argmax(-1, True)), aten.eq.Scalar, first, {}, {}),
    "segments": (segments, aten.eq.Tensor, of_any_segment, {}, MASK),
    "any number in a mask": (times(lambda ids, mask: mask > 0), aten.gt.Scalar, instead(aten.eq.Scalar, 1), {}, MASK),
    "a mask of real numbers": (times(lambda ids, mask: mask == 0), aten.eq.Scalar, instead(aten.lt.Scalar, 0), {}, FLOAT_MASK),
    "the last position": (
        times(later_positions),
        aten.sum.dim_IntList,
        lambda emit, n: emit(aten.sum.dim_IntList, emit(aten.ones_like.default, n.args[0]), [1], True),
        {},
        MASK,
    ),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_decides_otherwise_is_told_apart(case: str) -> None:
    middle, target, build, options, more = OTHERWISE[case]
    model = folded(middle, more, **options)
    assert foldcc.verify(model, rounds=1).ok
    assert not foldcc.verify(rewritten(model, target, build)).ok


def test_rows_that_are_not_there_are_not_named() -> None:
    """As positions that begin at 2 behind the padding, and an offset by which a row is looked up."""
    table, mask = {"table": torch.randn(S + 3, H, dtype=torch.double)}, {"mask": torch.ones(4, S, dtype=torch.long)}
    positions = lambda x, ids, mask, table: x * F.embedding(mask.cumsum(1) * mask + 1, table)  # noqa: E731
    foldcc.verify(folded(positions, mask, **table), rounds=1).raise_if_failed()
    foldcc.verify(folded(lambda x, ids, mask, table: x * table[mask // 3 - 1], mask, **table), rounds=1).raise_if_failed()


def test_how_a_branch_is_reached_does_not_hide_that_it_is_one() -> None:
    """`isfinite` compares and takes absolute values, of which some go either way."""
    proof = foldcc.verify(folded(lambda x, ids: torch.where(x.isfinite(), x, 2 * x)), rounds=1)
    assert any("isfinite" in x for x in proof.undecided)


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
