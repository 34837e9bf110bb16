"""A pass that rewrites an operator as what it is raises no alarm, and data in unmodified models is no obstacle to a proof."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import foldcc
from foldcc.ir.program import Program
from foldcc.mesh import FoldedMesh
from foldcc.testing import in_float64
from tests.test_verify import broken_at
from tests.versions import since

aten = torch.ops.aten
V, S, H = 16, 6, 8
IDS = torch.arange(4 * S).reshape(4, S) % V
LABELS = torch.where(IDS % 5 == 0, -100, IDS.roll(-1, 1))
Emit = Callable[..., fx.Node]


class Of(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Tensor]):
        super().__init__()
        self.a, self.b, self.fn = nn.Linear(H, H), nn.Linear(H, H), fn

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.fn(self.a(x))).square().mean()


def folded(model: nn.Module, mesh: str, **batch: Tensor) -> foldcc.FoldedModule:
    with in_float64():
        return foldcc.parallelize(model.double(), FoldedMesh.parse(mesh), example_inputs=batch, kernels="aten")


def rewritten(model: foldcc.FoldedModule, target: Any, build: Callable[[Emit, fx.Node], fx.Node]) -> foldcc.FoldedModule:
    """The model with the first call of an operator written otherwise, and all passes after it run again."""

    def edit(program: Program) -> None:
        for block in program.blocks.values():
            for node in block.graph.find_nodes(op="call_function", target=target):

                def emit(op: Any, *args: Any, node: fx.Node = node, block: fx.GraphModule = block) -> fx.Node:
                    with block.graph.inserting_before(node):
                        new = block.graph.call_function(op, args)
                    values = fx.map_arg(args, lambda n: n.meta["val"])
                    with next(x.fake_mode for x in pytree.tree_leaves(values) if isinstance(x, Tensor)):
                        new.meta = {**node.meta, "val": op(*values)}
                    return new

                node.replace_all_uses_with(build(emit, node))
                block.graph.eliminate_dead_code()
                block.recompile()
                return
        raise AssertionError(f"no {target}")

    return broken_at(model, "outline", edit, name="rewrite")


def shifted_softmax(emit: Emit, node: fx.Node) -> fx.Node:
    x = node.args[0]
    powers = emit(aten.exp.default, emit(aten.sub.Tensor, x, emit(aten.amax.default, x, [-1], True)))
    return emit(aten.div.Tensor, powers, emit(aten.sum.dim_IntList, powers, [-1], True))


def plain_softmax(emit: Emit, node: fx.Node) -> fx.Node:
    powers = emit(aten.exp.default, node.args[0])
    return emit(aten.div.Tensor, powers, emit(aten.sum.dim_IntList, powers, [-1], True))


def by_maximum(emit: Emit, node: fx.Node) -> fx.Node:
    return emit(aten.maximum.default, node.args[0], emit(aten.zeros_like.default, node.args[0]))


def by_erf(emit: Emit, node: fx.Node) -> fx.Node:
    x = node.args[0]
    inner = emit(aten.add.Tensor, emit(aten.erf.default, emit(aten.mul.Tensor, x, 0.5**0.5)), 1)
    return emit(aten.mul.Tensor, emit(aten.mul.Tensor, x, 0.5), inner)


def root(x: Tensor) -> Tensor:
    return torch.sqrt(x * x + 1) ** 2


REWRITES = [
    (lambda x: x.softmax(-1), aten.softmax.int, shifted_softmax),
    (lambda x: x.softmax(-1), aten.softmax.int, plain_softmax),
    (F.relu, aten.relu.default, by_maximum),
    (F.gelu, aten.gelu.default, by_erf),
    (root, aten.pow.Tensor_Scalar, lambda emit, n: n.args[0].args[0]),
    (lambda x: x + x, aten.add.Tensor, lambda emit, n: emit(aten.mul.Tensor, n.args[0], 2)),
    (
        lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
        aten.rsqrt.default,
        lambda emit, n: emit(aten.reciprocal.default, emit(aten.sqrt.default, n.args[0])),
    ),
    (lambda x: x * torch.clamp(torch.full((H,), 3.0), min=1.0), aten.clamp.default, lambda emit, n: n.args[0]),
]


def times(emit: Emit, x: Any, y: Any) -> fx.Node:
    return emit(aten.mul.Tensor, x, y)


def logistic(emit: Emit, node: fx.Node) -> fx.Node:
    return emit(aten.reciprocal.default, emit(aten.add.Tensor, emit(aten.exp.default, emit(aten.neg.default, node.args[0])), 1))


def by_tanh(emit: Emit, node: fx.Node) -> fx.Node:
    x = node.args[0]
    inner = emit(aten.add.Tensor, x, times(emit, emit(aten.pow.Tensor_Scalar, x, 3), 0.044715))
    return times(emit, x, emit(aten.sigmoid.default, times(emit, inner, 2 * math.sqrt(2 / math.pi))))


def halves(emit: Emit, node: fx.Node) -> fx.Node:
    """Both branches, each times a mask."""
    mask, x, y = node.args
    return emit(aten.add.Tensor, times(emit, x, mask), times(emit, y, emit(aten.bitwise_not.default, mask)))


def both_bounds(emit: Emit, node: fx.Node) -> fx.Node:
    low, high = (emit(aten.full_like.default, node.args[0], x) for x in (-0.5, 0.5))
    return emit(aten.minimum.default, emit(aten.maximum.default, node.args[0], low), high)


def centred(emit: Emit, node: fx.Node) -> fx.Node:
    x = emit(aten.sub.Tensor, node.args[0], emit(aten.mean.dim, node.args[0], [-1], True))
    spread = emit(aten.mean.dim, emit(aten.square.default, x), [-1], True)
    return times(emit, x, emit(aten.rsqrt.default, emit(aten.add.Tensor, spread, 1e-5)))


def by_squares(emit: Emit, node: fx.Node) -> fx.Node:
    return emit(aten.sqrt.default, emit(aten.sum.dim_IntList, emit(aten.square.default, node.args[0]), [-1], True))


def spread(emit: Emit, node: fx.Node) -> fx.Node:
    """The mean of squares less the square of the mean."""
    x = node.args[0]
    squares = emit(aten.mean.dim, emit(aten.square.default, x), [-1], True)
    return emit(aten.sub.Tensor, squares, emit(aten.square.default, emit(aten.mean.dim, x, [-1], True)))


def branch(below: Callable[[Emit, Any], fx.Node]) -> Callable[[Emit, fx.Node], fx.Node]:
    def build(emit: Emit, node: fx.Node) -> fx.Node:
        return emit(aten.where.self, emit(aten.gt.Scalar, node.args[0], 0), node.args[0], below(emit, node.args[0]))

    return build


def mirrored(target: Any) -> Callable[[Emit, fx.Node], fx.Node]:
    return lambda emit, n: emit(aten.neg.default, emit(target, emit(aten.neg.default, n.args[0])))


def bound_to_zero(emit: Emit, x: Any) -> fx.Node:
    return emit(aten.relu.default, x)


def above(x: Tensor) -> Tensor:
    return x * x + 1


REWRITES += [
    (F.silu, aten.silu.default, lambda emit, n: times(emit, n.args[0], emit(aten.sigmoid.default, n.args[0]))),
    (F.silu, aten.silu.default, lambda emit, n: times(emit, n.args[0], logistic(emit, n))),
    (torch.sigmoid, aten.sigmoid.default, logistic),
    (
        torch.tanh,
        aten.tanh.default,
        lambda emit, n: emit(aten.sub.Tensor, times(emit, emit(aten.sigmoid.default, times(emit, n.args[0], 2)), 2), 1),
    ),
    (lambda x: F.gelu(x, approximate="tanh"), aten.gelu.default, by_tanh),
    (
        lambda x: x.log_softmax(-1),
        aten.log_softmax.int,
        lambda emit, n: emit(aten.sub.Tensor, n.args[0], emit(aten.logsumexp.default, n.args[0], [-1], True)),
    ),
    (
        lambda x: x.softmax(-1),
        aten.softmax.int,
        lambda emit, n: emit(aten.exp.default, emit(aten.log_softmax.int, n.args[0], -1)),
    ),
    (
        lambda x: x - x.mean(-1, True),
        aten.mean.dim,
        lambda emit, n: emit(aten.div.Tensor, emit(aten.sum.dim_IntList, n.args[0], [-1], True), H),
    ),
    (lambda x: torch.rsqrt(above(x)), aten.rsqrt.default, lambda emit, n: emit(aten.pow.Tensor_Scalar, n.args[0], -0.5)),
    (lambda x: x**2, aten.pow.Tensor_Scalar, lambda emit, n: times(emit, n.args[0], n.args[0])),
    (
        lambda x: x,
        aten.linear.default,
        lambda emit, n: emit(aten.add.Tensor, emit(aten.matmul.default, n.args[0], emit(aten.t.default, n.args[1])), n.args[2]),
    ),
    (lambda x: torch.where(x > 0.5, x, x * 3), aten.where.self, halves),
    (lambda x: x.clamp(-0.5, 0.5), aten.clamp.default, both_bounds),
    (
        lambda x: x.masked_fill(x < 0, 2.0),
        aten.masked_fill.Scalar,
        lambda emit, n: emit(aten.where.self, n.args[1], emit(aten.full_like.default, n.args[0], 2.0), n.args[0]),
    ),
    (
        lambda x: x.abs(),
        aten.abs.default,
        lambda emit, n: emit(
            aten.add.Tensor, *(bound_to_zero(emit, x) for x in (n.args[0], emit(aten.neg.default, n.args[0])))
        ),
    ),
    (lambda x: F.leaky_relu(x, 0.1), aten.leaky_relu.default, branch(lambda emit, x: times(emit, x, 0.1))),
    (F.elu, aten.elu.default, branch(lambda emit, x: emit(aten.expm1.default, x))),
    (lambda x: x / (x.var(-1, unbiased=False, keepdim=True) + 1), aten.var.dim, spread),
    (lambda x: x / (x.norm(dim=-1, keepdim=True) + 1), aten.linalg_vector_norm.default, by_squares),
    (lambda x: x * x.floor(), aten.floor.default, mirrored(aten.ceil.default)),
    (lambda x: x * x.round(), aten.round.default, mirrored(aten.round.default)),
    (
        lambda x: torch.hypot(x, x.roll(1, -1)),
        aten.hypot.default,
        lambda emit, n: emit(aten.sqrt.default, emit(aten.add.Tensor, *(emit(aten.square.default, x) for x in n.args))),
    ),
    (
        lambda x: x * x[..., :2].prod(-1, True),
        aten.prod.dim_int,
        lambda emit, n: times(emit, *(emit(aten.slice.Tensor, n.args[0], -1, i, i + 1) for i in range(2))),
    ),
    (
        lambda x: x * x.amax(-1, True),
        aten.amax.default,
        lambda emit, n: emit(aten.neg.default, emit(aten.amin.default, emit(aten.neg.default, n.args[0]), [-1], True)),
    ),
    (lambda x: F.layer_norm(x, (H,)), aten.layer_norm.default, centred),
]


@pytest.mark.parametrize(("fn", "target", "build"), REWRITES, ids=lambda x: getattr(x, "__name__", ""))
def test_an_operator_written_otherwise_raises_no_alarm(fn: Any, target: Any, build: Any) -> None:
    model = rewritten(folded(Of(fn), "dp=2", x=torch.randn(4, S, H, dtype=torch.float64)), target, build)
    foldcc.verify(model, rounds=1).raise_if_failed()


@pytest.mark.parametrize(
    "fn",
    [
        F.mish,
        F.logsigmoid,
        torch.asinh,
        lambda x: torch.atan2(x, x.roll(1, -1)),
        lambda x: F.prelu(x, x.new_full((1,), 0.25)),
        lambda x: F.glu(x).repeat(1, 1, 2),
        lambda x: x * torch.std_mean(x, -1, keepdim=True)[1],
        pytest.param(lambda x: x * x.aminmax(dim=-1, keepdim=True).max, marks=since((2, 12), "has no derivative of aminmax")),
        lambda x: F.conv1d(x, torch.ones(S, S, 3, dtype=x.dtype), padding=1),
    ],
    ids=lambda x: x.__name__,
)
def test_a_function_in_an_unmodified_model_is_proved(fn: Any) -> None:
    foldcc.verify(folded(Of(fn), "dp=2", x=torch.randn(4, S, H, dtype=torch.float64)), rounds=1).raise_if_failed()


class Language(nn.Module):
    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], attend: Callable[..., Tensor] | None = None):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, H), nn.Linear(H, V, bias=False)
        self.loss, self.attend = loss, attend

    def forward(self, ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        x = x if self.attend is None else x + self.attend(x, mask)
        return self.loss(self.head(x).flatten(0, 1), labels.flatten())


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    weights = torch.where(labels == 3, 0.3, 1.7)
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()


def scaled(logits: Tensor, labels: Tensor) -> Tensor:
    return (F.cross_entropy(logits, labels, reduction="none") * ((labels != -100) * 0.3)).sum()


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """As BERT adds it; a row that is masked as a whole has the mean of all values."""
    least = (1.0 - mask[:, None].float()) * torch.finfo(torch.float32).min
    return (x @ x.transpose(1, 2) + least).softmax(-1) @ x


@pytest.mark.parametrize("loss", [weighted, scaled])
def test_a_loss_that_weighs_labels_is_proved(loss: Any) -> None:
    foldcc.verify(folded(Language(loss), "dp=2,tp=2", ids=IDS, labels=LABELS)).raise_if_failed()


def test_an_additive_mask_of_the_least_number_is_proved() -> None:
    mask = torch.ones(4, S, dtype=torch.long)
    model = folded(Language(F.cross_entropy, masked), "dp=2,tp=2", ids=IDS, labels=LABELS, mask=mask)
    for seed in range(3):
        foldcc.verify(model, rounds=1, seed=seed).raise_if_failed()
