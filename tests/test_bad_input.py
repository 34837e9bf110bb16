"""What does not fit together is an error at the earliest moment, with the numbers, and leaves the model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import foldcc
import foldcc.ops
from foldcc import FoldError
from foldcc.ir.pipeline import check_contracts
from foldcc.mesh import FoldedMesh
from foldcc.passes.annotate import UnknownOperator
from foldcc.testing import check_equivalence
from tests.models import tiny_model, token_batch


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


def activations(batch: int = 4, length: int = 8) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(0))


def fold(model: nn.Module, mesh: str, *, example_inputs: Any = None, **options: Any) -> foldcc.FoldedModule:
    given = token_batch(4) if example_inputs is None else example_inputs
    return foldcc.parallelize(model, FoldedMesh.parse(mesh), example_inputs=given, **options)


@contextmanager
def refused(model: nn.Module, message: str, **facts: str) -> Iterator[None]:
    """The body raises a FoldError whose first line matches, whose facts contain what is said, and changes nothing."""
    before = [(name, p, p._version) for name, p in model.named_parameters()], [m.training for m in model.modules()]
    with pytest.raises(FoldError) as caught:
        yield
    assert re.search(message, caught.value.message), caught.value
    for name, text in facts.items():
        assert text in str(caught.value.facts[name]), caught.value
    now = [(name, p, p._version) for name, p in model.named_parameters()], [m.training for m in model.modules()]
    assert all(a is b and v == w for (_, a, v), (_, b, w) in zip(before[0], now[0], strict=True))
    assert before[1] == now[1]


class Sized(nn.Module):
    """Attention with any number of heads, and experts of any number and width."""

    def __init__(self, *, heads: int = 4, kv_heads: int = 4, experts: int = 4, width: int = 8):
        super().__init__()
        self.heads, self.q, self.out = heads, nn.Linear(16, heads * 4), nn.Linear(heads * 4, 16)
        self.k, self.v = (nn.Linear(16, kv_heads * 4, bias=False) for _ in range(2))
        self.router, self.up, self.down = weight(experts, 16), weight(experts, width, 16), weight(experts, 16, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        tokens = self.out(y.transpose(1, 2).flatten(2)).flatten(0, 1)
        weights, ids = F.linear(tokens, self.router).softmax(-1).topk(2)
        y = foldcc.ops.experts(tokens, ids, weights, self.up, self.down, activation_fn=F.silu)
        return y.view_as(x)


# --- sizes that do not divide -----------------------------------------------------------------------------------------


def test_experts_that_do_not_divide_over_ep() -> None:
    model = Sized(experts=6)
    with refused(model, r"6 experts do not divide over ep=4 \(6 = 1 \* 4 \+ 2\)", mesh="dp=2,tp=2|ep=4", valid="ep: 1, 2"):
        fold(model, "dp=2,tp=2|ep=4", example_inputs=(activations(),))


def test_expert_width_that_does_not_divide_over_etp() -> None:
    model = Sized(width=6)
    with refused(model, r"6 columns of each expert do not divide over etp=4 \(6 = 1 \* 4 \+ 2\)", valid="etp: 1, 2, 3"):
        fold(model, "dp=2,tp=2|etp=4", example_inputs=(activations(),))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "numbers", "valid"),
    [
        (6, 6, 4, "6 attention heads, 1 to each of 6 key/value heads, do not divide over tp=4", "tp: 1, 2, 3, 6"),
        (6, 2, 4, "6 attention heads, 3 to each of 2 key/value heads, do not divide over tp=4", "tp: 1, 2, 3, 6"),
    ],
)
def test_heads_that_do_not_divide_over_tp(heads: int, kv_heads: int, tp: int, numbers: str, valid: str) -> None:
    model = Sized(heads=heads, kv_heads=kv_heads)
    with refused(model, re.escape(numbers), mesh=f"tp={tp}", valid=valid):
        fold(model, f"tp={tp}", example_inputs=(activations(),))


def test_a_batch_that_does_not_divide_over_dp() -> None:
    model = Sized()
    with refused(model, r"5 samples do not divide over dp=2 \(5 = 2 \* 2 \+ 1\)", valid="multiples of 2"):
        fold(model, "dp=2", example_inputs=(activations(batch=5),))


def test_a_later_batch_that_does_not_divide_over_dp() -> None:
    model = Sized()
    folded = fold(model, "dp=2", example_inputs=(activations(),))
    with refused(model, r"3 samples do not divide over dp=2", valid="multiples of 2"):
        folded(activations(batch=3))


def test_a_sequence_that_does_not_divide_over_tp() -> None:
    model = Sized()
    with refused(model, "tokens of foldcc.experts do not divide over tp=2", valid="a multiple of 2"):
        fold(model, "tp=2|ep=2", example_inputs=(activations(length=7),))


def test_an_empty_batch() -> None:
    model = Sized()
    with refused(model, r"Input \['x'\] is empty: its shape is \[0, 8, 16\]"):
        fold(model, "dp=2", example_inputs=(activations(batch=0),))


# --- meshes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def world_of_eight() -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    torch.distributed.destroy_process_group()


def test_ranks_that_do_not_divide() -> None:
    with pytest.raises(FoldError, match=r"dp\(2\)\*tp\(2\)=4 ranks, but moe ep\(3\)=3 does not divide 4"):
        FoldedMesh.parse("dp=2,tp=2|ep=3")


@pytest.mark.usefixtures("world_of_eight")
def test_a_mesh_larger_than_the_world() -> None:
    with pytest.raises(FoldError, match="mesh needs 16 ranks, the world has 8"):
        foldcc.init_folded_mesh("cpu", attention={"dp": 16})


def test_an_unknown_axis() -> None:
    with pytest.raises(FoldError, match=r"unknown axis 'sp'[^$]*pp, dp_replicate, dp, cp, tp"):
        foldcc.init_folded_mesh("virtual", attention={"sp": 2})


@pytest.mark.usefixtures("world_of_eight")
@pytest.mark.parametrize(("experts", "ep"), [(8, 8), (12, 4), (6, 2), (9, 1)])
def test_a_plain_mesh_gets_as_much_ep_as_divides_the_experts(experts: int, ep: int) -> None:
    plain = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    folded = foldcc.parallelize(Sized(experts=experts), plain, example_inputs=(activations(),))
    assert folded.mesh == foldcc.init_folded_mesh("cpu", attention={"dp": 4, "tp": 2}, moe={"ep": ep})


@pytest.mark.usefixtures("world_of_eight")
def test_a_plain_mesh_needs_inputs_to_choose_ep() -> None:
    model, plain = Sized(), init_device_mesh("cpu", (8,), mesh_dim_names=("dp",))
    with refused(model, "How many experts the model has is read off its graph", valid="example_inputs"):
        foldcc.parallelize(model, plain)


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_without_parameters() -> None:
    model = nn.Sequential(nn.ReLU())
    with refused(model, "Sequential has no parameters"):
        fold(model, "dp=2", example_inputs=(activations(),))


def test_what_is_no_module() -> None:
    with pytest.raises(FoldError, match="parallelize takes an nn.Module, not dict"):
        foldcc.parallelize({}, FoldedMesh.parse("dp=2"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrap", "done", "inside"),
    [(nn.DataParallel, "parallel", ".module"), (torch.compile, "compiled", "._orig_mod")],
    ids=["data parallel", "compiled"],
)
def test_a_model_that_is_wrapped_already(wrap: Any, done: str, inside: str) -> None:
    model = wrap(nn.Linear(16, 16))
    with refused(model, f"is {done} already", valid=inside):
        fold(model, "dp=2", example_inputs=(activations(),))
    layers = nn.Sequential(nn.Linear(16, 16), model)
    with refused(layers, f"1 \\(.*\\) is {done} already", valid=inside):
        fold(layers, "dp=2", example_inputs=(activations(),))


def test_a_model_that_is_folded_already() -> None:
    folded = foldcc.parallelize(nn.Linear(16, 16), "dp=2")
    for model in (folded, nn.Sequential(folded)):
        with pytest.raises(FoldError, match="(?s)is folded already, or has a folded module inside.*the original model"):
            foldcc.parallelize(model, "dp=2")


def test_a_model_in_a_wrapper_of_processes() -> None:
    model = object.__new__(nn.parallel.DistributedDataParallel)  # which wants a process group
    nn.Module.__init__(model)
    model.module = nn.Linear(16, 16)
    with refused(model, "The model \\(DistributedDataParallel\\) is parallel already", valid=".module"):
        fold(model, "dp=2", example_inputs=(activations(),))


def test_a_model_of_quantised_weights() -> None:
    model = nn.Linear(16, 16)
    model.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    with refused(model, "Parameter weight holds int8, as quantised weights do", valid="before it is quantised"):
        fold(model, "dp=2", example_inputs=(activations(),))


def test_another_forward_of_a_folded_model() -> None:
    folded = fold(nn.Linear(16, 16), "dp=2", example_inputs=(activations(),))
    with refused(folded, "would run the modules instead", valid="on the model before parallelize"):
        folded.forward = activations
    folded.forward = torch.autocast("cpu", dtype=torch.bfloat16)(folded.forward)  # as Accelerate does
    assert folded(activations()).dtype == torch.bfloat16


@pytest.mark.usefixtures("world_of_eight")
def test_a_model_on_dtensors() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.Linear(16, 16)
    plain = init_device_mesh("cpu", (8,), mesh_dim_names=("dp",))
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), plain, [Shard(0)]))
    with refused(model, "Parameter weight is a DTensor", valid="before any fully_shard"):
        fold(model, "dp=2", example_inputs=(activations(),))


class Forward(nn.Module):
    """A linear layer in the hands of a function."""

    def __init__(self, function: Any):
        super().__init__()
        self.linear, self.function = nn.Linear(16, 16), function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(self, self.linear(x))
        return y


def _loop(model: nn.Module, y: Tensor) -> Tensor:
    chosen = y.argmax(-1)
    found = torch.zeros_like(y)
    for expert in range(4):
        rows = torch.where(chosen == expert)
        found = found.index_put(rows, y[rows] * expert)
    return found


def _autocast(model: nn.Module, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return y @ y.transpose(1, 2)


def _dropping(model: nn.Module, y: Tensor) -> Tensor:
    tokens = y.flatten(0, 1)
    weights, chosen = tokens.softmax(-1).topk(2)
    w = torch.ones(tokens.shape[1], 4, tokens.shape[1])
    return foldcc.ops.experts(tokens, chosen, weights, w, w.transpose(1, 2), activation_fn=lambda rows: F.dropout(rows, 0.1))


UNCAPTURABLE = {
    "a loop over experts": (_loop, "depends on the values in a tensor"),
    "a condition": (lambda model, y: y if y.sum() > 0 else -y, "depends on the values in a tensor"),
    "torch.cond": (
        lambda model, y: torch.cond(y.sum() > 0, lambda y: y + 1, lambda y: y - 1, (y,)),
        "control flow depends on the values in a tensor, through torch.cond",
    ),
    "a number": (lambda model, y: y * y.sum().item(), "aten.item.default is a number, which depends"),
    "random counts": (lambda model, y: torch.poisson(y.exp()), "with aten.poisson.default, whose numbers are not"),
    "counts of all there are": (lambda model, y: y.sum() * torch.bincount(y.argmax(-1).flatten()), "The largest number in a"),
    "counts that weigh": (lambda model, y: torch.bincount(y.argmax(-1)[0], y[0, :, 0], 16), "no gradient for its weights"),
    "a large range": (lambda model, y: y + torch.randint(2**30, (1,)), "draws random numbers with aten.randint.default, from"),
    "experts that drop out": (_dropping, "The activation of experts draws random numbers with aten"),
    "autocast": (_autocast, "switches on autocast to torch.bfloat16"),
}


@pytest.mark.parametrize("tracer", ["export", "dynamo"])
@pytest.mark.parametrize("name", UNCAPTURABLE)
def test_a_forward_that_cannot_be_captured(name: str, tracer: str) -> None:
    function, message = UNCAPTURABLE[name]
    model = Forward(function)
    with refused(model, message):
        fold(model, "dp=2", example_inputs=(activations(),), capture=tracer)


def test_the_eager_loop_of_a_library_says_what_to_do() -> None:
    model = Forward(_loop)
    with refused(model, "", at="test_bad_input.py", valid="foldcc.register_experts(cls, fn)"):
        fold(model, "dp=2", example_inputs=(activations(),))


def test_a_token_that_no_rank_has_is_an_error_as_in_one_process() -> None:
    model = tiny_model("llama")
    folded = fold(model, "tp=2", example_inputs=token_batch(4))
    for name in ("input_ids", "labels"):
        for token in (-1, 128):
            batch = token_batch(4)
            batch[name][1, 3] = token
            for called in (model, folded):
                with pytest.raises((IndexError, RuntimeError), match="out of (range|bounds)"):
                    called(**batch)


@pytest.mark.parametrize("mesh", ["dp=2", "tp=2"])
def test_a_batch_without_labels_has_no_loss_and_gradients_of_zero_as_in_one_process(mesh: str) -> None:
    model, batch = tiny_model("llama"), token_batch(4)
    batch["labels"][:] = -100
    folded = fold(model, mesh, example_inputs=batch)
    for called in (model, folded):
        loss = called(**batch).loss
        loss.backward()
        assert bool(loss.isnan()) and all(not p.grad.any() for p in called.parameters())


class Unregistered(nn.Module):
    """A layer in a plain list, which is no child of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.others = nn.Linear(16, 16), [nn.Linear(16, 16)]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.others[0](self.first(x))
        return y


