"""A gradient that several calls have terms of is reduced once, and is what it is in one process."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import foldcc
from foldcc import FoldError, ops
from foldcc.ir.program import Program
from foldcc.testing import run_distributed
from foldcc.testing.equivalence import relative_error
from foldcc.testing.mutate.mutant import rewrite
from foldcc.types.check import check_types
from tests.models import tiny_model, token_batch

X = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Shared(nn.Module):
    """A layer that is called three times, and a weight that is also read elsewhere."""

    def __init__(self, calls: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.calls = calls
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            h = self.norm(x)
            x = x + self.down(torch.nn.functional.gelu(self.up(h)) * torch.sigmoid(self.up(h)))
            x = torch.tanh(x) + 0.1 * torch.sin(x) - 0.2 * torch.cos(x)  # long enough to be a block of its own
        return (x @ self.up.weight.T + self.norm.weight.sum()).square().mean()


def elements_reduced(program: Program) -> int:
    """The elements of all that is reduced over ranks in the backward pass."""
    assert program.backward is not None
    found = 0
    for call in program.backward.graph.nodes:
        if call.op == "call_module":
            block = program.backward.get_submodule(str(call.target))
            nodes = block.graph.find_nodes(op="call_function", target=ops.all_reduce.overload)
            found += sum(n.meta["val"].numel() for n in nodes if set(n.args[1].split(",")) & {"dp"})
    return found


@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "dp=4", "tp=2"])
def test_a_layer_that_is_called_several_times_reduces_once(mesh: str) -> None:
    plain = Shared().double()
    model = foldcc.parallelize(copy.deepcopy(plain), mesh, example_inputs=(X,), verify=True)
    held = sum(math.prod(n.meta["layout"].shape) for n in model.program.placeholders if "p_" in n.name)
    assert elements_reduced(model.program) == (held if "dp" in mesh else 0)
    for m in (plain, model):
        for _ in range(2):  # and gradients accumulate
            m(X).backward()
    for name, p in plain.named_parameters():
        assert relative_error(model.get_parameter(name).grad, p.grad) < 1e-10, name


def test_a_tied_head_is_reduced_once_in_the_reduced_proof_too() -> None:
    model = foldcc.parallelize(
        tiny_model("llama", num_hidden_layers=3, tie_word_embeddings=True), "dp=2,tp=2", example_inputs=token_batch(4)
    )
    assert foldcc.verify(model, reduced=True).ok
    held = sum(math.prod(n.meta["layout"].shape) for n in model.program.placeholders if "p_" in n.name)
    assert elements_reduced(model.program) == held


def test_a_sum_that_is_not_reduced_is_refused_by_types_and_one_that_is_doubled_by_the_proof() -> None:
    model = foldcc.parallelize(Shared(), "dp=2", example_inputs=(X.float(),))

    def unreduced(program: Program) -> None:
        graph = program.backward.unshard0.graph  # type: ignore[union-attr]
        first = next(iter(graph.find_nodes(op="call_function", target=ops.all_reduce.overload)))
        first.replace_all_uses_with(first.args[0])

    def doubled(program: Program) -> None:
        main = program.backward.graph  # type: ignore[union-attr]
        add = next(iter(main.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)))
        add.args = (add.args[0], add.args[0])

    with pytest.raises(FoldError, match="grad_p_.* on dp"):
        check_types(rewrite(model, after="split", edit=unreduced).stages["split"].program)
    assert foldcc.verify(model, rounds=1, reduced=True).ok
    assert not foldcc.verify(rewrite(model, after="split", edit=doubled), rounds=1).ok
    assert not foldcc.verify(rewrite(model, after="split", edit=doubled), rounds=1, reduced=True).ok


@pytest.mark.parametrize("kernels", [pytest.param("aten", marks=pytest.mark.slow), "triton"])
def test_gradients_of_other_outputs_of_a_tied_model(kernels: str) -> None:
    plain = tiny_model("llama", num_hidden_layers=2, tie_word_embeddings=True)
    model = foldcc.parallelize(copy.deepcopy(plain), "dp=2,tp=2", example_inputs=token_batch(4), kernels=kernels)
    for m in (plain, model):
        m(**token_batch(4)).loss.backward()
        m(**token_batch(4)).logits.square().mean().backward()
    for name, p in plain.named_parameters():
        assert relative_error(model.get_parameter(name).grad, p.grad) < 1e-5, name


def on_processes(wanted: dict[str, Tensor]) -> None:
    mesh = foldcc.FoldedMesh.parse("dp=2,tp=2", device_type="cpu")
    model = foldcc.parallelize(Shared().double(), mesh, example_inputs=(X[:2],))
    model(X.chunk(2)[mesh.coordinate(dist.get_rank(), "dp")]).backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad.full_tensor(), wanted[name]) < 1e-10, name


def test_on_processes() -> None:
    plain = Shared().double()
    plain(X).backward()
    run_distributed(on_processes, 4, {name: p.grad for name, p in plain.named_parameters()})
