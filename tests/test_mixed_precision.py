"""Precision: products in 16 bits, gradients added in 32, and a model that trains as it does in one process."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import foldcc
from foldcc import FoldError, Precision
from foldcc.ir.program import Program
from foldcc.passes import Pass
from foldcc.testing import in_float64, run_distributed
from foldcc.testing.equivalence import relative_error
from tests.models import tiny_model, token_batch

BATCH = token_batch(4)
MESHES = ("dp=2,tp=2|ep=4", "dp=4|ep=2")
# Each token goes to all experts, so that rounding decides nothing.
ALL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"num_experts_per_tok": 8},
    "gpt_oss": {"num_experts_per_tok": 8},
    "deepseek_v3": {"num_experts_per_tok": 8, "topk_group": 4},
}
cast = torch.ops.aten._to_copy.default
USUAL = Precision()


def gradients(model: nn.Module, batch: dict[str, Tensor] = BATCH) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def eager(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    return model


def folded(plain: nn.Module, mesh: str, precision: Precision | None = USUAL, **options: Any) -> foldcc.FoldedModule:
    return foldcc.parallelize(copy.deepcopy(plain), mesh, example_inputs=BATCH, precision=precision, **options)


def sent(model: foldcc.FoldedModule, *axes: str) -> Counter[tuple[str, torch.dtype]]:
    """Bytes of sums over some axes in the backward pass, by operator and dtype."""
    found: Counter[tuple[str, torch.dtype]] = Counter()
    for c in model.collectives():
        if not set(axes).isdisjoint(c.axes) and c.direction == "backward" and c.operator != "all_gather":
            found[c.operator, c.dtype] += c.bytes
    return found


def apart(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The relative error of all gradients together."""
    error, size = ([float(x.norm()) for x in of.values()] for of in ({n: found[n] - g for n, g in exact.items()}, exact))
    return math.hypot(*error) / math.hypot(*size)


def compare(family: str, mesh: str, *stages: int, **changes: int) -> None:
    plain = tiny_model(family, **ALL[family], **changes)
    exact = {n: g.float() for n, g in gradients(eager(plain).double()).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        usual = gradients(eager(plain))
    least = 0.1 * max(float(g.norm()) for g in exact.values())
    in_one_process = max(relative_error(usual[n], exact[n], least) for n in exact)
    alone = apart(gradients(folded(plain, "dp=1")), exact)
    for zero in stages:
        model = folded(plain, mesh, zero=zero)
        found = gradients(model)
        assert {g.dtype for g in found.values()} == {torch.float32}
        assert {dtype for _, dtype in sent(model, "dp", "edp")} == {torch.float32}
        assert max(relative_error(found[n], exact[n], least) for n in exact) < 1.5 * in_one_process
        assert apart(found, exact) < (1.1 if "tp" in mesh else 1.02) * alone  # what tp and etp divide is rounded on each rank


@pytest.mark.parametrize(("family", "mesh", "zero"), [("mixtral", MESHES[1], 3), ("gpt_oss", MESHES[0], 0)])
def test_gradients_are_as_near_to_the_truth_as_in_one_process_and_as_under_autocast(family: str, mesh: str, zero: int) -> None:
    compare(family, mesh, zero, num_hidden_layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*MESHES, "dp=2,cp=2|ep=2,etp=2", "dp=2,tp=2|ep=2,etp=2"])
@pytest.mark.parametrize("family", ALL)
def test_gradients_of_every_family_are_as_near_to_the_truth(family: str, mesh: str) -> None:
    compare(family, mesh, 0, 3)


@pytest.mark.parametrize(
    ("family", "mesh", "options"),
    [("mixtral", MESHES[0], {"zero": 3}), ("llama", "cp=2,tp=2", {"recompute": "blocks"})],
)
def test_casts_change_nothing_but_digits(family: str, mesh: str, options: dict[str, Any]) -> None:
    plain = tiny_model(family, num_hidden_layers=1).double()
    with in_float64():
        model = folded(plain, mesh, verify=True, **options)
        wanted = gradients(eager(plain))
        for name, gradient in gradients(model).items():
            assert relative_error(gradient, wanted[name]) < 1e-10, name


