"""What `shard` finds: nobody names a factor, and the layouts are the ones that people write by hand."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest

import foldcc
from foldcc.ir.program import Program
from foldcc.layout import Shard
from foldcc.mesh import FoldedMesh
from tests.models import tiny_model, token_batch


@cache
def sharded(family: str, mesh: str, **changes: Any) -> Program:
    model = tiny_model(family, **changes)
    parsed = FoldedMesh.parse(mesh)
    inputs = token_batch(2 * parsed.size("dp"))
    return foldcc.parallelize(model, parsed, example_inputs=inputs).stages["shard"].program


def divided(program: Program, ending: str, axis: str) -> list[int | None]:
    """For each parameter whose name ends so, the dimension that an axis divides."""
    found = []
    for node in program.placeholders:
        slot = program.slot(node.name)
        if slot.kind == "parameter" and any(name.endswith(ending) for name in slot.names):
            state = node.meta["layout"].states[axis]
            found.append(state.dim if isinstance(state, Shard) else None)
    assert found, f"no parameter ends with {ending}"
    return found


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=2", "dp=3,tp=2"])
def test_a_dense_block_is_column_then_row_parallel(mesh: str) -> None:
    program = sharded("llama", mesh)
    for ending in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight"):
        assert set(divided(program, ending, "tp")) == {0}
    for ending in ("o_proj.weight", "down_proj.weight"):
        assert set(divided(program, ending, "tp")) == {1}
    assert set(divided(program, "norm.weight", "tp")) == {None}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("mixtral", {}),
        ("llama", {"tie_word_embeddings": True}),
        pytest.param("mixtral", {"tie_word_embeddings": True}, marks=pytest.mark.slow),
    ],
)
def test_embedding_head_and_loss_are_vocabulary_parallel(family: str, options: dict[str, bool]) -> None:
    program = sharded(family, "dp=2,tp=2|ep=4", **options)
    assert divided(program, "embed_tokens.weight", "tp") == [0]
    assert divided(program, "lm_head.weight", "tp") == [0]
    assert len({s.names for s in program.slots}) == len(program.slots)
    (loss,) = (n for _, n in program.nodes() if "token_loss" in str(n.target))
    assert isinstance(loss.args[0].meta["layout"].states["tp"], Shard)


@pytest.mark.parametrize("family", ["llama", "mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow), "deepseek_v3"])
def test_between_blocks_the_sequence_is_divided(family: str) -> None:
    program = sharded(family, "dp=2,tp=2|ep=4")
    streams = 0
    for call in program.calls:
        for user in call.users:
            layout = user.meta["layout"]
            if user.meta["grad"] and [len(dim) for dim in layout.dims] == [1, 1, 1] and layout.dims[2][0].name == "hidden":
                assert str(layout.dims[0][0]) == "batch" and layout.states["dp"] == Shard(0, 0, 1)
                assert layout.states["tp"] == Shard(1, 0, 1)
                streams += 1
    assert streams >= 2


def test_a_router_is_replicated_and_runs_on_its_own_tokens() -> None:
    program = sharded("mixtral", "dp=2,tp=2|ep=4")
    assert set(divided(program, "mlp.gate.weight", "tp")) == {None}
    (router,) = (n for _, n in program.nodes() if "softmax" in str(n.target))
    assert isinstance(router.meta["layout"].states["tp"], Shard)


def test_the_layout_does_not_depend_on_the_shape() -> None:
    model = tiny_model("mixtral")
    mesh = FoldedMesh.parse("dp=2,tp=2|ep=4")
    layouts = []
    for batch, length in ((2, 64), (32, 8)):
        folded = foldcc.parallelize(model, mesh, example_inputs=token_batch(batch, length))
        program = folded.stages["dispatch"].program
        layouts.append({n.name: n.meta["layout"].states for n in program.placeholders})
    assert layouts[0] == layouts[1]


def test_no_value_holds_the_samples_of_another_data_parallel_rank_and_nothing_grows_with_dp() -> None:
    sent = {}
    for dp in (2, 8):
        mesh = FoldedMesh.parse(f"dp={dp},tp=2|ep=4")
        # A vocabulary that is dear to reduce, beside a few samples that would be cheap to gather.
        model = tiny_model("qwen3_moe", num_hidden_layers=1, vocab_size=512)
        folded = foldcc.parallelize(model, mesh, example_inputs=token_batch(2 * dp))
        for _, node in folded.stages["shard"].program.nodes():
            layout = node.meta.get("layout")
            for d, dim in enumerate(layout.dims if layout else ()):
                if any(f.name == "batch" for f in dim):
                    state = layout.states["dp"]
                    assert isinstance(state, Shard) and state.dim == d, f"{node.name} : {layout}"
        over_tp = sum(c.bytes for c in folded.collectives() if c.axes == ("tp",))
        over_dp = 0.0  # what is reduced, without the (n - 1) / n of a ring of n ranks
        for c in folded.collectives():
            if "dp" in c.axes:
                ranks = math.prod(mesh.size(axis) for axis in c.axes)
                over_dp += c.bytes * ranks / (ranks - 1)
        sent[dp] = (over_tp, over_dp)
    assert sent[2] == pytest.approx(sent[8]) and min(sent[2]) > 0
