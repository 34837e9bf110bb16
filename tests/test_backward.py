"""Backward passes are autograd's: twice where the graph is kept, for inputs, and for nothing that is frozen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import foldcc
from foldcc.testing import check_equivalence, in_float64
from foldcc.testing.equivalence import relative_error
from tests.models import tiny_model, token_batch
from tests.versions import TRACERS

MESH = "dp=2,tp=2|ep=4"
BATCH = token_batch(4)


class Stack(nn.Module):
    """Four layers on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ModuleList(nn.Linear(8, 16) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(16, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.sigmoid(up(x).relu() * 3 + 1).exp().tanh() * 2 + up(x))
        return x


def stack_input() -> Tensor:
    return torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same_gradients(model: nn.Module, plain: nn.Module, tolerance: float = 1e-10) -> None:
    for name, p in model.named_parameters():
        wanted = plain.get_parameter(name).grad
        assert (p.grad is None) == (wanted is None), name
        assert wanted is None or relative_error(p.grad, wanted, 1e-9) < tolerance, name


def twice(model: nn.Module, *, keep: bool) -> None:
    out = model(**BATCH)
    cross_entropy(out.logits[:, 1:].flatten(0, 1), BATCH["labels"][:, 1:].flatten()).backward(retain_graph=keep)
    out.loss.backward()


def test_a_graph_that_is_kept_is_gone_through_twice() -> None:
    plain = tiny_model("mixtral", num_hidden_layers=1).double()
    with in_float64():
        model = foldcc.parallelize(copy.deepcopy(plain), MESH, example_inputs=BATCH)
        plain.config._experts_implementation = "eager"
        for m in (plain, model):
            twice(m, keep=True)
    same_gradients(model, plain)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        twice(model, keep=False)


def test_hooks_see_every_saved_tensor_and_may_pack_it() -> None:
    model, x = foldcc.parallelize(Stack().double(), "dp=2,tp=2", example_inputs=(stack_input(),)), stack_input()
    model(x).square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    packed: list[Tensor] = []

    def pack(t: Tensor) -> int:
        packed.append(t.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i]):
        model(x).square().sum().backward()
    assert packed
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=0, atol=0)