def test_gradients_travel_in_the_dtype_that_is_said_and_weights_in_that_of_products() -> None:
    plain = tiny_model("mixtral", num_hidden_layers=1)
    wide, narrow = (folded(plain, MESHES[1], Precision(reduce=d), zero=3) for d in (torch.float32, "bfloat16"))
    for axis in ("dp", "edp"):
        (added, wider), (other, narrower) = (sent(m, axis).popitem() for m in (wide, narrow))
        assert added == ("reduce_scatter", torch.float32) and other == ("reduce_scatter", torch.bfloat16)
        assert wider == 2 * narrower and len(sent(wide, axis)) == len(sent(narrow, axis)) == 1
    assert {g.dtype for g in gradients(narrow).values()} == {torch.float32}
    of_experts = {(c.direction, c.dtype) for c in wide.collectives() if c.axes == ("edp",) and c.operator == "all_gather"}
    assert of_experts == {("forward", torch.bfloat16), ("backward", torch.bfloat16)}


def test_weights_lie_and_products_are_divided_as_without_a_precision() -> None:
    plain = tiny_model("llama", num_hidden_layers=1)
    wide, narrow = (folded(plain, "dp=2,tp=2", p).plan for p in (None, Precision()))
    assert wide.parameters == narrow.parameters
    for block, operators in wide.blocks.items():
        for name, layouts in operators.items():
            assert name.startswith("_to_copy") or narrow.blocks[block][name] == layouts, name


def test_narrow_parameters_stay_narrow_and_their_gradients_are_added_wide() -> None:
    plain = tiny_model("llama", num_hidden_layers=1).bfloat16()
    model = folded(plain, "dp=2,tp=2", zero=1)
    assert {g.dtype for g in gradients(model).values()} == {torch.bfloat16}
    assert {dtype for _, dtype in sent(model, "dp")} == {torch.float32}


def test_a_call_is_the_same_each_time_in_evaluation_too_and_compiles_for_other_shapes() -> None:
    plain = tiny_model("llama", num_hidden_layers=1)
    model = folded(plain, "dp=2")
    first, second = gradients(model), gradients(model)
    assert all(torch.equal(first[n], second[n]) for n in first)
    loss = model(**BATCH).loss
    with torch.no_grad():
        assert torch.equal(model(**BATCH).loss, loss)
        other = token_batch(2, 24)
        assert abs(model.eval()(**other).loss - plain(**other).loss) < 0.05
    assert model.state_dict()["lm_head.weight"].dtype == torch.float32
    assert model(**BATCH).logits.dtype == torch.bfloat16 and loss.dtype == torch.float32


def test_what_hooks_are_given_is_what_is_computed() -> None:
    plain, seen = tiny_model("llama", num_hidden_layers=1), []
    bare = gradients(folded(plain, "dp=2,tp=2"))
    model = foldcc.parallelize(plain, "dp=2,tp=2", precision=Precision())
    layer = model.model.layers[0]
    layer.self_attn.q_proj.register_full_backward_hook(lambda m, given, left: seen.append(left[0].dtype))
    layer.mlp.up_proj.register_forward_hook(lambda m, args, output: seen.append(output.dtype))
    layer.register_forward_hook(lambda m, args, output: seen.append(output.dtype))
    found = gradients(model)
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert all(relative_error(found[n], bare[n]) < 0.02 for n in bare)


