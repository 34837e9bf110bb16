"""Micro-batches add up to what one process accumulates, and with `no_sync()` their gradients are reduced once."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import foldcc
from foldcc import ops
from foldcc.runtime.accumulation import MAY_WAIT, Phases
from foldcc.testing import run_distributed
from foldcc.testing.equivalence import relative_error


class Routed(nn.Module):
    """Experts with a loss that balances them (arXiv 2101.03961), between layers of which one is called twice."""

    def __init__(self, balance: float = 0.1) -> None:
        super().__init__()
        self.first, self.norm, self.gate = nn.Linear(16, 16), nn.RMSNorm(16), nn.Linear(16, 4, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(4, 32, 16) / 4), nn.Parameter(torch.randn(4, 16, 32) / 4)
        self.balance = balance

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.first(x)).flatten(0, 1)
        each = self.gate(tokens).softmax(-1)
        weights, ids = each.topk(2)
        y = ops.experts(tokens, ids, weights, self.up, self.down, activation_fn=torch.relu).view_as(x)
        load = nn.functional.one_hot(ids, 4).to(x.dtype).mean((0, 1))
        return (self.first(x + y) - x).square().sum() + self.balance * (load * each.mean(0)).sum()


def routed(balance: float = 0.1) -> Routed:
    torch.manual_seed(0)
    return Routed(balance).double()


BATCHES = [
    torch.randn(4, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(length)) for length in (8, 8, 4)
]
BATCHES[1] = BATCHES[0].flip(0) + 1


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def accumulated(batches: list[Tensor], balance: float = 0.1) -> dict[str, Tensor]:
    """What one process has after these micro-batches."""
    model = routed(balance)
    for batch in batches:
        model(batch).backward()
    return gradients(model)


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.filterwarnings("ignore:Another program was compiled")
@pytest.mark.parametrize("balance", [0.1, 0.0])
def test_micro_batches_add_up_with_the_losses_of_routers(balance: float) -> None:
    folded = foldcc.parallelize(routed(balance), "dp=2,tp=2|ep=4", zero=1)
    for batch in BATCHES:
        with folded.no_sync():  # all ranks are here
            folded(batch).backward()
    assert_alike(gradients(folded), accumulated(BATCHES, balance))
    if not balance:  # a sum over samples, as a batch of all
        folded.zero_grad()
        folded(torch.cat(BATCHES[:2])).backward()
        assert_alike(gradients(folded), accumulated(BATCHES[:2], balance))


@pytest.mark.parametrize("zero", [0, 3])
def test_reductions_may_run_later_than_the_backward_pass_bit_for_bit(zero: int) -> None:
    folded = foldcc.parallelize(routed(), "dp=2,tp=2|ep=2", example_inputs=(BATCHES[0],), zero=zero, recompute="blocks")
    executable = folded._programs.newest.executable
    program, phases = executable.program, executable.phases
    assert {name for name, _ in phases.terms.values()} == {name for name, _ in folded.named_parameters()}
    assert not any(str(n.target).startswith("unshard") and "again" not in str(n.target) for n in phases.first.graph.nodes)
    parameters = dict(folded.named_parameters())
    outputs, saved = executable.forward(
        [BATCHES[0] if s.kind == "input" else parameters[s.names[0]].detach() for s in program.slots]
    )
    tangents = executable.enter([torch.ones_like(outputs[0])], [n.meta["layout"] for n in program.objectives])
    at_once = executable.run(program.backward, [*saved, *tangents])
    first = executable.run(phases.first, [*saved, *tangents])
    then = executable.run(phases.reduce, [list(per_rank) for per_rank in zip(*(taken for _, taken in first), strict=True)])
    for whole, (early, _), late in zip(at_once, first, then, strict=True):
        for x, y, z in zip(whole, early, late, strict=True):
            found = y if z is None else z
            assert (found is None) == (x is None) and (x is None or x.equal(found))


def test_what_is_added_to_another_gradient_is_reduced_at_once() -> None:
    """A parameter that blocks use in two layouts has two terms, and one gradient."""
    folded = foldcc.parallelize(routed(), "dp=2,tp=2|ep=2", example_inputs=(BATCHES[0],))
    main = folded.program.backward
    assert main is not None
    (output,) = main.graph.find_nodes(op="output")
    call = next(n for n in main.graph.nodes if str(n.target).startswith("unshard"))
    item = next(iter(call.users))
    with main.graph.inserting_before(output):
        output.replace_input_with(item, main.graph.call_function(torch.ops.aten.add.Tensor, (item, item)))
    assert call.name in [n.name for n in Phases.of(folded.program.backward, folded.program.slots).first.graph.nodes]


class Reductions(TorchDispatchMode):
    """Counts reductions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "reduce" in str(func)
        return func(*args, **(kwargs or {}))


def accumulated_on_a_rank(text: str, zero: int) -> dict[str, Any]:
    mesh = foldcc.FoldedMesh.parse(text, "cpu")
    dp, place = mesh.size("dp"), mesh.coordinate(dist.get_rank(), "dp")
    batches = [x.chunk(dp)[place] for x in BATCHES]
    folded = foldcc.parallelize(routed(), mesh, zero=zero)
    optimizer = torch.optim.SGD(folded.parameters())
    found: dict[str, Any] = {"reductions": []}

    def backward(i: int, *, sync: bool) -> None:
        with nullcontext() if sync else folded.no_sync():
            loss = folded(batches[i])
            with Reductions() as mode:
                loss.backward()
        found["reductions"].append(mode.count)

    backward(1, sync=True)
    optimizer.zero_grad()
    backward(0, sync=False)
    backward(1, sync=False)
    found["in between"] = gradients(folded)
    backward(2, sync=True)
    found["all"] = gradients(folded)
    assert all(p.grad.placements == p.placements for p in folded.parameters())
    optimizer.zero_grad()
    backward(0, sync=False)
    optimizer.zero_grad()  # nobody wants it
    backward(1, sync=True)  # and one that is reduced, before one that is not
    backward(2, sync=False)
    found["dropped"] = gradients(folded)
    return found


