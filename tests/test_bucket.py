"""Gradients that are reduced together are the gradients that are reduced one by one."""

from __future__ import annotations

import pytest
import torch
from models import tiny_model, token_batch

import foldcc
from foldcc import ops
from foldcc.ir.program import Program
from foldcc.passes.bucket import Bucket

MESH = "dp=2,tp=2|ep=2"


@pytest.fixture(scope="module")
def folded() -> foldcc.FoldedModule:
    mesh = foldcc.FoldedMesh.parse(MESH)
    return foldcc.parallelize(tiny_model("mixtral", num_hidden_layers=1), mesh, example_inputs=token_batch(4))


def reductions(program: Program) -> list[torch.fx.Node]:
    assert program.backward is not None
    blocks = [getattr(program.backward, str(n.target)) for n in program.backward.graph.nodes if n.op == "call_module"]
    return [n for b in blocks for n in b.graph.find_nodes(op="call_function", target=ops.all_reduce.overload)]


def elements(program: Program) -> int:
    return sum(n.args[0].meta["val"].numel() for n in reductions(program))


def test_fewer_reductions_carry_the_same_elements(folded: foldcc.FoldedModule):
    before, after = folded.stages["lower"].program, folded.stages["bucket"].program
    assert len(reductions(after)) < len(reductions(before)) / 2
    assert elements(after) == elements(before)


def test_a_gradient_larger_than_the_limit_goes_alone(folded: foldcc.FoldedModule):
    lowered = folded.stages["lower"].program
    assert len(reductions(Bucket(small=0).run(lowered.copied()))) == len(reductions(lowered))


def test_joining_changes_no_gradient(folded: foldcc.FoldedModule, monkeypatch: pytest.MonkeyPatch):
    from foldcc import api

    monkeypatch.setattr(api, "PIPELINE", tuple(p for p in api.PIPELINE if not isinstance(p, Bucket)))
    batch = token_batch(4)
    alone = foldcc.parallelize(tiny_model("mixtral", num_hidden_layers=1), foldcc.FoldedMesh.parse(MESH), example_inputs=batch)
    for model in (folded, alone):
        model(**batch).loss.backward()
    for (name, found), wanted in zip(folded.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad), name


def test_a_negative_limit_is_an_error():
    with pytest.raises(foldcc.FoldError, match="small=-1"):
        Bucket(small=-1)