@pytest.mark.parametrize("tracer", ["export", "dynamo"])
def test_a_layer_that_would_not_be_trained(tracer: str) -> None:
    model = Unregistered()
    with refused(model, r"that requires a gradient and is no parameter of it", valid="nn.ModuleList"):
        fold(model, "dp=2", example_inputs=(activations(),), capture=tracer)


# --- attention options of Transformers --------------------------------------------------------------------------------


MASK_4D = torch.ones(4, 1, 16, 16, dtype=torch.bool)

OPTIONS: dict[str, tuple[Any, dict[str, Tensor], str]] = {
    "a whole mask": (lambda: tiny_model("llama"), {"attention_mask": MASK_4D}, r"is bool, of shape \[4, 1, 16, 16\]"),
    "a mask of 3 dims": (lambda: tiny_model("llama"), {"attention_mask": MASK_4D[:, 0]}, r"has shape \[4, 16, 16\]"),
    "a longer mask": (
        lambda: tiny_model("llama"), {"attention_mask": torch.ones(4, 20)}, "a mask of 20 positions for 16 keys",
    ),
}  # fmt: skip


@pytest.mark.parametrize("tracer", ["export", "dynamo"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_attention_that_is_not_carried(name: str, tracer: str) -> None:
    make, inputs, message = OPTIONS[name]
    model = make()
    with refused(model, message):
        fold(model, "dp=2", example_inputs={"input_ids": token_batch(4)["input_ids"], **inputs}, capture=tracer)


class Biased(nn.Module):
    """A library's model whose attention is given a bias for each pair of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model("llama")

    def forward(self, input_ids: Tensor) -> Tensor:
        bias = torch.zeros(1, 4, 16, 16)
        y: Tensor = self.model(input_ids, position_bias=bias).logits
        return y


def test_a_position_bias() -> None:
    model = Biased()
    with refused(model, "LlamaAttention uses position_bias"):
        fold(model, "dp=2", example_inputs=(token_batch(4)["input_ids"],))


def test_an_input_that_no_program_takes() -> None:
    import transformers

    model = tiny_model("llama")
    batch = {**token_batch(4), "past_key_values": transformers.DynamicCache(config=model.config)}
    with refused(model, r"Input \['past_key_values'\] is a DynamicCache"):
        fold(model, "dp=2", example_inputs=batch)


# --- calls and options ------------------------------------------------------------------------------------------------


def test_another_structure_of_inputs_than_it_was_compiled_for() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    batch = token_batch(4)
    folded = fold(model, "dp=2", example_inputs=batch)
    with refused(model, r"called with \['input_ids'\], and was compiled for another structure", compiled="['labels']"):
        folded(input_ids=batch["input_ids"])


def test_a_tracer_that_does_not_exist() -> None:
    model = Sized()
    with refused(model, "There is no tracer 'jit'", valid="export, dynamo"):
        foldcc.parallelize(model, FoldedMesh.parse("dp=2"), capture="jit")


# --- what is unusual and works ----------------------------------------------------------------------------------------


def test_frozen_parameters_get_no_gradient() -> None:
    model = Sized()
    for name in ("q.weight", "up", "out.bias"):
        model.get_parameter(name).requires_grad_(False)
    proof = check_equivalence(model, "dp=2,tp=2|ep=2,etp=2", (activations(),))
    assert not {"q.weight", "up", "out.bias"} & proof.gradients.keys()


def test_an_operator_without_a_rule_works_and_is_named() -> None:
    model = Forward(lambda model, y: y - y.std(0))
    with pytest.warns(UnknownOperator, match="aten.std.dim has no factor rule; its operands are replicated on dp"):
        check_equivalence(model, "dp=2,tp=2", (activations(),))


KINDS: list[tuple[Callable[[nn.Module], object], str]] = [
    (lambda m: foldcc.parallelize(m, None), "mesh is a FoldedMesh, a DeviceMesh, or text"),  # type: ignore[arg-type]
    (lambda m: foldcc.parallelize(m, {"dp": 2}), "not the dict {'dp': 2}"),  # type: ignore[arg-type]
    (lambda m: foldcc.parallelize(m, "dp=2", example_inputs=torch.zeros(4, 8)), "example_inputs is a dict"),  # type: ignore[arg-type]
    (lambda m: foldcc.parallelize(m, "dp=2", example_inputs={"y": torch.zeros(4, 8)}), "missing a required argument: 'input'"),
    (lambda m: foldcc.parallelize(m, "dp=2", batch_dims="x"), "batch_dims is a dict"),  # type: ignore[arg-type]
    (lambda m: foldcc.parallelize(m, "dp=2", batch_dims={"x": True}), "is a dimension, or None, not the bool True"),
    (lambda m: foldcc.parallelize(m, "cp=2", attention=["ring"]), "attention is the name"),  # type: ignore[arg-type]
    (lambda m: foldcc.parallelize(m, "cp=2", order=1), "order is the name"),  # type: ignore[arg-type]
    (lambda m: foldcc.parallelize(m, "dp=2", capture=["export"]), "There is no tracer"),  # type: ignore[arg-type]
    (lambda m: foldcc.parallelize(m, "dp=2", kernels=None), "There are no kernels None"),  # type: ignore[arg-type]
    (lambda m: foldcc.parallelize(m, "dp=2", verify="no"), "verify is True or False, not the str 'no'"),  # type: ignore[arg-type]
    (lambda m: foldcc.parallelize(m, "dp=2", cache="/tmp"), "cache is True or False"),  # type: ignore[arg-type]
    (lambda m: foldcc.parallelize(m, "dp=2", dynamic=None), "dynamic=None is no tuple"),  # type: ignore[arg-type]
    (lambda m: foldcc.parallelize(m, "dp=2", dynamic=[["seq"]]), "is no tuple of sizes"),  # type: ignore[list-item]
    (lambda m: foldcc.parallelize(m, "dp=2", progress=True), "progress is a function"),  # type: ignore[arg-type]
    (lambda m: foldcc.init_folded_mesh("virtual", attention="dp=2"), "attention is a dict"),  # type: ignore[arg-type]
    (lambda m: FoldedMesh.parse(4), "A mesh is text"),  # type: ignore[arg-type]
    (lambda m: foldcc.Plan.parse(None), "A plan is text"),  # type: ignore[arg-type]
    (lambda m: foldcc.Capacity(factor=True), "factor is a number, not the bool"),
    (lambda m: foldcc.Capacity(factor=1.0, pad="no"), "pad is True or False"),  # type: ignore[arg-type]
    (lambda m: foldcc.set_capacity(None, None), "model is an nn.Module"),  # type: ignore[arg-type]
    (lambda m: foldcc.verify(m), "model is a folded one"),  # type: ignore[arg-type]
    (lambda m: foldcc.init_parameters(m, 0), "model is a folded one"),  # type: ignore[arg-type]
    (lambda m: foldcc.clip_grad_norm_(None, 1.0), "parameters is a number of them"),  # type: ignore[arg-type]
    (lambda m: foldcc.clip_grad_norm_([], "1"), "max_norm is a number"),  # type: ignore[arg-type]
    (lambda m: foldcc.register_experts(nn.Linear, None), "a subclass of nn.Module and a function"),  # type: ignore[arg-type]
    (lambda m: foldcc.load_kernels(3), "path is the path of a file"),
    (lambda m: check_contracts([3], frozenset()), "A pass is an instance of a subclass of"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("call", "message"), KINDS)
def test_an_argument_of_another_kind_is_named(call: Callable[[nn.Module], object], message: str) -> None:
    model = nn.Linear(8, 8)
    with refused(model, re.escape(message)):
        call(model)
