"""Which outputs are given gradients is part of a program, and its backward graph is the one that runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

import foldcc
from foldcc import FoldError, ops
from foldcc.inspect.collectives import collectives
from foldcc.ir.program import Program
from foldcc.passes import Pass, Stages, run_passes
from foldcc.testing import in_float64, run_distributed
from foldcc.testing.equivalence import relative_error
from tests.models import tiny_model, token_batch

aten = torch.ops.aten
BATCH = token_batch(4)


class Returns(nn.Module):
    """A linear layer, and what is made of its result."""

    def __init__(self, what: Callable[[Tensor], Any]):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.what = nn.Linear(8, 8), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.linear(x))


def input_of(seed: int = 0) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        (lambda y: y.mean(), (True,)),
        (lambda y: (y.mean(), y), (True, False)),
        (lambda y: (y, y.sigmoid()), (True, True)),
        (lambda y: {"loss": (a := y.mean()) + 0.1 * (b := y.square().mean()), "a": a, "b": b}, (True, False, False)),
        (lambda y: (y.mean(), y.square().mean()), (True, True)),
        (lambda y: ((loss := y.mean()), loss.detach().exp(), y), (True, False, False)),
        (lambda y: (y.argmax(-1), None, y.mean(), (y > 0).sum()), (False, True, False)),
    ],
)
def test_a_program_is_for_the_gradients_of_losses_else_of_all_outputs(what: Any, wanted: tuple[bool, ...]) -> None:
    model = foldcc.parallelize(Returns(what).double(), "dp=2", example_inputs=(input_of(),))
    assert model.program.wanted == wanted


def test_gradients_of_other_outputs_are_those_of_another_program_that_is_kept_and_said() -> None:
    plain = tiny_model("mixtral", num_hidden_layers=1, aux_loss=True).double()
    objectives = (
        lambda out: out.logits.square().mean(),
        lambda out: out.logits.square().mean() + out.loss,
        lambda out: out.loss,
        lambda out: out.logits.square().mean(),
    )
    with in_float64():
        model = foldcc.parallelize(copy.deepcopy(plain), "dp=2,tp=2|ep=4", example_inputs=BATCH, verify=True)
        plain.config._experts_implementation = "eager"
        stages = model.stages
        model(**BATCH).loss.backward()
        assert model.stages is stages and ";" not in model.programs[0]
        for i, objective in enumerate(objectives):
            for m in (plain, model):
                m.zero_grad()
                loss = objective(m(**BATCH))
                if m is model and i == 0:
                    with pytest.warns(UserWarning, match="for the gradients of output 2 instead of output 0"):
                        loss.backward()
                else:
                    loss.backward()
            for name, p in model.named_parameters():
                given = plain.get_parameter(name).grad
                assert (p.grad is None) == (given is None)
                assert given is None or relative_error(p.grad, given, 1e-9) < 1e-10, name
    (told,) = model.programs
    assert told.endswith("; for the gradients of outputs 0, 2; for the gradients of output 2")
    assert model.program.wanted == (True, False, True, False) and "the gradients by outputs 0, 2" in str(model.proof)


@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=2"])
@pytest.mark.parametrize("parts", [lambda y: y.chunk(2, -1), lambda y: y.unbind(1)[:2], lambda y: y.split([3, 5], -1)])
@pytest.mark.parametrize("given", [(True, False), (False, True), (True, True)])
def test_parts_of_one_value_of_which_some_are_given_gradients(parts: Any, given: tuple[bool, bool], mesh: str) -> None:
    plain = Returns(parts).double()
    model = foldcc.parallelize(copy.deepcopy(plain), mesh, example_inputs=(input_of(),))
    for m in (plain, model):
        loss = sum((x.square().sum() for x, there in zip(m(input_of(1)), given, strict=True) if there), torch.zeros(()))
        assert isinstance(loss, Tensor)
        loss.backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad, plain.get_parameter(name).grad) < 1e-12, name


def test_sixteen_other_programs_of_a_call_are_kept() -> None:
    model = foldcc.parallelize(
        Returns(lambda y: tuple(y.unbind(1))).double(), "dp=2", example_inputs=(input_of(),), verify=False
    )
    subsets = [tuple(bool(n >> i & 1) for i in range(8)) for n in range(1, 19)]
    with pytest.warns(UserWarning, match="16 programs of one call are kept for the gradients of other outputs"):
        for subset in subsets:
            model.zero_grad()
            torch.stack([x.sum() for x, there in zip(model(input_of()), subset, strict=True) if there]).sum().backward()
            wanted = torch.tensor(subset).double()[:, None] * input_of().sum(0)
            assert relative_error(model.get_parameter("linear.weight").grad, wanted) < 1e-12
    assert model.programs[0].count(";") == 16


def test_another_output_of_a_program_that_was_not_compiled_is_gone_back_from() -> None:
    plain = Returns(lambda y: (y.square(), y.sin())).double()
    model = foldcc.parallelize(copy.deepcopy(plain), "dp=2", verify=True)
    for batch in (2, 4, 8, 16):
        x = torch.randn(batch, 8, dtype=torch.float64, requires_grad=True)
        for output in (0, 1):
            found, wanted = (torch.autograd.grad(m(x)[output].sum(), x) for m in (model, plain))
            assert relative_error(found[0], wanted[0]) < 1e-12


def test_threads_compile_one_after_another() -> None:
    plain = Returns(lambda y: (y.square(), y.sin())).double()
    model = foldcc.parallelize(copy.deepcopy(plain), "dp=2", verify=True)
    found: dict[tuple[int, int], Tensor] = {}

    def gradient(batch: int, output: int) -> None:
        x = torch.ones(batch, 8, dtype=torch.float64, requires_grad=True)
        (found[batch, output],) = torch.autograd.grad(model(x)[output].sum(), x)

    calls = [(batch, output) for batch in (2, 4) for output in (0, 1)]
    threads = [Thread(target=gradient, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, output in calls:
        x = torch.ones(batch, 8, dtype=torch.float64, requires_grad=True)
        (wanted,) = torch.autograd.grad(plain(x)[output].sum(), x)
        assert relative_error(found[batch, output], wanted) < 1e-12


def ranks_apart() -> list[str]:
    mesh, x, rank, found = foldcc.FoldedMesh.parse("dp=2", "cpu"), input_of(), dist.get_rank(), []
    model = foldcc.parallelize(Returns(lambda y: (y.mean(), y.square().mean())).double(), mesh, example_inputs=(x,))
    for apart in (True, False):
        one, other = model(x)
        try:
            (one if apart and rank else one + other).backward()
            found.append("")
        except FoldError as error:
            found.append(str(error))
    return found


def test_ranks_that_go_back_from_other_outputs_are_told_so_and_may_go_on() -> None:
    first, second = run_distributed(ranks_apart, 2)
    assert first == second and first[1] == ""
    assert "Ranks 0 and 1 are given the gradients of other outputs" in first[0]
    assert "outputs 0, 1" in first[0] and "rank 1  output 0" in first[0]


@dataclass(frozen=True, kw_only=True)
class Zeroed(Pass):
    """A user's pass: every product of the backward pass is zero."""

    def run(self, program: Program) -> Program:
        assert program.backward is not None
        for block in program.backward.children():
            assert isinstance(block, fx.GraphModule)
            for node in block.graph.find_nodes(op="call_function", target=aten.mm.default):
                with block.graph.inserting_after(node):
                    zero = block.graph.call_function(aten.mul.Scalar, (node, 0))
                zero.meta = dict(node.meta)
                node.replace_all_uses_with(zero, delete_user_cb=lambda user, zero=zero: user is not zero)
            block.recompile()
        return program


