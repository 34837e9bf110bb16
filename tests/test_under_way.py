"""What is gathered and reduced on processes is under way while blocks compute, and gradients are the same, bit for bit."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx

import foldcc
from foldcc import FoldError
from foldcc.ir.walk import follow
from foldcc.runtime.under_way import Runner
from foldcc.testing import program, run_distributed
from tests.models import tiny_model, token_batch

LAYERS = 2


def logged(events: list[str], name: str, started: Any) -> Any:
    """A collective that notes when it starts and when it is waited for."""

    class Noted:
        def __init__(self, work: Any):
            self.work = work

        def wait(self) -> None:
            events.append(f"{name} ends")
            self.work.wait()

    def start(*args: Any, **kwargs: Any) -> Any:
        if "async_op" not in kwargs:  # ranks agree on the call
            return started(*args, **kwargs)
        events.append(f"{name} starts")
        return Noted(started(*args, **kwargs))

    return start


def gradients_and_events(zero: int, ahead: int, waits: bool) -> tuple[dict[str, Tensor], list[str]]:
    mesh = foldcc.FoldedMesh.parse("dp=2", device_type="cpu")
    own = {name: x.chunk(2)[dist.get_rank()] for name, x in token_batch(4).items()}
    model = tiny_model("llama", num_hidden_layers=LAYERS)
    folded = foldcc.parallelize(model, mesh, example_inputs=own, zero=zero, ahead=ahead, verify=False)
    if waits:
        with folded.no_sync():
            folded(**own).loss.backward()
    events: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_into_tensor", logged(events, "gather", dist.all_gather_into_tensor))
        patch.setattr(dist, "reduce_scatter_tensor", logged(events, "scatter", dist.reduce_scatter_tensor))
        folded(**own).loss.backward()
    return {n: p.grad.full_tensor() for n, p in folded.named_parameters()}, events


def under_way(events: list[str], name: str) -> list[int]:
    """How many collectives of this name are under way, behind each event."""
    return list(accumulate(1 if e == f"{name} starts" else -1 for e in events if e.startswith(name)))


@pytest.mark.slow
def on_processes() -> None:
    for zero, waits in ((3, False), (1, True)):
        ahead, events = gradients_and_events(zero, 1, waits)
        behind, in_turns = gradients_and_events(zero, 0, waits)
        further = gradients_and_events(zero, 2, waits)[0] if zero == 3 else ahead
        for name, gradient in behind.items():
            assert gradient.equal(ahead[name]) and gradient.equal(further[name]), name
        for name in ("gather", "scatter"):
            counts, each = under_way(events, name), under_way(in_turns, name)
            assert each == [1, 0] * (len(counts) // 2) and len(counts) > 2 * LAYERS
            passes = 2 if (zero, name) == (3, "gather") else 1
            assert max(counts) == 2 and counts.count(0) == passes, (zero, name, counts)


def test_one_block_is_gathered_and_one_is_reduced_while_another_computes() -> None:
    run_distributed(on_processes, 2)


def test_what_a_block_is_given_is_freed_behind_it() -> None:
    given = program(
        """
        unshard0 forward
          %w : f32[4] = argument
          %v : f32[4] = aten.neg(%w)
          return [[%v], [%w]]
        block0 forward
          %v : f32[4] = argument
          %y : f32[4] = aten.exp(%v)
          return [%y]
        main forward
          %w : f32[4] = parameter w
          %u = unshard0(%w)
          %some = getitem(%u, 0)
          %saved = getitem(%u, 1)
          %v : f32[4] = getitem(%some, 0)
          %c = block0(%v)
          %y : f32[4] = getitem(%c, 0)
          return [[%y], [%saved]]
        """,
        stage="bucket",
    )
    run, held = Runner(given.graph, ahead=True), []

    def watched(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.target == "block0":
            held.append(weakref.ref(values[node.all_input_nodes[0]].now()))
        assert node.op != "output" or held[0]() is None
        return run(node, values)

    (y,), ((w,),) = follow(given.graph, [torch.ones(4)], watched)
    assert y.equal(torch.full((4,), -1.0).exp()) and w.equal(torch.ones(4))


@pytest.mark.parametrize("ahead", [-1, 1.0, True])
def test_a_number_of_blocks_that_there_is_not(ahead: Any) -> None:
    with pytest.raises(FoldError, match=f"ahead={ahead} is no number of blocks"):
        foldcc.parallelize(tiny_model("llama"), "dp=2", example_inputs=token_batch(4), ahead=ahead)
