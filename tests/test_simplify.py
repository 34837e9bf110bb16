"""The simplified backward pass computes the gradients that the lowered one computes."""

from __future__ import annotations

import pytest
import torch
from models import tiny_model, token_batch
from torch import Tensor

import foldcc
from foldcc.ir.program import Program
from foldcc.runtime.executable import Executable
from foldcc.testing.equivalence import relative_error

aten = torch.ops.aten
BATCH = token_batch(4)


@pytest.fixture(scope="module")
def folded() -> foldcc.FoldedModule:
    mesh = foldcc.FoldedMesh.parse("dp=2,tp=2|ep=2")
    return foldcc.parallelize(tiny_model("mixtral", num_hidden_layers=1), mesh, example_inputs=BATCH)


def gradients(folded: foldcc.FoldedModule, program: Program) -> dict[str, Tensor]:
    held = {**dict(folded.named_parameters()), **dict(folded.named_buffers())}
    inputs = iter(BATCH.values())
    values = [next(inputs) if s.kind == "input" else held[s.names[0]] for s in program.slots]
    folded.zero_grad()
    executable = Executable(program)
    outputs = executable(values, lambda given: executable)
    next(x for x in outputs if x.dim() == 0).backward()
    return {name: p.grad.clone() for name, p in folded.named_parameters() if p.grad is not None}


def targets(program: Program) -> list[object]:
    assert program.backward is not None
    blocks = [block for block in program.backward.children() if isinstance(block, torch.fx.GraphModule)]
    return [n.target for block in blocks for n in block.graph.nodes]


def test_gradients_stay_what_they_were(folded: foldcc.FoldedModule):
    lowered, simplified = (gradients(folded, folded.stages[name].program) for name in ("lower", "simplify"))
    assert lowered.keys() == simplified.keys()
    for name, gradient in lowered.items():
        assert relative_error(simplified[name], gradient) < 1e-6, name


def test_what_tracing_took_apart_is_one_operator_again(folded: foldcc.FoldedModule):
    before, after = (targets(folded.stages[name].program) for name in ("lower", "simplify"))
    assert aten.silu_backward.default not in before and aten.sigmoid.default in before
    assert aten.silu_backward.default in after and aten.sigmoid.default not in after
    assert len(after) < len(before)
