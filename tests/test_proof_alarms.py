"""A pass that rewrites an operator as what it is raises no alarm, and data in unmodified models is no obstacle to a proof."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import foldcc
from foldcc.mesh import FoldedMesh
from foldcc.program import Program
from foldcc.testing import in_float64
from tests.test_verify import broken_at

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


@pytest.mark.parametrize(("fn", "target", "build"), REWRITES, ids=lambda x: getattr(x, "__name__", ""))
def test_an_operator_written_otherwise_raises_no_alarm(fn: Any, target: Any, build: Any) -> None:
    model = rewritten(folded(Of(fn), "dp=2", x=torch.randn(4, S, H, dtype=torch.float64)), target, build)
    foldcc.verify(model, rounds=1).raise_if_failed()


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