@pytest.mark.filterwarnings("ignore:Another program was compiled")
@pytest.mark.parametrize(("mesh", "zero"), [("dp=2|ep=2", 2), pytest.param("dp=2,tp=2|ep=2", 0, marks=pytest.mark.slow)])
def test_gradients_that_wait_are_reduced_once(mesh: str, zero: int) -> None:
    world = foldcc.FoldedMesh.parse(mesh).world_size
    for found in run_distributed(accumulated_on_a_rank, world, mesh, zero, timeout=400):
        at_once, first, second, last, *_ = found["reductions"]
        if MAY_WAIT:
            assert first == second < at_once == last  # a router's loss is a mean over all ranks, which is reduced every time
        assert_alike(found["in between"], accumulated(BATCHES[:2]))
        assert_alike(found["all"], accumulated(BATCHES))
        assert_alike(found["dropped"], accumulated(BATCHES[1:]))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.scale = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        y = x + self.down(torch.relu(self.up(self.norm(x))))
        return (self.norm(y) * self.scale).square().sum()


def waiting_in_16_bits(precision: foldcc.Precision | None, autocast: bool) -> list[dict[str, Tensor]]:
    """Gradients of two batches, of which the first waits, or does not."""
    mesh, found = foldcc.FoldedMesh.parse("dp=2", "cpu"), []
    batches = [x.float().chunk(2)[dist.get_rank()] for x in BATCHES[:2]]
    folded = foldcc.parallelize(Dense(), mesh, zero=3, precision=precision, verify=False)
    for waits in (True, False):
        folded.zero_grad()
        for x in batches:
            with folded.no_sync() if waits and x is batches[0] else nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = folded(x)
                loss.backward()
        found.append(gradients(folded))
    return found


@pytest.mark.parametrize("precision", [foldcc.Precision(), foldcc.Precision(reduce="bfloat16"), None])
def test_gradients_that_wait_add_up_in_the_dtype_of_their_parameters(precision: foldcc.Precision | None) -> None:
    for waited, at_once in run_distributed(waiting_in_16_bits, 2, precision, precision is None):
        assert waited.keys() == at_once.keys() == dict(Dense().named_parameters()).keys()
        for name, x in waited.items():
            narrow = precision is not None and precision.reduce == torch.bfloat16  # sums over ranks are rounded
            assert x.dtype == torch.float32 and relative_error(x, at_once[name]) < (1e-2 if narrow else 1e-6), name


def hooked(model: nn.Module, batches: list[Tensor], wait: Any) -> list[tuple[str, Tensor]]:
    """What hooks are given, of which one is removed before the last pass."""
    seen: list[tuple[str, Tensor]] = []
    model.scale.register_hook(lambda g: seen.append(("gradient", whole(g).clone())))
    added = model.scale.register_post_accumulate_grad_hook(lambda p: seen.append(("sum", whole(p.grad).clone())))
    for x in batches:
        if x is batches[-1]:
            added.remove()
        with wait():
            model(x).backward()
    return seen


def hooked_on_a_rank() -> list[tuple[str, Tensor]]:
    model = foldcc.parallelize(Dense().double(), foldcc.FoldedMesh.parse("dp=2", "cpu"), zero=3, verify=False)
    return hooked(model, [x.chunk(2)[dist.get_rank()] for x in BATCHES], model.no_sync)


def test_hooks_from_before_the_first_call_are_given_what_they_are_given_in_one_process() -> None:
    wanted = hooked(Dense().double(), BATCHES, nullcontext)
    for seen in run_distributed(hooked_on_a_rank, 2):
        assert [kind for kind, _ in seen] == [kind for kind, _ in wanted] and len(seen) == 5
        for (_, x), (_, y) in zip(seen, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


UNEVEN = [torch.randn(4, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (8, 7, 6)]


def accumulated_in_two_layouts(text: str) -> tuple[dict[str, Tensor], list[str]]:
    mesh = foldcc.FoldedMesh.parse(text, "cpu")
    place = mesh.coordinate(dist.get_rank(), "dp")
    folded, seen = foldcc.parallelize(Dense().double(), mesh), []
    for x in UNEVEN:
        with folded.no_sync() if x is not UNEVEN[-1] else nullcontext():
            folded(x.chunk(2)[place]).backward()
        seen.append(str(folded.scale.grad.placements))
    return gradients(folded), seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Another program was compiled")
def test_a_gradient_that_another_program_reduces_at_once_is_the_sum_too() -> None:
    """Seven positions do not divide over tp, and `scale` comes to the operators that read it in two layouts."""
    model = Dense().double()
    for x in UNEVEN:
        model(x).backward()
    for found, seen in run_distributed(accumulated_in_two_layouts, 4, "dp=2,tp=2", timeout=400):
        assert seen[0] != seen[1] == seen[2] or not MAY_WAIT  # terms, and what is reduced from then on
        assert_alike(found, gradients(model))