def test_a_weight_that_was_changed_before_the_backward_pass_is_an_error() -> None:
    model = foldcc.parallelize(Stack().double(), "dp=1", example_inputs=(stack_input(),))
    y = model(stack_input()).sum()
    with torch.no_grad():
        model.get_parameter("up.1.weight").mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_gradients_of_gradients_are_refused_by_name() -> None:
    model, x = foldcc.parallelize(Stack().double(), "tp=2"), stack_input().requires_grad_()
    with pytest.raises(foldcc.FoldError, match="create_graph=True"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("frozen", [False, True])
def test_inputs_that_require_a_gradient_get_one(frozen: bool) -> None:
    plain = tiny_model("llama", num_hidden_layers=1).double().requires_grad_(not frozen)
    model = foldcc.parallelize(copy.deepcopy(plain), "dp=2,tp=2")
    found = []
    with in_float64():
        for m in (plain, model):
            x = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
            (2 * m(inputs_embeds=x * 3, labels=BATCH["input_ids"][:, :8]).loss).backward()
            found.append(x.grad)
        same_gradients(model, plain)
    assert relative_error(found[1], found[0]) < 1e-10
    assert foldcc.verify(model).ok


PATTERNS = ["up.3", "down.1", "nothing", "0.weight"]


def test_what_is_frozen_is_neither_differentiated_nor_reduced() -> None:
    plain, x = Stack().double(), stack_input()
    model = foldcc.parallelize(copy.deepcopy(plain), "dp=2,tp=2")
    for pattern in PATTERNS:
        for m in (plain, model):
            m.zero_grad()
            for name, p in m.named_parameters():
                p.requires_grad_(pattern in name)
            y = m(x).square().sum()
            assert y.requires_grad == (pattern != "nothing")
            if y.requires_grad:
                y.backward()
        same_gradients(model, plain)
        backward = model.program.backward
        assert (backward is None) == (pattern == "nothing")
        returned: Any = backward.graph.output_node().args[0] if backward is not None else ()
        given = {s.names[0] for s, g in zip(model.program.slots, returned, strict=False) if g is not None}
        assert given == {n for n, p in plain.named_parameters() if p.requires_grad}
        for block in backward.children() if backward is not None else ():
            assert all(g is None or g.users for g in block.graph.find_nodes(op="output")[0].args[0])


def test_frozen_layers_send_no_gradients_over_dp() -> None:
    def reduced(model: foldcc.FoldedModule) -> float:
        return sum(c.bytes for c in model.collectives() if c.direction == "backward" and "dp" in c.axes)

    plain = Stack().double()
    every = foldcc.parallelize(plain, "dp=4", example_inputs=(stack_input(),))
    plain.requires_grad_(False)
    plain.down[2].requires_grad_(True)
    one = foldcc.parallelize(plain, "dp=4", example_inputs=(stack_input(),))
    assert 4 * reduced(one) < reduced(every)
    sizes = sum(p.numel() for p in plain.down[2].parameters()) * 8
    assert reduced(one) == pytest.approx(2 * 3 / 4 * sizes)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Through(nn.Module):
    """A linear layer whose result goes through a function on its way."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.function = nn.Linear(8, 8), nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


class Two(torch.autograd.Function):
    """Two results of two operands, of which one is saved, with gradients that are not those of what it computes."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, times: float) -> tuple[Tensor, Tensor]:
        return x.round() * times, (x * y).sum(-1, keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.times = inputs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rounded: Tensor, summed: Tensor) -> tuple[Tensor, Tensor, None]:
        (y,) = ctx.saved_tensors
        return rounded.roll(1, -1) * y.sigmoid() - summed * ctx.times, summed.expand_as(y).flip(-1), None


def _two(x: Tensor) -> Tensor:
    first, second = Two.apply(x, x.sin(), 3.0)
    return first * second


@pytest.mark.parametrize("function", [Reversed.apply, _two])
def test_a_backward_pass_of_a_models_own_is_its_backward_pass(function: Any) -> None:
    plain, x = Through(function).double(), stack_input()
    check_equivalence(plain, "dp=2,tp=2", (x,))
    proof = foldcc.verify(foldcc.parallelize(plain, "dp=2", example_inputs=(x,)))
    assert proof.ok
    assert not proof.missing
    with pytest.raises(foldcc.FoldError, match="Dynamo does not keep"):
        foldcc.parallelize(plain, "dp=2", example_inputs=(x,), capture="dynamo")


@pytest.mark.parametrize("tracer", TRACERS)
def test_the_forward_pass_of_a_function_with_a_backward_pass_of_its_own_runs(tracer: str) -> None:
    plain, x = Through(_two).double(), stack_input()
    with torch.no_grad():
        torch.testing.assert_close(foldcc.parallelize(plain, "dp=2", capture=tracer)(x), plain(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_modules_have_the_gradients_of_the_modules(reentrant: bool) -> None:
    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(lambda y: y.sigmoid() * y, x, use_reentrant=reentrant)

    plain, x = Through(checkpointed).double(), stack_input()
    model = foldcc.parallelize(copy.deepcopy(plain), "dp=2,tp=2", example_inputs=(x,))
    for m in (plain, model):
        m(x).square().sum().backward()
    same_gradients(model, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_call_that_compiles_sees_what_the_call_saves_alone(reentrant: bool) -> None:
    plain, x = Stack().double(), stack_input().requires_grad_()
    model = foldcc.parallelize(copy.deepcopy(plain), "dp=2,tp=2")
    for m in (plain, model):
        checkpoint(m, x, use_reentrant=reentrant).square().sum().backward()
    same_gradients(model, plain)


class Refined(Stack):
    """The same layers several times, first without gradients."""

    def __init__(self, free: int) -> None:
        super().__init__()
        self.free = free

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i in range(3):
            with torch.set_grad_enabled(i >= self.free and torch.is_grad_enabled()):
                y = super().forward(y + x)
        return y


@pytest.mark.parametrize("free", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_layers_that_run_without_gradients_first_have_those_of_their_last_runs(free: int) -> None:
    plain, x = Refined(free).double(), stack_input().requires_grad_()
    model = foldcc.parallelize(copy.deepcopy(plain), "dp=2,tp=2", example_inputs=(x.detach(),))
    for m in (plain, model):
        m(x).square().sum().backward()
    same_gradients(model, plain)
