"""What a rank holds: read off the program, and measured on processes."""

from __future__ import annotations

import gc
import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import foldcc
from foldcc.inspect.memory import memory
from foldcc.ir.sizes import human
from foldcc.runtime.placement import cut
from foldcc.testing import run_distributed
from tests.models import FusedAttention, tiny_model, token_batch

WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
BATCH = token_batch(4)


def allocated_in_a_step(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """The most bytes that lived at once, of those that a step allocated."""
    gc.collect()  # what an earlier model held is not to be freed in between
    with warnings.catch_warnings(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        warnings.simplefilter("ignore")
        outputs = model(**batch)
        outputs.loss.backward()
    model.zero_grad()
    kineto = measured.profiler
    assert kineto is not None and kineto.kineto_results is not None
    events = sorted((e for e in kineto.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    live = most = 0
    for event in events:
        live += event.nbytes()
        most = max(most, live)
    return most


def measured(family: str, mesh: str, policies: list[tuple[int, str]]) -> None:
    folded_mesh = foldcc.FoldedMesh.parse(mesh, device_type="cpu")
    data = folded_mesh.size("dp")
    place = folded_mesh.coordinate(dist.get_rank(), "dp")
    own = {n: x.chunk(data)[place] for n, x in token_batch(2 * data, 256, vocabulary=512).items()}
    for zero, policy in policies:
        plain = tiny_model(family, **WIDE)
        model = foldcc.parallelize(plain, folded_mesh, example_inputs=own, zero=zero, recompute=policy)
        model(**own).loss.backward()
        model.zero_grad()
        # Threads of gloo let go of what was sent when they get to it.
        found, said = min(allocated_in_a_step(model, own) for _ in range(3)), model.summary().memory.step
        assert 0.9 * said < found < 1.1 * said, (zero, policy, found, said)


def test_a_step_takes_what_is_said() -> None:
    run_distributed(measured, 2, "llama", "dp=2", [(0, "none"), (3, "blocks")])


def measured_on_stages(family: str, mesh: str, cuts: list[dict[str, Any]]) -> None:
    folded_mesh = foldcc.FoldedMesh.parse(mesh, device_type="cpu")
    own = token_batch(8, 128, vocabulary=512)
    for cut_ in cuts:
        plain = tiny_model(family, **WIDE, num_hidden_layers=4)
        model = foldcc.parallelize(plain, folded_mesh, example_inputs=own, verify=False, **cut_)
        model(**own).loss.backward()
        model.zero_grad()
        found = min(allocated_in_a_step(model, own) for _ in range(3))
        said = model.summary().pipeline.places[folded_mesh.coordinate(dist.get_rank(), "pp")].memory.step
        assert 0.9 * said < found < 1.1 * said, (cut_, dist.get_rank(), found, said)


def test_a_step_on_pipeline_stages_takes_what_is_said_of_each() -> None:
    turns = {"micro_batches": 4, "schedule": "1f1b"}
    run_distributed(
        measured_on_stages,
        2,
        "llama",
        "pp=2",
        [{"micro_batches": 2}, {**turns, "stages_per_rank": 2}, {**turns, "schedule": "zero-bubble"}],
    )


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mesh"), [("llama", "dp=2,tp=2"), ("llama", "cp=2,tp=2"), ("mixtral", "dp=2,tp=2|ep=4")])
def test_a_step_takes_what_is_said_under_each_policy(family: str, mesh: str) -> None:
    policies = [(zero, policy) for zero in (0, 3) for policy in ("none", "selective", "blocks")]
    run_distributed(measured, 4, family, mesh, policies)


def test_policies_are_what_their_programs_say() -> None:
    def folded(**policies: Any) -> foldcc.FoldedModule:
        x = torch.randn(4, 8, 16)
        return foldcc.parallelize(FusedAttention(causal=True), "dp=2,tp=2", example_inputs=(x,), **policies)

    model, other = folded(), folded(zero=3, recompute="blocks").summary()
    found = model.memory()
    assert found[0, "none"] == model.summary().memory
    assert found[3, "blocks"] == other.memory != found[0, "none"]
    assert human(other.memory.peak) in str(found) and human(other.memory.kept) in str(other)
    assert [human(m.peak) in str(found) for m in found.values()] == [True] * 9
    assert dict(folded(plan=str(model.plan)).memory()) == dict(found)  # whatever a plan says of storage


def test_each_block_ahead_is_one_more_whose_parameters_are_whole() -> None:
    model, batch = tiny_model("llama", **WIDE, num_hidden_layers=4), token_batch(4, 32, vocabulary=512)
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    options = {"example_inputs": batch, "verify": False, "zero": 3}
    behind, ahead, further = (foldcc.parallelize(model, "dp=2", ahead=n, **options).summary().memory for n in range(3))
    assert further.backward - ahead.backward == layer  # what reductions read is under way in both
    assert ahead.backward - behind.backward > layer and further.forward > ahead.forward > behind.forward


def test_states_by_closed_form() -> None:
    model = foldcc.parallelize(tiny_model("mixtral"), "dp=2,tp=2|ep=4", example_inputs=BATCH, verify=False, zero=1)
    layouts = model.program.layouts()
    held = [(s.names[0], layouts[s.name]) for s in model.program.slots if s.kind == "parameter"]
    of_rank = sum(4 * cut(model.get_parameter(n).detach(), layout, model.mesh, 3).numel() for n, layout in held)
    found = model.summary().memory
    assert found.parameters == found.gradients == found.moments / 2 == of_rank
    assert found.inputs == sum(math.prod((2, *x.shape[1:])) * x.element_size() for x in BATCH.values())
    assert found.peak > found.parameters + found.moments + found.gradients


def test_evaluation_keeps_nothing() -> None:
    with torch.no_grad():
        model = foldcc.parallelize(tiny_model("llama", num_hidden_layers=1), "dp=2,tp=2", example_inputs=BATCH, verify=False)
    found = memory(model.program)
    assert found.kept == found.gradients == found.backward == 0 < found.outputs < found.forward == found.step
