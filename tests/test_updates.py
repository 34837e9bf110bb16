"""State that a model updates in its forward is what it is in one process, on every rank, whatever divides the tokens."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import foldcc
from foldcc import ops
from foldcc.capture.updates import return_updates
from foldcc.errors import FoldError
from foldcc.ir.parse import parse_stage
from foldcc.layout import INVARIANT
from foldcc.passes import Pass
from foldcc.testing import check_equivalence, in_float64, program, run_distributed
from foldcc.testing.text import derived


class Experts(nn.Module):
    """Experts whose router is balanced without a loss (arXiv 2408.15664): a bias that follows the counts of its choices."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.norm = nn.Linear(16, 4, bias=False), nn.RMSNorm(16)
        self.up, self.down = nn.Parameter(torch.randn(4, 32, 16) / 4), nn.Parameter(torch.randn(4, 16, 32) / 4)
        self.register_buffer("bias", torch.zeros(4))
        self.register_buffer("counts", torch.zeros(4, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(0, 1)
        scores = self.gate(tokens).sigmoid()
        ids = (scores + self.bias).topk(2).indices
        if self.training:
            with torch.no_grad():
                chosen = nn.functional.one_hot(ids, 4).sum((0, 1))
                self.counts += chosen
                load = chosen.to(self.bias.dtype)
                self.bias.add_((load.mean() - load).sign(), alpha=0.05)
        y = ops.experts(tokens, ids, scores.gather(1, ids), self.up, self.down, activation_fn=torch.relu)
        return x + y.view_as(x)


class Codes(nn.Module):
    """The nearest of some vectors, which follow what they stand for (van den Oord et al. 2017, appendix A)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(8, 16))
        self.register_buffer("size", torch.ones(8))
        self.register_buffer("total", self.codes.clone())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        apart = self.codes.square().sum(1) - 2 * tokens @ self.codes.t()
        chosen = nn.functional.one_hot(apart.argmin(-1), 8).to(x.dtype)
        found = (chosen @ self.codes).view_as(x)
        if self.training:
            with torch.no_grad():
                self.size.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
                self.total.mul_(0.9).add_(chosen.t() @ tokens, alpha=0.1)
                self.codes.copy_(self.total / self.size.unsqueeze(1))
        return x + (found - x).detach() * 0.5


class Stateful(nn.Module):
    """Every kind of state; `mean` is set anew where others are written, read before and after, and tied to another name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.layers, self.codes = nn.BatchNorm1d(16), nn.Sequential(Experts(), Experts()), Codes()
        self.register_buffer("mean", torch.rand(16))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.codes.register_buffer("again", self.steps)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(self.norm(self.first(x).transpose(1, 2)).transpose(1, 2))
        y = y * self.mean  # which the backward pass reads
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean((0, 1))
            self.steps += 1
        y = self.codes(y) + self.mean / (1 + self.codes.again)
        return (self.last(y) - x).square().mean()


def stateful(dtype: torch.dtype = torch.float64) -> Stateful:
    torch.manual_seed(0)
    return Stateful().to(dtype)


def samples(seed: int, length: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, length, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_alike(found: nn.Module, wanted: nn.Module, within: float = 1e-10) -> None:
    for name, x in wanted.named_buffers():
        torch.testing.assert_close(found.get_buffer(name), x, rtol=within, atol=within, msg=name)
    for name, p in wanted.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(whole(found.get_parameter(name).grad), p.grad, rtol=within, atol=within, msg=name)


def accumulate(model: nn.Module) -> None:
    """A step, and one of two forward passes before a backward pass."""
    model(samples(0)).backward()
    losses = [model(samples(seed)) for seed in (1, 2)]
    for loss in losses:
        loss.backward()


def run_in_every_mode(model: nn.Module) -> None:
    """A step of other samples, an evaluation, a forward pass in training without gradients, and `accumulate`."""
    model(samples(3, 12)).backward()
    model.eval()
    with torch.no_grad():
        model(samples(4))
    model.train()
    with torch.no_grad():
        model(samples(5))
    accumulate(model)


CASES: list[Any] = [
    ("dp=2,tp=2|ep=4", run_in_every_mode, {"verify": True}),
    ("dp=2,cp=2|ep=2,etp=2", accumulate, {"recompute": "blocks"}),
    ("dp=4", accumulate, {"zero": 3, "recompute": 0.5}),
]


@pytest.mark.filterwarnings("ignore:Another program was compiled")
@pytest.mark.parametrize(("mesh", "run", "options"), CASES)
def test_state_is_updated_as_in_one_process(mesh: str, run: Any, options: dict[str, Any]) -> None:
    model = stateful()
    reference = copy.deepcopy(model)
    with in_float64():
        folded = foldcc.parallelize(model, mesh, example_inputs=(samples(0),), **options)
        run(folded)
        run(reference)
    if options.get("verify"):
        assert not folded.proof.missing  # the module's own state is compared as well
    assert reference.steps == folded.steps == (5 if run is run_in_every_mode else 3)
    for i in folded.program.updates:
        assert {*folded.program.outputs[i].meta["layout"].states.values()} == {INVARIANT}  # every rank holds all of a buffer
    assert folded.codes.again is folded.steps
    assert_alike(folded, reference)


def updated_on_a_rank(text: str) -> dict[str, Any]:
    mesh = foldcc.FoldedMesh.parse(text, "cpu")
    dp, place = mesh.size("dp"), mesh.coordinate(dist.get_rank(), "dp")
    other = Mean()
    other.mean[0] += dist.get_rank()
    with pytest.raises(FoldError, match="has another mean than rank 0"):
        foldcc.parallelize(other, mesh)(torch.zeros(2, 3, 8))
    folded = foldcc.parallelize(stateful(torch.float32), mesh, zero=2)
    for seed in (0, 1):
        folded(samples(seed, dtype=torch.float32).chunk(dp)[place]).backward()
    return {
        "buffers": dict(folded.named_buffers()),
        "gradients": {n: whole(p.grad) for n, p in folded.named_parameters()},
        "stored": {n: x for n, x in folded.state_dict().items() if not isinstance(x, DTensor)},
    }


@pytest.mark.filterwarnings("ignore:Another program was compiled")
def test_ranks_on_processes_hold_the_same_state() -> None:
    ranks, reference = run_distributed(updated_on_a_rank, 2, "dp=2|ep=2", timeout=300), stateful(torch.float32)
    for seed in (0, 1):
        reference(samples(seed, dtype=torch.float32)).backward()
    for found in ranks:
        for name, x in reference.named_buffers():
            torch.testing.assert_close(found["buffers"][name], x, rtol=1e-5, atol=1e-5, msg=name)
            assert found["buffers"][name].equal(ranks[0]["buffers"][name])
            assert found["stored"][name].equal(ranks[0]["buffers"][name])
        for name, p in reference.named_parameters():
            torch.testing.assert_close(found["gradients"][name], p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_copies_and_what_is_stored_have_the_state_that_there_is() -> None:
    with in_float64():
        folded = foldcc.parallelize(stateful(), "dp=2", example_inputs=(samples(0),), verify=False)
        folded(samples(0))
        stored = io.BytesIO()
        torch.save(folded.state_dict(), stored)
        stored.seek(0)
        loaded = foldcc.parallelize(stateful(), "dp=2", example_inputs=(samples(0),), verify=False)
        loaded.load_state_dict(torch.load(stored))
        copies = [copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), loaded]
        folded(samples(1))
        for other in copies:
            assert other.steps == 1
            other(samples(1))
            assert all(other.get_buffer(name).equal(x) for name, x in folded.named_buffers())


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.up(x))
        self.mean.copy_(y.detach().mean((0, 1)))
        return (self.down(y) - x).square().mean()


@dataclass(frozen=True, kw_only=True)
class Changed(Pass):
    """Takes sums over dp out of the forward pass, or doubles them."""

    requires = frozenset({"bucketed"})
    drop: bool

    def run(self, program: Any) -> Any:
        for block in program.graph.children():
            for node in list(block.graph.find_nodes(op="call_function", target=ops.all_reduce.overload)):
                if node.meta["val"].shape == (16,):  # of a rank's part of the mean
                    with block.graph.inserting_after(node):
                        new = block.graph.call_function(torch.ops.aten.mul.Scalar, (node.args[0] if self.drop else node, 2))
                    new.meta = dict(node.meta)
                    node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
            block.graph.eliminate_dead_code()
            block.recompile()
        return program


def test_an_update_that_is_not_reduced_is_refused_and_a_wrong_one_is_found() -> None:
    folded = foldcc.parallelize(Mean(), "dp=2,tp=2", example_inputs=(torch.randn(4, 3, 8),))
    with pytest.raises(FoldError, match="over dp is missing"):
        folded.with_passes(Changed(drop=True))
    proof = foldcc.verify(folded.with_passes(Changed(drop=False)))
    assert not proof.ok and "Buffer mean" in str(proof)


def test_equivalence_is_that_of_the_state_as_well() -> None:
    assert "buffer mean" in check_equivalence(Mean(), "dp=2,tp=2", (torch.randn(4, 3, 8),)).outputs


def test_state_that_capture_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(graph: Any, *given: Any) -> list[str]:
        names = return_updates(graph, *given)
        (output,) = graph.graph.find_nodes(op="output")
        output.args = (output.args[0][:-1],)
        return names[:-1]

    monkeypatch.setattr("foldcc.capture.export.return_updates", forgetful)
    with pytest.raises(FoldError, match="(?s)The capture is wrong: Buffer mean differs"):
        foldcc.parallelize(Mean(), "dp=2", example_inputs=(torch.randn(4, 3, 8),), verify=True)


def test_the_text_of_a_stage_says_which_outputs_are_updates() -> None:
    folded = foldcc.parallelize(Mean(), "dp=2,tp=2", example_inputs=(torch.randn(4, 3, 8),), verify=False)
    for stage in (s for s in folded.stages if "sharded" in s.program.properties):
        read = parse_stage(str(stage))
        derived(read.program)
        assert read.program.updates == {1: "b_mean"} and read.program.out_spec.num_leaves == 1
        assert str(read) == str(stage)
    with pytest.raises(FoldError, match="says that b_other is updated"):
        program("program p · stage capture · dp=2\nupdates b_other=0\nmain\n%x : f32[4x8] = input x\nreturn [%x]")
    with pytest.raises(FoldError, match="which outputs are new values"):
        program("program p · stage capture · dp=2\nupdates b\nmain\n%x : f32[4x8] = input x\nreturn [%x]")


class InPlace(Mean):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            {"x": x, "up.bias": self.up.bias}[self.what].add_(1)
        return super().forward(x)


@pytest.mark.parametrize("what", ["x", "up.bias"])
def test_only_buffers_may_be_changed(what: str) -> None:
    with pytest.raises(FoldError, match=f"changes {what}, which is no buffer") as told:
        foldcc.parallelize(InPlace(what), "dp=2", example_inputs=(torch.randn(4, 3, 8),))
    assert "register_buffer" in str(told.value)
