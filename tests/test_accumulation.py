"""Micro-batches add up to what one process accumulates, and with `no_sync()` their gradients are reduced once."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_model, token_batch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import foldcc
from foldcc.runtime.accumulation import Phases
from foldcc.testing import in_float64, run_distributed

pytest.importorskip("transformers")

LENGTHS = (16, 16, 8)  # of micro-batches


def model_of() -> nn.Module:
    return tiny_model("mixtral", aux_loss=True, num_hidden_layers=1).double()


def micro_batches(samples: int) -> list[dict[str, Tensor]]:
    return [token_batch(samples, length, seed=i) for i, length in enumerate(LENGTHS)]


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def accumulated(leave_out: int = 0) -> dict[str, Tensor]:
    """What one process has after all micro-batches but some first ones."""
    model = model_of()
    model.config._experts_implementation = "eager"
    with in_float64():
        for batch in micro_batches(4)[leave_out:]:
            model(**batch).loss.backward()
    return gradients(model)


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.filterwarnings("ignore:Another program was compiled")
def test_micro_batches_add_up_with_the_losses_of_routers() -> None:
    model = model_of()
    with in_float64():
        folded = foldcc.parallelize(model, "dp=2,tp=2|ep=4", zero=1)
        for batch in micro_batches(4):
            with folded.no_sync():  # all ranks are here
                folded(**batch).loss.backward()
    assert_alike(gradients(folded), accumulated())


@pytest.mark.parametrize("zero", [0, 3])
def test_reductions_may_run_later_than_the_backward_pass_bit_for_bit(zero: int) -> None:
    batch = token_batch(4)
    folded = foldcc.parallelize(model_of(), "dp=2,tp=2|ep=2", example_inputs=batch, zero=zero, recompute="blocks")
    executable = folded._programs.newest.executable
    program = executable.program
    phases = Phases.of(program)
    assert {name for name, _ in phases.terms.values()} == {s.names[0] for s in program.slots if s.kind == "parameter"}
    assert all("unshard" not in str(n.target) or "again" in str(n.target) for n in phases.first.graph.nodes)
    held = dict([*folded.named_parameters(), *folded.named_buffers()])
    values = [
        batch[s.names[0][2:-2]] if s.kind == "input" else program.constants[s.name] if s.kind == "constant" else held[s.names[0]].detach()
        for s in program.slots
    ]  # fmt: skip
    outputs, saved = executable.forward(values)
    tangents = executable.enter([torch.ones_like(outputs[0])], [n.meta["layout"] for n in program.objectives])
    whole = executable.run(program.backward, [*saved, *tangents])
    first = executable.run(phases.first, [*saved, *tangents])
    taken = [list(per_rank) for per_rank in zip(*(r[1] for r in first), strict=True)]
    reduced = executable.run(phases.reduce, taken)
    for at_once, early, late in zip(whole, first, reduced, strict=True):
        for x, y, z in zip(at_once, early[0], late, strict=True):
            found = y if z is None else z
            assert (found is None) == (x is None) and (x is None or x.equal(found))


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
    batches = [{n: x.chunk(dp)[place] for n, x in batch.items()} for batch in micro_batches(2 * dp)]
    found: dict[str, Any] = {"reductions": []}
    model = model_of()
    with in_float64():
        folded = foldcc.parallelize(model, mesh, zero=zero)
        optimizer = torch.optim.SGD(folded.parameters())

        def backward(batch: dict[str, Tensor], *, sync: bool) -> None:
            with nullcontext() if sync else folded.no_sync():
                loss = folded(**batch).loss
                with Reductions() as mode:
                    loss.backward()
            found["reductions"].append(mode.count)

        backward(batches[1], sync=True)
        optimizer.zero_grad()
        for i, batch in enumerate(batches):
            backward(batch, sync=i == len(batches) - 1)
            if i == 1:
                found["in between"] = gradients(folded)
        found["all"] = gradients(folded)
        optimizer.zero_grad()
        backward(batches[0], sync=False)
        optimizer.zero_grad()  # nobody wants it
        backward(batches[1], sync=True)  # and one that is reduced, before one that is not
        backward(batches[2], sync=False)
        found["dropped"] = gradients(folded)
    return found


@pytest.mark.filterwarnings("ignore:Another program was compiled")
@pytest.mark.parametrize(
    ("mesh", "zero"), [("dp=2|ep=2", 2), pytest.param("dp=2,tp=2|ep=2", 0, marks=pytest.mark.slow)]
)
def test_gradients_that_wait_are_reduced_once(mesh: str, zero: int) -> None:
    world = foldcc.FoldedMesh.parse(mesh).world_size
    wanted = [accumulated(), accumulated(leave_out=1)]
    for found in run_distributed(accumulated_on_a_rank, world, mesh, zero, timeout=400):
        alone, first, second, third, *_ = found["reductions"]
        assert first == second < alone == third  # a router's loss is a mean over all ranks, which is reduced every time
        assert_alike(found["all"], wanted[0])
        assert_alike(found["dropped"], wanted[1])