def test_a_plan_holds_the_precision_and_makes_the_same_program() -> None:
    plain = tiny_model("mixtral", num_hidden_layers=1)
    model = folded(plain, MESHES[0], Precision(compute="float16"), zero=3)
    assert str(model.plan).splitlines()[0].endswith("· zero=3 · compute=float16 reduce=float32 router=float32")
    again = foldcc.parallelize(plain, MESHES[0], example_inputs=BATCH, plan=str(model.plan))
    assert again.plan == model.plan
    with pytest.raises(FoldError, match="are those for compute=float16 .*, and compute=bfloat16 .* is asked for"):
        folded(plain, MESHES[0], plan=model.plan)


@dataclass(frozen=True, kw_only=True)
class Narrowed(Pass):
    """Rounds what is added over `axis`."""

    requires = frozenset({"bucketed"})
    axis: str

    def run(self, program: Program) -> Program:
        assert program.backward is not None
        for block in program.backward.children():
            for node in list(block.graph.nodes):
                known = foldcc.ops.record(node.target)
                if known is not None and known.adds and self.axis in known.arguments(node.args, {})["axes"].split(","):
                    with block.graph.inserting_before(node):
                        rounded = block.graph.call_function(cast, (node.args[0],), {"dtype": torch.bfloat16})
                    rounded.meta = {**node.args[0].meta, "val": node.args[0].meta["val"].to(torch.bfloat16)}
                    node.args = (rounded, *node.args[1:])
        return program


@pytest.mark.parametrize(("zero", "axis", "operator"), [(0, "dp", "all_reduce"), (3, "edp", "reduce_scatter")])
def test_gradients_that_are_added_in_a_narrower_dtype_are_ill_typed(zero: int, axis: str, operator: str) -> None:
    plain = tiny_model("mixtral", num_hidden_layers=1)
    model = folded(plain, MESHES[1], zero=zero)
    with pytest.raises(
        FoldError, match=f"gradient of model.* is added over {axis} in bfloat16, .* says reduce=float32"
    ) as error:
        model.with_passes(Narrowed(axis=axis))
    assert f"foldcc.{operator}" in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"compute": "int8"}, "compute=int8 is no dtype of a precision"),
        ({"compute": torch.float64}, "compute=torch.float64 is no dtype"),
        ({"reduce": "float16"}, "adds gradients up to 65504, and one of 1 is 65536 where GradScaler begins"),
        ({"compute": "float16", "reduce": "bfloat16"}, "reduce=bfloat16 keeps 8 binary digits of the 11 that compute=float16"),
        ({"compute": "float32", "router": "bfloat16"}, "router=bfloat16 keeps 8 binary digits of the 24"),
    ],
)
def test_a_precision_that_cannot_be_is_an_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FoldError, match=message):
        Precision(**given)


def test_a_precision_is_what_it_prints() -> None:
    for precision in (Precision(), Precision(compute="float16"), Precision(reduce=torch.bfloat16, router="bfloat16")):
        assert Precision.parse(str(precision)) == precision
    with pytest.raises(FoldError, match="says nothing of 'sums'"):
        Precision.parse("compute=bfloat16 sums=float32")
    with pytest.raises(TypeError):
        Precision(torch.bfloat16)  # type: ignore[misc]


def test_a_precision_and_autocast_are_one_too_many() -> None:
    plain = tiny_model("llama", num_hidden_layers=1)
    model = folded(plain, "dp=2")
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(FoldError, match="under autocast to torch.bfloat16, and the program's precision is compute=bfloat16"),
    ):
        model(**BATCH)
    with pytest.raises(FoldError, match="precision is a foldcc.Precision, not 'bfloat16'"):
        foldcc.parallelize(plain, "dp=2", precision="bfloat16")  # type: ignore[arg-type]


# --- training loops ---


