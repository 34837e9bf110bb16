"""cumsum along a divided sequence: ranks add what the ranks before them hold, on virtual ranks and on processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

import foldcc
from foldcc import ops
from foldcc.ops.groups import active, create_groups
from foldcc.runtime.simulate import simulate
from foldcc.testing import check_equivalence, run_distributed

PARTS = [torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]


class Layer(nn.Module):
    """What is summed up comes divided along the sequence out of the products before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return y + y.cumsum(1).sin()


def scanning() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer())


@pytest.mark.parametrize(("mesh", "length"), [("dp=2,tp=2", 8), ("tp=4", 4)])
def test_a_sum_along_a_divided_sequence_is_that_of_one_process(mesh: str, length: int) -> None:
    x = torch.randn(4, length, 8)
    folded = foldcc.parallelize(scanning(), mesh, example_inputs=(x,), verify=False)
    assert any(c.operator == "from_ranks_before" for c in folded.collectives())
    assert foldcc.verify(folded, rounds=1).ok
    check_equivalence(scanning(), mesh, args=(x,))


def before(parts: list[Tensor], places: int) -> list[Tensor]:
    return [sum(parts[:i], torch.zeros_like(parts[0])).expand(2, places, 3) for i in range(len(parts))]


def on_processes(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    mesh = foldcc.FoldedMesh.parse("tp=2")
    create_groups(mesh, ["tp"])
    x = parts[dist.get_rank()].clone().requires_grad_()
    with active(mesh):
        y = ops.from_ranks_before(x, 1, "tp", 4)
        y.backward(torch.full_like(y, dist.get_rank() + 1.0))
    assert x.grad is not None
    return y.detach(), x.grad


def test_processes_add_what_ranks_before_hold_and_gradients_come_from_those_behind() -> None:
    found = run_distributed(on_processes, 2, PARTS[:2])
    for (y, grad), wanted, behind in zip(found, before(PARTS[:2], 4), (8.0, 0.0), strict=True):
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(grad, torch.full_like(grad, behind))


def test_virtual_ranks_do_what_processes_do_and_the_two_are_transposed() -> None:
    mesh, tangents = foldcc.FoldedMesh.parse("tp=3"), [torch.randn(2, 4, 3, dtype=torch.float64) for _ in range(3)]

    def run(operator: ops.Operator, given: list[Tensor], *rest: object) -> list[Tensor]:
        graph = fx.Graph()
        x = graph.placeholder("x")
        y = graph.call_function(operator.overload, (x, 1, "tp", *rest))
        x.meta["val"] = y.meta["val"] = FakeTensorMode().from_tensor(given[0])
        graph.output((y,))
        return [found for (found,) in simulate(mesh, fx.GraphModule({}, graph), [given])]

    forward, back = run(ops.from_ranks_before, PARTS, 4), run(ops.of_ranks_behind, tangents)
    for found, wanted in zip(forward, before(PARTS, 4), strict=True):
        torch.testing.assert_close(found, wanted)
    products = [sum((a * b).sum() for a, b in zip(*pair, strict=True)) for pair in ((forward, tangents), (PARTS, back))]
    torch.testing.assert_close(*products)
