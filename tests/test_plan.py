"""A plan is every choice of a compilation: it prints, parses, and is made again; what it does not say is chosen."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import foldcc
from foldcc import FoldError, Plan
from foldcc.ir.plan import UnfitPlan
from foldcc.passes.differentiate import Differentiate
from foldcc.runtime.parameters import Places
from foldcc.testing import run_distributed
from foldcc.testing.equivalence import relative_error
from tests.models import tiny_model, token_batch

MESH = "dp=2,tp=2|ep=2"
BATCH = token_batch(4)
HEAD = f"plan {MESH}\n"
FORMALS = "kept\n  block0 x p_up_weight p_up_bias p_down_weight p_down_bias"


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.down(torch.relu(self.up(x))) - x).square().mean()


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def folded_mlp(mesh: str = "dp=2,tp=2", **options: Any) -> foldcc.FoldedModule:
    return foldcc.parallelize(Mlp(), mesh, example_inputs=(X,), **options)


@cache
def planned(family: str) -> foldcc.FoldedModule:
    layers = {"num_hidden_layers": 2 if family != "deepseek_v3" else 3}
    model = tiny_model(family, **layers, **({"aux_loss": True} if family == "mixtral" else {}))
    return foldcc.parallelize(model, MESH, example_inputs=BATCH, kernels="triton" if family == "llama" else "aten")


def texts(model: foldcc.FoldedModule) -> list[str]:
    """The stages without the time that each took; between the first that have both, a plan says what is not done yet."""
    found = {stage.name: str(stage).split("\n", 1)[1] for stage in model.stages}
    return [text for name, text in found.items() if name in ("shard", "dispatch", "store", "localize", "bucket")]


@pytest.mark.parametrize("family", ["mixtral", "llama", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_a_plan_is_what_it_prints_and_makes_the_same_program(family: str) -> None:
    model = planned(family)
    text = str(model.plan)
    assert Plan.parse(text) == model.plan and str(Plan.parse(text)) == text
    again = foldcc.parallelize(
        tiny_model(family, num_hidden_layers=2 + (family == "deepseek_v3"), aux_loss=family == "mixtral"),
        MESH,
        example_inputs=BATCH,
        plan=text,
        kernels="triton" if family == "llama" else "aten",
    )
    assert texts(again) == texts(model) and str(again.plan) == text


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(X.to(next(model.parameters()).dtype)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("parameters", "up.weight [w, hidden] I(tp)"),
        ("parameters", "up.weight [w, hidden@tp]"),
        ("stored", "up.weight [w@tp, hidden@dp]"),
        ("stored", "down.bias [hidden@dp]"),
        ("parameters", "down.bias [hidden@tp]"),
        ("block0", "relu [batch, w] I(tp) -> [batch, w] I(tp)"),
        ("block0", "relu [batch, w] R(tp) -> [batch, w] R(tp)"),
        ("block0", "linear_1 [batch, w] R(tp), [hidden, w] R(tp), [hidden] R(tp) -> [batch, hidden] R(tp)"),
        ("kept", "block0 x p_up_weight p_up_bias p_down_weight p_down_bias"),
        ("together", "unshard0 -"),
    ],
)
def test_a_plan_of_one_line_decides_one_thing(section: str, line: str) -> None:
    plain = Mlp().double()
    text = f"plan dp=2,tp=2\n{section}\n  {line}"
    model = foldcc.parallelize(copy.deepcopy(plain), "dp=2,tp=2", example_inputs=(X.double(),), plan=text, verify=True)
    Plan.parse(text).check_made(model.plan)
    assert str(model.plan) != str(folded_mlp().plan)
    wanted = gradients(plain)
    for name, gradient in gradients(model).items():
        assert relative_error(gradient, wanted[name]) < 1e-10, name


def test_what_a_plan_does_not_keep_is_computed_again() -> None:
    usual, again = (
        folded_mlp(),
        folded_mlp(plan=f"plan dp=2,tp=2\n{FORMALS}"),
    )
    assert again.plan.kept["block0"] == ("x", "p_up_weight", "p_up_bias", "p_down_weight", "p_down_bias")
    block = again.stages["split"].program.backward.block0
    assert sum(bool(n.meta.get("again")) for n in block.graph.nodes) > 5
    for name, gradient in gradients(again).items():
        assert torch.equal(gradient, gradients(usual)[name]), name


def test_a_reduced_proof_has_the_choices_of_the_plan() -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    kept = "kept\n  block1 " + " ".join(
        n.name
        for n in planned("llama").stages["differentiate"].program.blocks["block1"].graph.find_nodes(op="placeholder")
        if "result" not in n.meta
    )
    folded = foldcc.parallelize(model, MESH, example_inputs=BATCH, plan=f"{HEAD}{kept}\ntogether\n  unshard1 -")
    proof = foldcc.verify(folded, reduced=True)
    assert proof.ok and folded.plan.together["unshard1"] == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "begins with its mesh"),
        ("hello", "begins with its mesh"),
        ("plan dp=2,tp=2\n  up.weight [w]", "Line 2 .* no part of a plan"),
        ("plan dp=2,tp=2\nparameters\n  up.weight w", "Line 3 .* no layout"),
        ("plan dp=2,tp=2\nparameters\n  up.weight [w@ep, hidden]\n  down.weight [w@xy]", "Line 4 .* over xy"),
        ("plan dp=2,tp=2\nblock0\n  relu [batch]", "Line 3 .* have -> between"),
        ("plan dp=2,tp=2\nfactors batch=many", "Line 2 .* invalid literal"),
        ("plan dp=2,tp=2\nparameters\nup.weight [w]", "Line 3 .* begins no part of a plan; .* indented"),
        ("plan dp=2,tp=2\nkept\nblock0 x", "Line 3 .* begins no part of a plan"),
        ("plan dp=2,tp=2\nparameter\n  up.weight [w]", "Line 2 .* begins no part of a plan"),
        ("plan dp=2,tp=2\nparameters\n  a [w]\n  a [w@tp]", "Line 4 .* says a a second time"),
        ("plan dp=2,tp=2\nblock0\n  a [w] -> [w]\n  a [w] -> [w@tp]", "Line 4 .* says a a second time"),
        ("plan dp=2,tp=2 · zero=9", "zero=9 is no stage of ZeRO"),
    ],
)
def test_text_that_is_no_plan_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(FoldError, match=said):
        Plan.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plan dp=4", "for the mesh dp=4, and the mesh is dp=2,tp=2"),
        ("plan Other · dp=2,tp=2", "for the model Other, and the model is Mlp"),
        ("plan dp=2,tp=2\nparameters\n  up.wait [w, hidden]", "says something of up.wait"),
        ("plan dp=2,tp=2\nparameters\n\tup.weight [w, hidden@tp, more]", "up.weight is not what the program has"),
        ("plan dp=2,tp=2\nvalues\n  y [w, hidden]", "says something of y"),
        ("plan dp=2,tp=2\nblock7\n  relu - -> [w]", "says something of block7"),
        ("plan dp=2,tp=2\nblock0\n  gelu - -> [w]", "says something of gelu"),
        ("plan dp=2,tp=2\nkept\n  block3 x", "says something of block3"),
        ("plan dp=2,tp=2\ntogether\n  block3 x", "says something of block3"),
        ("plan dp=2,tp=2\nparameters\n  up.weight [w@dp, hidden]", "up.weight is not possible on dp=2"),
        ("plan dp=2,tp=2\nblock0\n  relu [b, w] P(tp) -> [b, w] P(tp)", "block0 relu is not possible on tp=2"),
        ("plan dp=2,tp=2\nblock0\n  relu [b, w@tp] -> [b, w@tp], [b, w@tp]", "relu is not what the program has"),
        ("plan dp=2,tp=2\nkept\n  block0 y", "block0 cannot be computed of what the plan says is kept: y"),
        ("plan dp=2,tp=2\nkept\n  block0 x", "block0 cannot be computed of what the plan says is kept: x"),
        ("plan dp=2,tp=2\ntogether\n  unshard0 x y", "x y of unshard0 travel together, which are not alike"),
        ("plan dp=2,tp=2\nstored\n  up.weight [w@tp, hidden@tp]", "up.weight cannot be stored so on tp=2"),
        ("plan dp=2,tp=2\nstored\n  up.weight [w, hidden] P(dp)", "up.weight cannot be stored so on dp=2"),
        ("plan dp=2,tp=2\nstored\n  up.wait [w, hidden@dp]", "says something of up.wait"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(text: str, said: str) -> None:
    with pytest.raises(UnfitPlan, match=said):
        folded_mlp(plan=text)


def test_a_plan_and_an_option_that_say_different_things() -> None:
    stored = str(folded_mlp(zero=3).plan)
    assert folded_mlp(plan=stored).plan.zero == 3 and folded_mlp(plan=stored, zero=3).plan == Plan.parse(stored)
    with pytest.raises(FoldError, match="choices are those for zero=3, and zero=0 is asked for"):
        folded_mlp(plan=stored, zero=0)


def test_a_layer_whose_parameter_is_laid_out_otherwise_is_a_block_of_its_own() -> None:
    plain = tiny_model("llama", num_hidden_layers=3)
    plan = f"{HEAD}parameters\n  model.layers.1.mlp.up_proj.weight [w, hidden@tp]"
    model = foldcc.parallelize(copy.deepcopy(plain), MESH, example_inputs=BATCH, plan=plan)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    assert ["hidden@tp" in str(model.plan.parameters[n]) for n in names] == [False, True, False]
    for m in (plain, model):
        m(**BATCH).loss.backward()
    for name, p in plain.named_parameters():
        assert relative_error(model.get_parameter(name).grad, p.grad) < 1e-5, name


def test_a_tied_parameter_has_all_of_its_names() -> None:
    model = tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=True)
    plan = f"{HEAD}parameters\n  lm_head.weight [vocab, hidden] I(tp)"
    folded = foldcc.parallelize(model, MESH, example_inputs=BATCH, plan=plan)
    assert str(folded.plan.parameters["model.embed_tokens.weight"]) == "[vocab, hidden] I(dp,tp)"


def test_what_is_no_plan_is_refused() -> None:
    with pytest.raises(FoldError, match="plan is a foldcc.Plan or its text, not dict"):
        folded_mlp(plan={"up.weight": "[w@tp, hidden]"})


def test_a_plan_decides_of_later_programs_what_it_fits(recwarn: pytest.WarningsRecorder) -> None:
    line = "parameters\n  up.weight [w, hidden@tp]\n"
    model = foldcc.parallelize(Mlp(), "dp=2,tp=2", plan=f"plan dp=2,tp=2\n{line}block0\n  relu [b, w] R(tp) -> [b, w] R(tp)")
    model(X)
    model(torch.cat([X, X]))
    assert str(model.plan.blocks["block0"]["relu"]) == "[batch@dp, w1] R(tp) -> [batch@dp, w1] R(tp)"
    assert not [w for w in recwarn if "Of the plan" in str(w.message)]
    with (
        pytest.warns(UserWarning, match="Of the plan, another program takes the layouts of parameters alone.*block0 relu"),
        torch.no_grad(),
    ):
        model(X)  # without a gradient there is no R
    assert str(model.plan.parameters["up.weight"]) == "[w1, seq@tp] I(dp)"


def on_processes(plan: str, wanted: dict[str, Tensor]) -> None:
    mesh = foldcc.FoldedMesh.parse("dp=2,tp=2", device_type="cpu")
    model = foldcc.parallelize(Mlp().double(), mesh, example_inputs=(X[:2].double(),), plan=plan)
    model(X.chunk(2)[mesh.coordinate(dist.get_rank(), "dp")].double()).backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad.full_tensor(), wanted[name]) < 1e-10, name
    assert str(model.plan.parameters["up.weight"]) == "[w1, seq@tp] I(dp)"
    with pytest.warns(UserWarning, match="Ranks have made different choices, .* rank 0's are taken"):
        given = plan if dist.get_rank() == 0 else None
        other = foldcc.parallelize(Mlp().double(), mesh, example_inputs=(X[:2].double(),), plan=given)
    assert other.plan == model.plan


def test_a_plan_on_processes() -> None:
    plan = f"plan dp=2,tp=2\nparameters\n  up.weight [w, hidden@tp]\n{FORMALS}"
    run_distributed(on_processes, 4, plan, gradients(Mlp().double()))


def test_bf16_and_autocast_take_a_plan() -> None:
    plan = "plan dp=2,tp=2\nparameters\n  up.weight [w, hidden@tp]"
    narrow = foldcc.parallelize(Mlp().bfloat16(), "dp=2,tp=2", example_inputs=(X.bfloat16(),), plan=plan)
    usual = foldcc.parallelize(Mlp().bfloat16(), "dp=2,tp=2", example_inputs=(X.bfloat16(),))
    for name, gradient in gradients(narrow).items():
        assert relative_error(gradient.float(), gradients(usual)[name].float()) < 0.02, name
    model = foldcc.parallelize(Mlp(), "dp=2,tp=2", plan=plan)
    with torch.autocast("cpu", torch.bfloat16):
        model(X).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_choices_survive_with_passes_and_the_gradients_of_other_outputs() -> None:
    model = folded_mlp()
    assert model.with_passes().plan == model.plan and Differentiate in {type(s.by) for s in model.stages}


def test_a_program_that_holds_a_parameter_otherwise_is_refused() -> None:
    usual, other = folded_mlp(), folded_mlp(plan="plan dp=2,tp=2\nstored\n  up.weight [w@tp, hidden@dp]")
    places = Places(usual.mesh)
    places.take(usual, usual.program)
    with pytest.raises(FoldError, match=r"Parameter up.weight is held as .*, and another program holds it as .*@dp"):
        places.take(usual, other.program)