def train(model: nn.Module, batches: list[dict[str, Tensor]], scale: float | None = None) -> list[tuple[float, ...]]:
    """The loss, the norm of the gradients and the scale of the loss in each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0, growth_interval=2)
    told = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = foldcc.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        told.append((loss.item(), float(norm), scaler.get_scale()))
    return told


def own(mesh: foldcc.FoldedMesh, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.chunk(mesh.size("dp"))[mesh.coordinate(dist.get_rank(), "dp")] for n, x in batch.items()}


def model_to_train() -> nn.Module:
    return tiny_model("mixtral", num_hidden_layers=1, **ALL["mixtral"])


def on_processes(text: str, precision: Precision | None, zero: int, steps: int, scale: float | None) -> Any:
    mesh = foldcc.FoldedMesh.parse(text, device_type="cpu")
    model = foldcc.parallelize(model_to_train(), mesh, precision=precision, zero=zero)
    return train(model, [own(mesh, token_batch(4, seed=i % 4)) for i in range(steps)], scale)


def in_one_process(precision: Precision | None, steps: int, scale: float | None = None) -> list[tuple[float, ...]]:
    model = folded(model_to_train(), "dp=1", precision)
    return train(model, [token_batch(4, seed=i % 4) for i in range(steps)], scale)


def test_float16_trains_with_a_scaled_loss_on_processes() -> None:
    wanted = in_one_process(Precision(compute="float16"), 4, 2.0**20)
    for told in run_distributed(on_processes, 2, "dp=2|ep=2", Precision(compute="float16"), 1, 4, 2.0**20):
        for ours, theirs in zip(told, wanted, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=1e-2) and ours[2] == theirs[2]
            assert ours[1] == pytest.approx(theirs[1], rel=1e-2, nan_ok=True)


class Layers(nn.Module):
    """Layers, the first weights of which every rank has: a loss of [b, 8]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(*(part for _ in range(3) for part in self.parts())) for _ in range(4))

    def parts(self) -> tuple[nn.Module, ...]:
        return nn.LayerNorm(8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def with_an_infinity(text: str, name: str) -> tuple[bool, float]:
    """Whether this rank's weights stay as they are when the last rank alone has an infinite gradient; and the next scale."""
    mesh, options = foldcc.FoldedMesh.parse(text, device_type="cpu"), {"micro_batches": 2} if "pp" in text else {}
    x, policy = torch.randn(4, 8), Precision(compute="float16")
    model = foldcc.parallelize(Layers(), mesh, example_inputs=(x,), precision=policy, verify=False, **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(x)).backward()
    if dist.get_rank() == dist.get_world_size() - 1:
        model.get_parameter(name).grad.to_local()[-1] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    return all(torch.equal(p.to_local(), before[n].to_local()) for n, p in model.named_parameters()), scaler.get_scale()


@pytest.mark.parametrize("text", ["tp=2", "pp=2"])
def test_where_one_rank_has_an_infinite_gradient_no_rank_takes_the_step(text: str) -> None:
    assert run_distributed(with_an_infinity, 2, text, "layers.3.1.weight") == [(True, 2.0)] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "error"), [(Precision(), 1e-2), (None, 1e-4)], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("mesh", MESHES)
def test_training_follows_that_of_one_process(mesh: str, precision: Precision | None, error: float) -> None:
    wanted = in_one_process(precision, 200)
    assert wanted[-1][0] < 0.5 * wanted[0][0]
    for told in run_distributed(on_processes, 4, mesh, precision, 3, 200, None, timeout=500):
        for ours, theirs in zip(told, wanted, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=error)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mesh", "zero"), [("mixtral", MESHES[0], 3), ("llama", "dp=2,tp=2", 0)])
def test_kernels_compute_in_the_same_dtypes(family: str, mesh: str, zero: int) -> None:
    plain = tiny_model(family, num_hidden_layers=1, **ALL[family])
    policy = Precision(compute="float16")  # Triton's interpreter is wrong in bfloat16
    wanted = gradients(folded(plain, mesh, policy, zero=zero))
    found = gradients(folded(plain, mesh, policy, zero=zero, kernels="triton"))
    least = 0.1 * max(float(g.norm()) for g in wanted.values())
    for name, gradient in found.items():
        assert relative_error(gradient, wanted[name], least) < 4 * torch.finfo(torch.float16).eps, name
