"""In micro-batches, on stages: buffers that a model updates, hooks on its modules, and gradients of its inputs.

They are held against the model in one process that runs one micro-batch after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_hooks import Log
from torch import Tensor, nn

import foldcc
from foldcc.errors import FoldError
from foldcc.testing import in_float64, run_distributed


class Layer(nn.Module):
    """Statistics of a batch, and a bias that follows what is chosen by it, as that of a router does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.BatchNorm1d(16), nn.Linear(16, 4, bias=False), nn.Linear(16, 16)
        self.register_buffer("bias", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scores = self.gate(y).sigmoid()
        ids = (scores + self.bias).topk(2).indices
        if self.training:
            with torch.no_grad():
                load = nn.functional.one_hot(ids, 4).sum((0, 1)).to(self.bias.dtype)
                self.bias += 0.05 * (load.mean() - load).sign()
        return x + torch.relu(self.up(y)) * scores.gather(1, ids).sum(1, keepdim=True)


class Stateful(nn.Module):
    """State of layers, and a mean that the head reads before it changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.layers = nn.Sequential(*[Layer() for _ in range(2)])
        self.register_buffer("mean", torch.rand(16))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(self.first(x)) * self.mean
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)  # the backward pass reads the one before
            self.steps += 1
        return (self.last(y) - x).square().mean()


# `layers` is on two stages
PATHS = ["first", "layers", "layers.0", "layers.1", "layers.0.gate", "layers.1.gate", "last"]


def stateful(dtype: torch.dtype) -> Stateful:
    torch.manual_seed(0)
    return Stateful().to(dtype)


def batches(dtype: torch.dtype, *sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 16, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]


def apart(model: nn.Module, ranks: int, count: int) -> Callable[[Tensor], list[Tensor]]:
    """The losses of micro-batches, one after the other, as they add up to a mean."""
    return lambda x: [model(x.unflatten(0, (ranks, count, -1))[:, i].flatten(0, 1).contiguous()) / count for i in range(count)]


def run(model: nn.Module, given: list[Tensor], losses: Callable[[Tensor], list[Tensor]], log: Log) -> dict[str, Any]:
    """Training steps, and where they are several a forward pass in training without gradients, and an evaluation."""
    found: dict[str, Any] = {"losses": [], "inputs": []}
    for x in given:
        x = x.clone().requires_grad_()
        each = losses(x)
        for loss in each:
            loss.backward()
        found["losses"].append(sum(each).detach())
        found["inputs"].append(x.grad)
    found["gradients"] = {n: p.grad for n, p in model.named_parameters()}
    found["calls"] = list(log.calls)
    if len(given) > 1:
        with torch.no_grad():
            losses(given[0])
            found["evaluated"] = sum(model.eval() and losses(given[0]))
    found["buffers"] = {n: b.clone() for n, b in model.named_buffers()}
    return found


def assert_close(found: Any, wanted: Any, within: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=within, atol=within)


def assert_as(found: dict[str, Any], wanted: dict[str, Any], within: float) -> None:
    for part in {"losses", "inputs", "evaluated"} & found.keys():
        assert_close(found[part], wanted[part], within)
    for part in ("gradients", "buffers"):
        assert_close(found[part], {name: wanted[part][name] for name in found[part]}, within)
    assert int(found["buffers"]["steps"]) == 2 * (len(found["losses"]) + ("evaluated" in found))
    assert all(x.any() for x in found["inputs"])


def called(found: dict[str, Any], *, back: bool) -> list[Any]:
    return [call for call in found["calls"] if ("gradient" in call[1]) == back]


def assert_calls(found: list[Any], wanted: list[Any], within: float) -> None:
    assert [call[:2] for call in found] == [call[:2] for call in wanted]
    assert_close([call[2] for call in found], [call[2] for call in wanted], within)


CASES = [
    ("pp=2", {"schedule": "1f1b"}, (8,)),
    pytest.param("pp=2,tp=2", {"verify": True}, (8,), marks=pytest.mark.slow),
    pytest.param("pp=2,dp=2", {"recompute": "blocks"}, (8, 16), marks=pytest.mark.slow),
    pytest.param("pp=2,dp=2", {"schedule": "1f1b", "recompute": 0.7, "zero": 3}, (8, 16), marks=pytest.mark.slow),
]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:Another program was compiled")
@pytest.mark.parametrize(("mesh", "options", "sizes"), CASES)
def test_state_hooks_and_gradients_of_inputs(mesh: str, options: dict[str, Any], sizes: tuple[int, ...]) -> None:
    plain, given = stateful(torch.float64), batches(torch.float64, *sizes)
    reference, log = copy.deepcopy(plain), Log(plain, PATHS)
    ranks = foldcc.FoldedMesh.parse(mesh).size("dp")
    with in_float64():
        model = foldcc.parallelize(
            plain,
            mesh,
            example_inputs=(given[0].clone().requires_grad_(),),
            micro_batches=2,
            **{"verify": False, **options},
        )
        found = run(model, given, lambda x: [model(x)], log)
        theirs = Log(reference, PATHS)
        wanted = run(reference, given, apart(reference, ranks, 2), theirs)
    assert_as(found, wanted, 1e-10)
    for back in (False, True):
        assert_calls(called(found, back=back), called(wanted, back=back), 1e-10)


def trained(told: str) -> dict[str, Any]:
    """On real stages, in float32; what a rank holds is stored and loaded."""
    mesh, (given,) = foldcc.FoldedMesh.parse(told, "cpu"), batches(torch.float32, 8)
    mine = given.chunk(mesh.size("dp"))[mesh.coordinate(dist.get_rank(), "dp")]
    plain = stateful(torch.float32)
    log = Log(plain, PATHS)
    model = foldcc.parallelize(
        plain,
        mesh,
        example_inputs=(mine.clone().requires_grad_(),),
        micro_batches=2,
        schedule="1f1b",
        verify=False,
    )
    found = run(model, [mine], lambda x: [model(x)], log)
    found["gradients"] = {n: g.full_tensor() for n, g in found["gradients"].items()}
    state = {n: x.clone() for n, x in model.state_dict().items()}
    for buffer in model.buffers():
        buffer.zero_()
    model.load_state_dict(state)
    assert_close(dict(model.named_buffers()), found["buffers"], 0)
    return found


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("mesh", ["pp=2", pytest.param("pp=2,dp=2", marks=pytest.mark.slow)])
def test_ranks_have_state_hooks_and_gradients_of_inputs(mesh: str) -> None:
    plain, (given,), data = stateful(torch.float32), batches(torch.float32, 8), foldcc.FoldedMesh.parse(mesh).size("dp")
    wanted = run(plain, [given], apart(plain, data, 2), Log(plain, PATHS))
    ranks = run_distributed(trained, 2 * data, mesh, timeout=300)
    for rank, found in enumerate(ranks):
        assert_as(found, {**wanted, "inputs": [wanted["inputs"][0].chunk(data)[rank % data]]}, 1e-5)
    for back in (False, True):
        left = called(wanted, back=back)
        for stage in (ranks[:data], ranks[data:]):
            told = [[call[:2] for call in called(found, back=back)] for found in stage]
            assert told[0] == told[-1] and {path for path, _ in told[0]} >= {"layers.0" if stage[0] is ranks[0] else "last"}
            for calls in zip(*(called(found, back=back) for found in stage), strict=True):
                at = next(i for i, call in enumerate(left) if call[:2] == calls[0][:2])  # each is called on one stage
                parts = zip(*(tensors for _, _, tensors in calls), strict=True)
                assert_close([torch.cat(x) if x[0].dim() else x[0] for x in parts], left.pop(at)[2], 1e-5)
        assert not left


class Shared(nn.Module):
    """A number that all layers read and the last one changes; or a mean of losses."""

    def __init__(self, of_loss: bool = False) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(16, 16), nn.Sequential(*[Layer() for _ in range(2)])
        self.of_loss = of_loss
        self.register_buffer("seen", torch.ones(()))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.first(x)
        for layer in self.layers:
            y = layer(y) if self.of_loss else layer(y) * self.seen
        loss = (y.square().mean(1) * mask).sum() / mask.sum()
        self.seen.lerp_(loss.detach() if self.of_loss else y.detach().mean(), 0.5)
        return loss


@pytest.mark.parametrize(
    ("of_loss", "mesh", "sentence"),
    [
        (False, "pp=2", "(?s)Buffer seen is updated on pipeline stage 1 and read on 0, 1.*a buffer of its own for each layer"),
        (True, "dp=1", "(?s)Buffer seen is computed of a loss, or of a term of one.*a micro-batch has its part"),
    ],
)
def test_what_micro_batches_cannot_leave_each_other_is_refused(of_loss: bool, mesh: str, sentence: str) -> None:
    given = {"x": torch.randn(8, 16), "mask": torch.ones(8, dtype=torch.int64)}
    with pytest.raises(FoldError, match=sentence):
        foldcc.parallelize(Shared(of_loss), mesh, example_inputs=given, micro_batches=2)


def test_a_loss_of_what_hooks_see_is_no_silent_zero() -> None:
    plain, (given,), seen = stateful(torch.float32), batches(torch.float32, 8), list[Tensor]()
    plain.first.register_forward_hook(lambda *given: seen.append(given[-1]))
    model = foldcc.parallelize(plain, "dp=1", example_inputs=(given,), micro_batches=2, verify=False)
    with pytest.raises(FoldError, match="(?s)what a hook on a module was given.*a model that returns it"):
        (model(given) + seen[0].mean()).backward()
