"""verify: no false alarm, no missed bug, the broken pass is named, and no proof is claimed for what was not examined."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, fx, nn
from torch.nn import functional

import foldcc
from foldcc import ops
from foldcc.errors import FoldError
from foldcc.ir.program import Program
from foldcc.mesh import FoldedMesh
from foldcc.module import FoldedModule
from foldcc.passes import PIPELINE, Pass, Stages, run_passes
from foldcc.runtime.simulate import simulate
from foldcc.testing import Case, programs
from foldcc.verification.compiled import first_broken
from foldcc.verification.field import Field
from foldcc.verification.lockstep import Ranked, leaves, on_ranks, run_in_lockstep
from foldcc.verification.mode import FieldMode
from foldcc.verification.prove import prove
from tests.models import FAMILIES, LAYER_KINDS, WITH_AUX_LOSS, tiny_model, token_batch

aten = torch.ops.aten
MESHES = ("dp=2,tp=4|ep=4,etp=2", "dp=3,tp=2|ep=2")
EVERY = (*MESHES, "tp=2|ep=2", "dp=2,tp=2|ep=4", "tp=4|ep=2,etp=2", "dp=4,tp=2|ep=8", "dp=8|ep=4")


def folded(family: str, text: str, **changes: int) -> FoldedModule:
    mesh = FoldedMesh.parse(text)
    model = tiny_model(family, aux_loss=family in WITH_AUX_LOSS, **changes)
    return foldcc.parallelize(model, mesh, example_inputs=token_batch(2 * mesh.size("dp")))


@pytest.fixture(scope="module")
def mixtral() -> FoldedModule:
    return folded("mixtral", "dp=2,tp=2|ep=2,etp=2")


def broken_at(model: FoldedModule, stage: str, edit: Callable[[Program], None], name: str | None = None) -> FoldedModule:
    """The model with its program edited after a stage, and the later passes run on it.

    Args:
        name: of a pass that has edited it; without one the stage's own pass has.
    """
    start = [s.name for s in model.stages].index(stage)
    program = model.stages[stage].program.copied()
    edit(program)
    later = run_passes(program, model.stages.passes(after=stage))
    edited = [_stage(model, stage, program)]
    if name is not None:
        edited = [model.stages[stage], replace(edited[0], name=name)]
    stages = [*model.stages[:start], *edited, *list(later)[1:]]
    other = copy.copy(model)
    other.__dict__["_programs"] = model._programs.rewritten(Stages(stages), model._programs.newest.executable)
    return other


def _stage(model: FoldedModule, name: str, program: Program) -> foldcc.passes.Stage:
    return replace(model.stages[name], program=program)


def edit_first(target: object, change: Callable[[fx.Node], None], where: str = "") -> Callable[[Program], None]:
    """Changes the first node of a block that calls `target`."""

    def edit(program: Program) -> None:
        for name, block in program.blocks.items():
            for node in block.graph.nodes:
                if node.target is target and where in name:
                    change(node)
                    block.recompile()
                    return
        raise AssertionError(f"no {target}")

    return edit


@pytest.mark.parametrize(("family", "mesh"), [*zip(("gpt_oss", "qwen2_moe", "mixtral", "olmoe"), 2 * MESHES, strict=True)])
def test_a_folded_model_is_proved(family: str, mesh: str) -> None:
    foldcc.verify(folded(family, mesh, num_hidden_layers=LAYER_KINDS[family]), rounds=1).raise_if_failed()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", EVERY)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_model_is_proved_on_every_mesh(family: str, mesh: str) -> None:
    foldcc.verify(folded(family, mesh)).raise_if_failed()


def drawn(examples: int) -> Callable[..., Callable[..., None]]:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])


@drawn(3)
@given(case=programs(world=4))
def test_no_program_is_a_false_alarm(case: Case) -> None:
    folded = foldcc.parallelize(case.model, case.mesh, example_inputs=case.inputs)
    foldcc.verify(folded, rounds=1).raise_if_failed()


@pytest.mark.slow
@drawn(500)
@given(case=programs(world=8))
def test_no_program_of_five_hundred_is_a_false_alarm(case: Case) -> None:
    folded = foldcc.parallelize(case.model, case.mesh, example_inputs=case.inputs)
    foldcc.verify(folded, rounds=1).raise_if_failed()


def test_every_stage_is_proved(mixtral: FoldedModule) -> None:
    for stage in mixtral.stages:
        proof = prove(mixtral.stages, dict(mixtral.named_buffers()), stage=stage.name, fields=[Field()])
        assert proof.ok and proof.stage == stage.name
    assert foldcc.verify(mixtral, stage="shard", rounds=1).stage == "shard"


def test_the_same_seed_gives_the_same_verdict(mixtral: FoldedModule) -> None:
    assert foldcc.verify(mixtral, seed=5, rounds=1) == foldcc.verify(mixtral, seed=5, rounds=1)
    proof = foldcc.verify(mixtral, rounds=2)
    assert proof.bound < 1e-6 and proof.prime == 2**31 - 1 and proof.rounds == 2


def test_a_proof_says_what_it_proves_and_what_not(mixtral: FoldedModule) -> None:
    text = str(foldcc.verify(mixtral))
    for told in ("21 parameters", "on each of 4 ranks", "squared norm", "rounding", "randomness", "2147483647", "2 rounds"):
        assert told in text


BUGS = {
    "shard": edit_first(aten.mul.Tensor, lambda n: setattr(n, "target", aten.add.Tensor), "block1"),
    "dispatch": edit_first(ops.unpermute.overload, lambda n: setattr(n, "args", (n.args[0], n.args[1], _squared(n)))),
    "localize": edit_first(ops.reduce_scatter.overload, lambda n: _forward_only(n)),
}


def _squared(node: fx.Node) -> fx.Node:
    """The weights of a combine, squared: a combine that weighs twice."""
    weights = node.args[2]
    with node.graph.inserting_before(node):
        twice = node.graph.call_function(aten.mul.Tensor, (weights, weights))
    twice.meta = dict(weights.meta)  # type: ignore[union-attr]
    return twice


def _forward_only(node: fx.Node) -> None:
    """A reduction that leaves out what the other ranks have."""
    x, dim, outer, axes = node.args
    node.target, node.args = ops.shard.overload, (x, dim, outer, axes, "R")


@pytest.mark.parametrize("stage", BUGS)
def test_the_broken_pass_is_named(mixtral: FoldedModule, stage: str) -> None:
    broken = broken_at(mixtral, stage, BUGS[stage])
    proof = first_broken(foldcc.verify(broken, rounds=1), broken.stages, dict(broken.named_buffers()))
    assert not proof.ok and proof.stage == stage


def test_a_wrong_forward_node_is_located(mixtral: FoldedModule) -> None:
    edit = edit_first(ops.reduce_scatter.overload, _forward_only, "block1")
    proof = foldcc.verify(broken_at(mixtral, "localize", edit), rounds=1)
    assert proof.node is not None and "block1, forward" in proof.node and "add" in proof.node
    assert "modeling_mixtral.py" in str(proof) and "batch@dp, seq@tp, hidden" in str(proof)


def test_a_gradient_that_is_not_reduced_is_located_and_read(mixtral: FoldedModule) -> None:
    def enters_without(program: Program) -> None:
        for block in program.blocks.values():
            for node in block.graph.find_nodes(op="call_function", target=ops.retype.overload):
                if "post_attention_layernorm" in node.args[0].name:
                    node.replace_all_uses_with(node.args[0])
                    block.graph.erase_node(node)

    proof = foldcc.verify(broken_at(mixtral, "localize", enters_without), rounds=1)
    assert proof.parameter is not None and proof.parameter.endswith("post_attention_layernorm.weight")
    assert "a term of the sum over dp,tp, which was not taken" in str(proof) and "backward" in str(proof)
    with pytest.raises(FoldError, match="which was not taken"):
        proof.raise_if_failed()


def test_a_loss_that_is_too_large_is_read_as_a_multiple(mixtral: FoldedModule) -> None:
    def without_mean(program: Program) -> None:
        (output,) = list(program.blocks.values())[-1].graph.find_nodes(op="output")
        loss = output.args[0][0]
        with loss.graph.inserting_after(loss):
            twice = loss.graph.call_function(aten.mul.Tensor, (loss, 2))
        twice.meta = dict(loss.meta)
        output.replace_input_with(loss, twice)

    assert "it is 2 times what it should be" in str(foldcc.verify(broken_at(mixtral, "localize", without_mean), rounds=1))


def missed(model: FoldedModule, field: Field) -> bool:
    """Whether a verifier over this field calls a program equal."""
    return prove(model.stages, dict(model.named_buffers()), stage="bucket", fields=[field]).ok


def thrice_the_loss(model: FoldedModule) -> FoldedModule:
    def thrice(program: Program) -> None:
        for block in program.blocks.values():
            for node in block.graph.find_nodes(op="call_function", target=ops.unpermute.overload):
                with node.graph.inserting_after(node):
                    more = node.graph.call_function(aten.mul.Tensor, (node, 3))
                more.meta = dict(node.meta)
                node.replace_all_uses_with(more, delete_user_cb=lambda user, more=more: user is not more)

    return broken_at(model, "localize", thrice)


def test_a_verifier_over_two_elements_is_caught(mixtral: FoldedModule) -> None:
    bug = thrice_the_loss(mixtral)
    assert not missed(bug, Field())
    with pytest.raises(FoldError, match="divides by zero"):  # one half is no element of it
        missed(bug, Field(prime=2))


def test_stacked_ranks_compute_what_single_ranks_compute(mixtral: FoldedModule) -> None:
    program = mixtral.program
    random = torch.Generator().manual_seed(0)
    values = []
    for node in program.placeholders:
        shape, floats = (4, *node.meta["layout"].shape), node.meta["val"].is_floating_point()
        held = torch.randn(shape, generator=random) if floats else torch.randint(0, 8, shape, generator=random)
        values.append(Ranked(held.unbind()))
    plain = simulate(program.mesh, program.graph, values)
    stacked = run_in_lockstep(program.mesh, program.graph, values)
    outputs = [on_ranks(x, 4) for x in leaves(stacked[0])]
    for rank in range(4):
        for mine, theirs in zip(leaves(plain[rank][0]), outputs, strict=True):
            torch.testing.assert_close(mine, theirs[rank])


def test_the_largest_over_ranks_is_the_fields_where_elements_above_half_are_negative() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(ops.all_reduce_max.overload, (x, "tp")))
    mesh, field = FoldedMesh.parse("tp=2"), Field()
    terms = Ranked([torch.tensor([field.prime - 5.0]), torch.tensor([3.0])])
    with FieldMode(field):
        largest = on_ranks(run_in_lockstep(mesh, fx.GraphModule(nn.Module(), graph), [terms]), 2)
    assert [float(y) for y in largest] == [3.0, 3.0]


# --- what cannot be proved ---


class Odd(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Tensor]):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.inner(x)).sum()


def test_a_verifier_whose_hash_is_the_identity_is_caught() -> None:
    """It takes an error function for a sine, where no derivative of either is asked for."""
    mesh = FoldedMesh.parse("dp=2")
    model = foldcc.parallelize(Odd(lambda x: x * torch.sin(x.detach())), mesh, example_inputs=(torch.randn(4, 8),))
    bug = broken_at(model, "shard", edit_first(aten.sin.default, lambda n: setattr(n, "target", aten.erf.default)))
    assert not missed(bug, Field())
    assert missed(bug, Field(hashed=lambda x, name: x))


def verified(fn: Callable[[Tensor], Tensor]) -> foldcc.verification.Proof:
    mesh = FoldedMesh.parse("dp=2")
    return foldcc.verify(foldcc.parallelize(Odd(fn), mesh, example_inputs=(torch.randn(4, 8),)))


@pytest.mark.filterwarnings("ignore::foldcc.passes.annotate.UnknownOperator")
def test_an_operator_without_a_meaning_is_named_with_its_module() -> None:
    with pytest.raises(FoldError, match="aten.logcumsumexp.*has no meaning over a field"):
        verified(lambda x: x.logcumsumexp(-1))


MADE_OF_OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "huber": lambda x: functional.huber_loss(x, x.detach().flip(1), reduction="none", delta=0.5),
    "cross entropy of logits": lambda x: functional.binary_cross_entropy_with_logits(x, x.detach().sigmoid()),
    "group norm": lambda x: functional.group_norm(x, 4),
    "reflection": lambda x: functional.pad(x[None], (2, 1), mode="reflect")[0],
    "dot": lambda x: torch.vdot(x.flatten(), x.flatten().flip(0)),
}


@pytest.mark.filterwarnings("ignore::foldcc.passes.annotate.UnknownOperator")
@pytest.mark.filterwarnings("ignore:All ranks together compute")
@pytest.mark.parametrize("name", MADE_OF_OTHERS)
def test_an_operator_means_what_the_operators_that_it_is_made_of_mean(name: str) -> None:
    assert verified(MADE_OF_OTHERS[name]).ok


def test_a_program_that_divides_by_zero_is_no_proof() -> None:
    with pytest.raises(FoldError, match="divides by zero"):
        verified(lambda x: x / (x - x))


def test_no_round_is_no_proof(mixtral: FoldedModule) -> None:
    with pytest.raises(FoldError, match="rounds=0 would prove nothing"):
        foldcc.verify(mixtral, rounds=0)


def test_an_unknown_stage_is_an_error(mixtral: FoldedModule) -> None:
    with pytest.raises(FoldError, match="There is no stage 'fuse'"):
        foldcc.verify(mixtral, stage="fuse")


def test_a_captured_program_that_does_not_run_is_an_error() -> None:
    """An index that the model takes from its input, and that is out of range."""

    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 8))

        def forward(self, ids: Tensor) -> Tensor:
            return self.weight.index_select(0, (ids * ids + 1).flatten()).sum()

    mesh = FoldedMesh.parse("dp=2")
    model = foldcc.parallelize(Looked(), mesh, example_inputs=(torch.zeros(4, 2, dtype=torch.int64),))
    with pytest.raises(FoldError, match="The captured program does not run at index_select"):
        foldcc.verify(model)


@dataclass(frozen=True, kw_only=True)
class Confuse(Pass):
    """A pass that takes a sum for a product, once."""

    requires = frozenset({"outlined"})

    def run(self, program: Program) -> Program:
        edit_first(aten.mul.Tensor, lambda n: setattr(n, "target", aten.add.Tensor), "block1")(program)
        return program


def test_a_model_is_verified_as_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, inputs = FoldedMesh.parse("dp=2,tp=2|ep=4"), token_batch(4)
    folded_model = foldcc.parallelize(tiny_model("mixtral", num_hidden_layers=1), mesh, example_inputs=inputs, verify=True)
    assert folded_model(**inputs).loss.isfinite()
    monkeypatch.setattr("foldcc.api.PIPELINE", (*PIPELINE[:2], Confuse(), *PIPELINE[2:]))
    with pytest.raises(FoldError, match="at stage confuse"):
        foldcc.parallelize(tiny_model("mixtral"), mesh, example_inputs=inputs, verify=True)


class Powers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x.abs() * torch.tensor(0.5) ** torch.arange(1, 9)) ** self.weight


def test_a_power_of_tensors_is_a_function_of_both() -> None:
    model = foldcc.parallelize(Powers(), "dp=2", example_inputs=(torch.randn(4, 8),), verify=False)
    assert foldcc.verify(model).ok
    with pytest.raises(FoldError, match="NOT equal"):
        foldcc.verify(model.with_passes(Exchange())).raise_if_failed()


@dataclass(frozen=True, kw_only=True)
class Exchange(Pass):
    """A pass that takes the base of a power for its exponent."""

    def run(self, program: Program) -> Program:
        edit_first(aten.pow.Tensor_Tensor, lambda n: setattr(n, "args", n.args[::-1]), "block0")(program)
        return program
