"""Folded is parallel, not replicated: the work and the weights of a rank are its share of the model's."""

from __future__ import annotations

import math

import pytest

import foldcc
from foldcc.mesh import FoldedMesh
from tests.models import FAMILIES, LAYER_KINDS, crossed, tiny_model, token_batch

MESHES = ("dp=2,tp=2|ep=4", "dp=2,tp=4|ep=4,etp=2", "dp=3,tp=2|ep=2")
LATENT = ("q_a_proj.weight", "kv_a_proj_with_mqa.weight")  # narrow enough that replicating them can be cheaper


def shares(name: str, shape: tuple[int, ...], mesh: FoldedMesh) -> set[int]:
    """Over how many ranks a parameter may be divided."""
    tp = mesh.size("tp")
    if ".experts." in name:
        return {mesh.size("ep")} if name.endswith("down_proj_bias") else {mesh.size("ep") * mesh.size("etp")}
    if name.endswith(("gate.weight", "router.weight", "shared_expert_gate.weight")):
        return {1}
    if len(shape) == 1 or name.endswith(LATENT):
        return {1, tp}
    return {tp}


@pytest.mark.parametrize(("family", "mesh"), crossed(FAMILIES, MESHES))
def test_every_rank_has_its_share(family: str, mesh: str) -> None:
    parsed = FoldedMesh.parse(mesh)
    model = tiny_model(family, num_hidden_layers=LAYER_KINDS[family])
    folded = foldcc.parallelize(model, parsed, example_inputs=token_batch(2 * parsed.size("dp")))
    summary = folded.summary()
    assert summary.flops_ratio <= 1.05, summary
    held = 0
    parameters = dict(folded.named_parameters(remove_duplicate=False))
    for slot, node in zip(folded.program.slots, folded.program.placeholders, strict=True):
        if slot.kind == "parameter":
            shape = tuple(parameters[slot.names[0]].shape)
            local = math.prod(node.meta["layout"].shape)
            assert math.prod(shape) / local in shares(slot.names[0], shape, parsed), f"{slot.names[0]} {node.meta['layout']}"
            held += local
    assert summary.parameters_per_rank == held
    assert summary.parameters_total == sum(p.numel() for p in folded.parameters())