def test_a_pass_over_the_backward_graph_changes_what_runs() -> None:
    model = foldcc.parallelize(tiny_model("llama", num_hidden_layers=2), "dp=2,tp=2", example_inputs=BATCH, verify=False)
    changed = model.with_passes(Zeroed())
    for objective in (lambda out: out.loss, lambda out: out.logits.square().sum()):
        changed.zero_grad()
        objective(changed(**BATCH)).backward()
        left = {n for n, p in changed.named_parameters() if p.grad is not None and p.grad.any()}
        assert not left, left


@pytest.mark.parametrize("name", ["with_backward", "backward" + "_for"])
def test_a_pass_for_two_backward_graphs_is_told_that_there_is_one(name: str) -> None:
    model = foldcc.parallelize(nn.Linear(8, 8), "dp=2", example_inputs=(torch.ones(2, 8),), verify=False)
    with pytest.raises(AttributeError, match=f"no {name}; program.backward is the graph that runs"):
        getattr(model.program, name)


@dataclass(frozen=True, kw_only=True)
class Unreduced(Pass):
    """A user's pass: gradients are not summed over dp."""

    def run(self, program: Program) -> Program:
        assert program.backward is not None
        for block in program.backward.children():
            assert isinstance(block, fx.GraphModule)
            for node in block.graph.find_nodes(op="call_function", target=ops.all_reduce.overload):
                if node.args[1] == "dp":
                    node.replace_all_uses_with(node.args[0])
                    block.graph.erase_node(node)
            block.recompile()
        return program


def test_a_pass_that_drops_a_reduction_is_refused_where_it_does_and_the_bytes_are_gone() -> None:
    model = foldcc.parallelize(tiny_model("llama", num_hidden_layers=1), "dp=2,tp=2", example_inputs=BATCH)
    with pytest.raises(FoldError, match=r"grad_p_\w+_weight is P on dp"):
        model.with_passes(Unreduced())
    reductions = sum(c.bytes for c in model.collectives() if c.axes == ("dp",) and c.direction == "backward")
    unchecked = collectives(Stages(run_passes(model.stages[-1].program, [Unreduced()])))
    assert 0 < reductions == pytest.approx(sum(c.bytes for c in model.collectives()) - sum(c.bytes for c in unchecked))
