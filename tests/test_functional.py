"""Writing in place and operators that may be views: a captured graph has neither, and computes the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from foldcc.capture import capture
from foldcc.mesh import FoldedMesh

Forward = Callable[[Tensor], Tensor]


class Given(nn.Module):
    """A linear layer, and what is to be captured behind it."""

    def __init__(self, forward: Forward):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.rest = nn.Linear(6, 6, dtype=torch.float64), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.linear(x))


def normed(x: Tensor) -> Tensor:
    x /= x.sum(-1, keepdim=True)
    return x


def chosen(x: Tensor) -> Tensor:
    values, where = x.topk(2)
    values /= values.sum(-1, keepdim=True) + where
    return values + where


def twice(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1)
    z = y + x
    y.mul_(3)
    return y + z


def behind_a_view(x: Tensor) -> Tensor:
    y = x * 2
    column = y[:, :1]
    y.add_(1)
    return column + y


def through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:3].copy_(x[:, :2])
    return y.exp()


def one_of_two_parts(x: Tensor) -> Tensor:
    y = x * 2
    first, second = y.narrow(-1, 0, 4), y.narrow(-1, 2, 4)
    first.add_(1)
    return first + second


def through_what_may_be_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y.reshape(-1).add_(1)
    y.to(torch.float64).mul_(3)
    return y


def through_what_is_none(x: Tensor) -> Tensor:
    y = x * 2
    y.t().reshape(-1).add_(1)
    y.to(torch.float32).mul_(3)
    return y


def narrow(x: Tensor) -> Tensor:
    y = (x * 4).to(torch.int64)
    y.add_(2)
    y.bitwise_and_(3)
    return x * y


def without_gradients(x: Tensor) -> Tensor:
    y = x * 2
    with torch.no_grad():
        z = y.exp()
        z.add_(y.to(torch.float64).flatten().unflatten(0, x.shape))
    return y * z


def masked(x: Tensor) -> Tensor:
    scores = x * 1
    scores.masked_fill_(x > 0, -1.0)
    scores.clamp_(min=-0.5)
    return scores.softmax(-1)


def ambiguous(x: Tensor) -> Tensor:
    y = x.t().contiguous().flatten().unflatten(0, (6, -1)).movedim(0, 1).expand_as(x).narrow(1, 0, 6).type_as(x)
    return torch.cat([*y.tensor_split(4, -1), *y.swapaxes(0, 1).reshape(4, 6).chunk(3, -1), x.to(x.dtype), x.view_as(x)], -1)


IN_PLACE = (normed, chosen, twice, narrow, masked, without_gradients)
BY_A_SECOND_TRACE = (behind_a_view, through_a_view, one_of_two_parts, through_what_may_be_a_view)


@pytest.mark.parametrize("forward", [*IN_PLACE, *BY_A_SECOND_TRACE, through_what_is_none, ambiguous])
@pytest.mark.parametrize("tracer", ["export", "dynamo"])
def test_what_is_captured_computes_the_same_and_writes_nothing(forward: Forward, tracer: str) -> None:
    model, x = Given(forward), torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = capture(model, (), {"x": x}, FoldedMesh.parse("dp=1"), device=torch.device("cpu"), tracer=tracer).graph
    assert not [n.target for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload) and written(n)]
    weights = list(model.parameters())
    right, (found,) = model(x), graph(*weights, x)
    assert torch.equal(found, right)
    for ours, theirs in zip(torch.autograd.grad(found.sum(), weights), torch.autograd.grad(right.sum(), weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def written(node: fx.Node) -> bool:
    return bool(node.target._schema.is_mutable)  # type: ignore[union-attr]


@pytest.mark.parametrize("forward", IN_PLACE)
def test_a_write_that_nothing_else_sees_needs_no_second_trace(forward: Forward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    capture(
        Given(forward), (), {"x": torch.randn(4, 6, dtype=torch.float64)}, FoldedMesh.parse("dp=1"), device=torch.device("cpu")
    )
