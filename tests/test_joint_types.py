"""Types of the forward and backward graphs: no false alarm on any family, and every planted mistake is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import foldcc
from foldcc import ops
from foldcc.errors import FoldError
from foldcc.ir.program import Program
from foldcc.mesh import FoldedMesh
from foldcc.passes import Stages, check_types
from foldcc.rules.joint import UNIT
from foldcc.rules.notation import Rule
from foldcc.types.atoms import atoms_of
from foldcc.types.axis import MIXED, SAME, TERM, UNKNOWN, ZERO, Illegal, Type, read_across, through
from tests.models import FAMILIES, WITH_AUX_LOSS, crossed, tiny_model, token_batch

JOINT = ("split", "lower", "simplify", "bucket")
MESHES = (
    "dp=2,tp=4|ep=4,etp=2",
    "dp=3,tp=2|ep=2",
    "tp=2|ep=2",
    "dp=2,tp=2|ep=4",
    "tp=4|ep=2,etp=2",
    "dp=4,tp=2|ep=8",
    "dp=8|ep=4",
)


def folded(family: str, mesh: str, **changes: Any) -> Stages:
    parsed = FoldedMesh.parse(mesh)
    batch = token_batch(2 * parsed.size("dp"))
    return foldcc.parallelize(tiny_model(family, **changes), parsed, example_inputs=batch).stages


@pytest.fixture(scope="module")
def mixtral() -> Stages:
    return folded("mixtral", "dp=2,tp=2|ep=2", num_key_value_heads=4)  # two heads on a rank


@pytest.fixture(scope="module")
def across() -> Stages:
    """Axes of the two views overlap: dp = edp x ep."""
    return folded("mixtral", "dp=4|ep=2")


# --- no false alarm ------------------------------------------------------------------------------


@pytest.mark.slow  # each compilation checks this, whatever a test compiles
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_differentiation_writes_is_well_typed(family: str, mesh: str) -> None:
    stages = folded(family, mesh, aux_loss=family in WITH_AUX_LOSS)
    for stage in JOINT:
        check_types(stages[stage].program)


def test_axes_without_common_cuts_raise_no_alarm() -> None:
    stages = folded("mixtral", "dp=3,tp=2|ep=3", num_local_experts=6)
    check_types(stages["bucket"].program)


class Between(nn.Module):
    """Two projections with something between them that a model may have."""

    def __init__(self, between: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), between

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.second(self.between(self.first(x)))).mean()


@pytest.mark.filterwarnings("ignore:.*no factor rule")
@pytest.mark.parametrize(("between", "mesh"), crossed([  # on meshes with two samples on a rank, and with one
    lambda y: y, lambda y: y.softmax(1), lambda y: functional.layer_norm(y, (8,)), lambda y: y.cumsum(1).flip(1),
    lambda y: y - y.mean(0, keepdim=True), lambda y: y * y.mean(), lambda y: y.amax(1, keepdim=True) * y,
    lambda y: y.sort(-1)[0], lambda y: torch.bmm(y, torch.bmm(y.transpose(1, 2), y)), lambda y: y[:, :1].expand(-1, 6, -1) * y,
    lambda y: functional.conv1d(y.transpose(1, 2), torch.ones(8, 8, 3), padding=1).transpose(1, 2),
    lambda y: functional.pad(y.topk(2)[0], (0, 6)), lambda y: y.repeat(1, 1, 2)[..., 4:12], lambda y: y.detach() * y.sum(),
    lambda y: functional.scaled_dot_product_attention(y, y, y, is_causal=True), lambda y: torch.where(y > 0, y, 0.0),
], ("dp=2,tp=2", "dp=4")))  # fmt: skip
def test_what_a_model_may_do_raises_no_alarm(between: Callable[[Tensor], Tensor], mesh: str) -> None:
    foldcc.parallelize(Between(between), FoldedMesh.parse(mesh), example_inputs=(torch.randn(4, 6, 8),))


# --- planted mistakes ----------------------------------------------------------------------------


def blocks(program: Program) -> Iterator[fx.GraphModule]:
    for main in (program.graph, program.backward):
        assert main is not None
        yield from main.children()  # type: ignore[misc]


def gradient(program: Program, parameter: str) -> tuple[fx.Node, fx.Node]:
    """The gradient that the first block that reduces it returns, and the term of the sum that its reduction reads."""
    assert program.backward is not None
    for block in [b for name, b in program.backward.named_children() if name.startswith("unshard")]:
        (output,) = block.graph.find_nodes(op="output")
        for leaf, (name, _) in zip(output.args[0], output.meta["returns"], strict=True):
            if name.endswith(parameter):
                return leaf, term(leaf)
    raise AssertionError(parameter)


def term(leaf: fx.Node) -> fx.Node:
    if leaf.target is ops.all_reduce.overload:
        return leaf.args[0]
    part = leaf.args[0]  # of a bucket
    joined = part.args[0].args[0].args[0]
    return joined.args[0][part.args[1]].args[0]


def find(program: Program, target: ops.Operator, **arguments: Any) -> fx.Node:
    """The first collective with these arguments."""
    for block in blocks(program):
        for node in block.graph.find_nodes(op="call_function", target=target.overload):
            if arguments.items() <= target.arguments(node.args, node.kwargs).items():
                return node
    raise AssertionError(f"{target.name} {arguments}")


REDUCED = ("input_layernorm_weight", "mlp_gate_weight", "q_proj_weight", "mlp_experts_gate_up_proj", "lm_head_weight")


@pytest.mark.parametrize("stage", ["split", "lower", "bucket"])
@pytest.mark.parametrize("parameter", REDUCED)
def test_a_gradient_without_its_reduction_is_caught(mixtral: Stages, stage: str, parameter: str) -> None:
    program = mixtral[stage].program.copied()
    leaf, unreduced = gradient(program, parameter)
    leaf.replace_all_uses_with(unreduced)
    with pytest.raises(FoldError, match=f"grad_.*{parameter} is (P|V.P) on (dp|edp), .* needs I: its sum over"):
        check_types(program)


@pytest.mark.parametrize("stage", ["split", "lower"])
@pytest.mark.parametrize("parameter", REDUCED)
def test_a_gradient_that_is_reduced_twice_is_caught(mixtral: Stages, stage: str, parameter: str) -> None:
    program = mixtral[stage].program.copied()
    leaf, _ = gradient(program, parameter)
    with leaf.graph.inserting_after(leaf):
        again = leaf.graph.node_copy(leaf)
    leaf.replace_all_uses_with(again)
    again.args = (leaf, *leaf.args[1:])
    with pytest.raises(FoldError, match="all_reduce.* needs P on e?dp, and its operand is R"):
        check_types(program)


def test_a_bucket_that_is_reduced_twice_is_caught(mixtral: Stages) -> None:
    program = mixtral["bucket"].program.copied()
    leaf, _ = gradient(program, "input_layernorm_weight")
    reduced = leaf.args[0].args[0].args[0]
    with leaf.graph.inserting_after(reduced):
        again = leaf.graph.node_copy(reduced)
    reduced.replace_all_uses_with(again)
    again.args = (reduced, *reduced.args[1:])
    with pytest.raises(FoldError, match="needs P on dp, and its operand is R"):
        check_types(program)


@pytest.mark.parametrize("stage", ["split", "lower"])
@pytest.mark.parametrize(("parameter", "axes", "said"), [
    ("mlp_gate_weight", "dp", "is P on tp, .* its sum over tp is missing"),
    ("mlp_gate_weight", "tp", "is P on dp, .* its sum over dp is missing"),
    ("q_proj_weight", "tp", "needs P on tp, and its operand is V"),
    ("q_proj_weight", "dp,tp", "needs P on tp, and its operand is V"),
])  # fmt: skip
def test_a_reduction_over_the_wrong_axes_is_caught(mixtral: Stages, stage: str, parameter: str, axes: str, said: str) -> None:
    program = mixtral[stage].program.copied()
    leaf, _ = gradient(program, parameter)
    leaf.args = (leaf.args[0], axes, "I")
    with pytest.raises(FoldError, match=said):
        check_types(program)


@pytest.mark.parametrize("stage", ["split", "lower"])
@pytest.mark.parametrize("axis", ["dp", "ep"])
def test_experts_reduced_over_the_dense_group_are_caught(across: Stages, stage: str, axis: str) -> None:
    program = across[stage].program.copied()
    leaf, _ = gradient(program, "mlp_experts_down_proj")
    assert leaf.args[1] == "edp"
    leaf.args = (leaf.args[0], axis, "I")
    with pytest.raises(FoldError, match="R where each|the same, where each needs its own part|needs P on (dp|ep)"):
        check_types(program)


@pytest.mark.parametrize("stage", ["split", "lower", "bucket"])
def test_a_reduce_scatter_that_only_cuts_is_caught(mixtral: Stages, stage: str) -> None:
    program = mixtral[stage].program.copied()
    node = find(program, ops.reduce_scatter, axes="tp")
    node.target, node.args = ops.shard.overload, (*node.args, "I")
    with pytest.raises(FoldError, match="shard.* needs I on tp, and its operand is"):
        check_types(program)


@pytest.mark.parametrize("stage", ["split", "lower", "bucket"])
def test_a_gather_that_only_pads_is_caught(mixtral: Stages, stage: str) -> None:
    program = mixtral[stage].program.copied()
    node = find(program, ops.all_gather, axes="tp", dst="R")
    node.target, node.args = ops.pad.overload, node.args[:4]
    with pytest.raises(FoldError, match="P on tp|terms of a sum"):
        check_types(program)


def test_a_gather_along_another_dimension_is_caught(mixtral: Stages) -> None:
    program = mixtral["lower"].program.copied()
    node = find(program, ops.all_gather, axes="tp", dim=1)
    node.args = (node.args[0], 2, *node.args[2:])
    with pytest.raises(FoldError, match="all_gather.* has not the sizes of dimension 2 over tp"):
        check_types(program)


@pytest.mark.parametrize("stage", ["split", "lower"])
def test_a_partial_value_in_a_function_that_is_not_linear_is_caught(mixtral: Stages, stage: str) -> None:
    program = mixtral[stage].program.copied()
    node = find(program, ops.all_reduce, axes="tp", dst="I")  # the sum of exponentials, over a divided vocabulary
    node.replace_all_uses_with(node.args[0])
    with pytest.raises(FoldError, match=r"aten.log\(.* is not linear in terms of a sum over tp"):
        check_types(program)


def test_a_bias_that_every_rank_adds_is_caught() -> None:
    program = folded("gpt_oss", "dp=2,tp=2")["lower"].program.copied()
    node = find(program, ops.once, axes="tp")
    node.replace_all_uses_with(node.args[0])
    with pytest.raises(FoldError, match="is R on tp, .* needs P: every rank of tp has the whole"):
        check_types(program)


def test_a_call_that_passes_another_value_is_caught(mixtral: Stages) -> None:
    program = mixtral["lower"].program.copied()
    call = next(c for c in program.calls if any("experts_gate_up" in str(a) for a in c.args))
    norm = next(a for a in call.args if "layernorm" in str(a))
    experts = next(a for a in call.args if "experts_gate_up" in str(a))
    call.replace_input_with(experts, norm)
    with pytest.raises(FoldError, match="passes p_model_layers_0_.*layernorm_weight for p_.*experts_gate_up_proj, of another"):
        check_types(program)


def test_gradients_returned_for_each_other_are_caught(mixtral: Stages) -> None:
    program = mixtral["lower"].program.copied()
    assert program.backward is not None
    (output,) = program.backward.graph.find_nodes(op="output")
    names = [n.name for n in program.placeholders]
    one, other = (next(i for i, n in enumerate(names) if n.endswith(p)) for p in ("mlp_gate_weight", "gate_up_proj"))
    leaves = list(output.args[0])
    leaves[one], leaves[other] = leaves[other], leaves[one]
    output.args = (tuple(leaves),)
    with pytest.raises(FoldError, match="grad_p_model_layers_0_mlp_gate_weight is V on"):
        check_types(program)


def test_an_error_names_operator_operands_module_and_line(mixtral: Stages) -> None:
    program = mixtral["lower"].program.copied()
    leaf, _ = gradient(program, "mlp_gate_weight")
    leaf.args = (leaf.args[0], "dp", "I")
    with pytest.raises(FoldError) as raised:
        check_types(program)
    facts = raised.value.facts
    assert "model.layers.0.mlp.gate (modeling_mixtral.py:" in facts["at"]
    assert facts["operator"].startswith(f"{leaf.name} = foldcc.all_reduce({leaf.args[0].name}, dp, I) : [8, 32]")
    assert facts["operands"] == f"{leaf.args[0].name} [8, 32] P(dp,tp)"
    assert facts["block"].endswith("backward")


# --- the algebra ---------------------------------------------------------------------------------

V0, V1 = Type("V", frozenset({0})), Type("V", frozenset({1}))
LETTERS = (("a",), ("b",))
RULES = {
    "mm": Rule(((("m",), ("k",)), (("k",), ("n",))), ((("m",), ("n",)),), {}, linear=(frozenset({0}), frozenset({1}))),
    "mul": Rule((LETTERS, LETTERS), (LETTERS,), {}, linear=(frozenset({0}), frozenset({1}))),
    "add": Rule((LETTERS, LETTERS), (LETTERS,), {}, linear=(frozenset({0, 1}),)),
    "sum": Rule((LETTERS,), ((("b",),),), {}, linear=(frozenset({0}),)),
    "exp": Rule((LETTERS,), (LETTERS,), {}),
    "softmax": Rule((LETTERS,), (LETTERS,), {}, whole=frozenset({"b"})),
    "t": Rule((LETTERS,), (LETTERS[::-1],), {}, linear=(frozenset({0}),)),
}


def result(name: str, *types: Type) -> Type:
    (found,) = through(RULES[name], dict(enumerate(types)), frozenset(), 1)
    return found


@pytest.mark.parametrize(("name", "types", "expected"), [
    ("mm", (V1, V0), TERM),              # the contracted dimension is divided
    ("mm", (V0, SAME), V0),              # rows are
    ("mm", (SAME, V1), V1),              # columns are
    ("mm", (TERM, SAME), TERM),
    ("mm", (UNKNOWN, V0), TERM),
    ("mm", (V0, Type(ZERO)), Type(ZERO)),
    ("mul", (TERM, SAME), TERM),
    ("mul", (V0, SAME), V0),
    ("mul", (UNKNOWN, SAME), UNKNOWN),
    ("add", (TERM, TERM), TERM),
    ("add", (TERM, UNKNOWN), TERM),
    ("add", (TERM, Type(ZERO)), TERM),
    ("add", (V0, SAME), V0),
    ("sum", (V0,), TERM),
    ("sum", (V1,), V0),
    ("sum", (Type("V", frozenset({0, 1})),), UNKNOWN),
    ("exp", (V1,), V1),
    ("exp", (Type(ZERO),), Type("R", frozenset({0, 1}))),  # as much of it on each rank, wherever it is divided
    ("add", (SAME, Type(ZERO)), SAME),
    ("softmax", (V0,), V0),
    ("softmax", (V1,), UNKNOWN),
    ("t", (V0,), V1),
    ("exp", (Type(MIXED),), Type(MIXED)),
])  # fmt: skip
def test_an_operator_gives_the_type_of_its_class(name: str, types: tuple[Type, ...], expected: Type) -> None:
    assert result(name, *types) == expected


@pytest.mark.parametrize(("name", "types", "said"), [
    ("exp", (TERM,), "is not linear"),
    ("mul", (TERM, TERM), "is not linear"),
    ("mul", (TERM, V0), "multiplies terms of a sum with what differs"),
    ("mm", (TERM, UNKNOWN), "multiplies terms of a sum with what differs"),
    ("add", (TERM, SAME), "joins terms of a sum with what is no term"),
    ("add", (TERM, V0), "joins terms of a sum with what is no term"),
    ("mul", (V0, V1), "divided in different dimensions"),
])  # fmt: skip
def test_an_illegal_combination_is_told(name: str, types: tuple[Type, ...], said: str) -> None:
    with pytest.raises(Illegal, match=said):
        result(name, *types)


def test_what_is_the_same_along_a_dimension_may_be_read_as_divided_there() -> None:
    expand = Rule(((("a",), ()),), (LETTERS,), {}, linear=(frozenset({0}),))
    (found,) = through(expand, {0: SAME}, frozenset(), 1)
    assert found == Type("R", frozenset({1}))
    assert result("t", found) == Type("R", frozenset({0}))
    assert result("mul", found, SAME) == SAME
    assert result("sum", result("t", found)).may_be_partial  # each rank's share of a sum of equal numbers
    assert not result("sum", found).may_be_partial


def test_a_factor_of_size_one_is_lost_in_a_view_and_not_misplaced() -> None:
    """[8] -> [1, 8]: one head of a rank may be the 1 or stand before the 8."""
    rule = Rule(((("d0", f"d0{UNIT}"),),), (((f"d0{UNIT}",), ("d0",)),), {}, linear=(frozenset({0}),))
    (plain,) = through(rule, {0: V0}, frozenset(), 1)
    (one,) = through(rule, {0: V0._replace(loose=True)}, frozenset(), 1)
    assert plain.dims == {1} and one.dims == {0, 1}


# --- the two views -------------------------------------------------------------------------------


@pytest.mark.parametrize(("mesh", "dp", "ep"), [
    ("dp=2,tp=4|ep=4,etp=2", 1, 2), ("dp=8|ep=4", 2, 1), ("dp=2,tp=2|ep=2,etp=2", 1, 1), ("dp=3,tp=2|ep=3", 1, 1),
])  # fmt: skip
def test_axes_are_products_of_atoms(mesh: str, dp: int, ep: int) -> None:
    atoms = atoms_of(FoldedMesh.parse(mesh))
    assert (len(atoms.of["dp"]), len(atoms.of["ep"])) == (dp, ep)
    assert any(atoms.across.values()) == (mesh == "dp=3,tp=2|ep=3")


def test_crossing_the_fold_is_free_where_all_axes_agree() -> None:
    assert read_across([V0, V1]) == Type("V", frozenset({0, 1}))
    assert read_across([TERM, TERM]) == TERM
    assert read_across([SAME, V0]).letter == MIXED
    assert read_across([TERM, V0]).letter == MIXED
