"""The type checker catches what the search and the passes could get wrong."""

from __future__ import annotations

import pytest
from torch import fx

import foldcc
from foldcc.errors import FoldError
from foldcc.ir.program import Program
from foldcc.mesh import FoldedMesh
from foldcc.ops.layout import reshard
from foldcc.passes import check_types
from tests.models import tiny_model, token_batch


@pytest.fixture(scope="module")
def stages() -> foldcc.passes.Stages:
    mesh = FoldedMesh.parse("dp=2,tp=2|ep=2,etp=2")
    return foldcc.parallelize(tiny_model("mixtral"), mesh, example_inputs=token_batch(4)).stages


def reads(program: Program, parameter: str) -> tuple[fx.Graph, fx.Node]:
    """The first block's placeholder of a parameter."""
    for block in program.blocks.values():
        for node in block.graph.find_nodes(op="placeholder"):
            if node.name.endswith(parameter):
                return block.graph, node
    raise AssertionError(parameter)


@pytest.mark.parametrize("stage", ["shard", "dispatch", "localize"])
def test_what_the_passes_write_is_well_typed(stages: foldcc.passes.Stages, stage: str) -> None:
    check_types(stages[stage].program)


@pytest.mark.parametrize("parameter", ["mlp_gate_weight", "input_layernorm_weight", "q_proj_weight"])
def test_a_weight_that_enters_without_its_reduction_is_caught(stages: foldcc.passes.Stages, parameter: str) -> None:
    program = stages["shard"].program.copied()
    _, weight = reads(program, parameter)
    (step,) = (u for u in weight.users if u.target is reshard)
    step.replace_all_uses_with(weight)
    with pytest.raises(FoldError, match="given its operands"):
        check_types(program)


def test_an_expert_weight_that_enters_without_its_reduction_is_caught(stages: foldcc.passes.Stages) -> None:
    mesh = FoldedMesh.parse("dp=4|ep=2")
    program = foldcc.parallelize(tiny_model("gpt_oss"), mesh, example_inputs=token_batch(8)).stages["dispatch"].program
    program = program.copied()
    _, bias = reads(program, "down_proj_bias")
    (step,) = (u for u in bias.users if u.target is reshard)
    step.replace_all_uses_with(bias)
    with pytest.raises(FoldError, match="index_select"):
        check_types(program)


def test_a_partial_value_in_a_non_linear_operator_is_caught(stages: foldcc.passes.Stages) -> None:
    program = stages["shard"].program.copied()
    for _, node in program.nodes():
        source = node.args[0] if node.target is reshard else None
        if isinstance(source, fx.Node) and "P" in map(str, source.meta["layout"].states.values()):
            node.replace_all_uses_with(source)
    with pytest.raises(FoldError, match="given its operands"):
        check_types(program)


def test_a_collective_on_the_wrong_type_is_caught(stages: foldcc.passes.Stages) -> None:
    program = stages["localize"].program.copied()
    for _, node in program.nodes():
        if "reduce_scatter.default" in str(node.target):
            node.target = foldcc.ops.all_reduce.overload
            node.args = (node.args[0], "tp", "I")
    with pytest.raises(FoldError, match="all_reduce"):
        check_types(program)
