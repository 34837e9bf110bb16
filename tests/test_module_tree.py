"""A folded module is a module: what one does with a module means what it means, or is refused by name."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import foldcc
from foldcc.errors import FoldError
from foldcc.mesh import FoldedMesh
from foldcc.module import FoldedModule
from foldcc.testing import run_distributed
from foldcc.testing.equivalence import relative_error
from tests.versions import joins_blocks

MESH = "dp=2,tp=2|ep=2,etp=2"


class Mixer(nn.Module):
    """A tied weight, a norm, a buffer, a constant that is no buffer, and a switch that forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.randn(16), persistent=False)
        self.constant = torch.randn(16)
        self.switch, self.config = 1, object()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.norm(self.first(x)) + self.shift) * self.switch
        return y + self.constant.to(x.dtype)


def activations(batch: int = 4) -> Tensor:
    return torch.randn(batch, 8, 16, generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """How far rounding goes depends on what is drawn, and that must not depend on the tests before."""
    torch.manual_seed(0)


def assert_the_same(folded: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Output and every gradient, in the dtype that both have, by norm: a sum over ranks rounds in another order."""
    folded.zero_grad(), model.zero_grad()
    found, wanted = folded(x), model(x)
    assert found.dtype == wanted.dtype
    found.square().sum().backward(), wanted.square().sum().backward()
    results, right = {"output": found, **gradients(folded)}, {"output": wanted, **gradients(model)}
    assert results.keys() == right.keys()
    for name, value in right.items():
        assert relative_error(results[name], value) <= 2 * torch.finfo(value.dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_dtype_given_afterwards_is_the_dtype_of_the_programs_that_follow(dtype: torch.dtype) -> None:
    model, x = Mixer(), activations()
    folded = foldcc.parallelize(model, "dp=2", example_inputs=(x,))
    held = dict(model.named_parameters())
    folded.to(dtype)
    folded(x.to(dtype))
    assert all(p is held[name] and p.dtype == torch.float32 for name, p in model.named_parameters())
    assert_the_same(folded, model.to(dtype), x.to(dtype))
    assert_the_same(folded.float(), model.float(), x)


def test_the_tree_keeps_classes_attributes_and_what_is_shared() -> None:
    model = nn.Sequential(Mixer(), Shared())
    folded = foldcc.parallelize(model, MESH)
    assert {name: type(m) for name, m in folded.named_modules() if name} == {n: type(m) for n, m in model.named_modules() if n}
    inner = folded.get_submodule("0")
    assert isinstance(inner, Mixer) and inner.norm.eps == model[0].norm.eps and inner.config is model[0].config
    assert folded.get_submodule("1.twice") is folded.get_submodule("1.once")
    assert inner.first.weight is inner.second.weight is not model[0].first.weight


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.once = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
        self.twice = self.once

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.twice(self.once(x))
        return y


def test_hooks_of_the_folded_module_and_of_its_gradients_are_called() -> None:
    folded, seen = foldcc.parallelize(Mixer(), "dp=2", example_inputs=(activations(),)), []
    folded.register_forward_hook(lambda m, i, o: seen.append("forward"))
    folded.register_full_backward_hook(lambda m, i, o: seen.append("backward"))
    folded.norm.weight.register_hook(lambda g: g * 2)
    folded.norm.bias.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    model = Mixer()
    model.load_state_dict(folded.state_dict())
    folded(activations()).square().sum().backward()
    assert {"forward", "backward", (16,)} == set(seen)


def test_a_gradient_hook_of_the_original_is_refused() -> None:
    model = Mixer()
    model.norm.weight.register_hook(lambda g: g * 2)
    with pytest.raises(FoldError, match=r"Parameter norm\.weight has a gradient hook"):
        foldcc.parallelize(model, "dp=2")


def test_an_attribute_that_is_set_afterwards_is_refused_by_name() -> None:
    x = activations()
    folded = foldcc.parallelize(nn.Sequential(Mixer()), "dp=2", example_inputs=(x,))
    folded.get_submodule("0").switch = 2
    with pytest.raises(FoldError, match=r"0 \(Mixer\) is not what it was when the model was folded: switch"):
        folded(x)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_that_was_made_before_folding_is_noticed(optimizer: type[torch.optim.Optimizer]) -> None:
    model, x = Mixer(), activations()
    before = optimizer(model.parameters(), lr=1e-3)
    folded = foldcc.parallelize(model, "dp=2", example_inputs=(x,))
    before.step()  # nobody has a gradient
    folded(x).sum().backward()
    with pytest.raises(FoldError, match=rf"{optimizer.__name__} was made before parallelize: its 5 parameters are"):
        before.step()
    optimizer(folded.parameters(), lr=1e-3).step()
    model(x).sum().backward()  # the original may be trained beside it
    before.step()


def test_a_parametrization_is_folded() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), activations()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    assert_the_same(foldcc.parallelize(model, "dp=2,tp=2", example_inputs=(x,)), model, x)


def copied(folded: nn.Module) -> nn.Module:
    return copy.deepcopy(folded)


def pickled(folded: nn.Module) -> nn.Module:
    found: nn.Module = pickle.loads(pickle.dumps(folded))
    return found


def saved(folded: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


def averaged(folded: nn.Module) -> nn.Module:
    return AveragedModel(folded)


@pytest.mark.parametrize("way", [copied, pickled, saved, averaged])
def test_a_copy_has_parameters_of_its_own_and_computes_the_same(way: Callable[[nn.Module], nn.Module]) -> None:
    model, x = nn.Sequential(Mixer()), activations()
    folded = foldcc.parallelize(model, "dp=2,tp=2", example_inputs=(x,))
    other = way(folded)
    inner = other.get_submodule("module.0" if way is averaged else "0")
    assert isinstance(inner, Mixer) and inner.first.weight is inner.second.weight
    with torch.no_grad():
        folded.get_submodule("0").norm.weight.mul_(3)
    assert_the_same(other, model, x)
    assert all(p.grad is None for p in folded.parameters())
    inner.switch = 2
    with pytest.raises(FoldError, match="switch"):
        other(x)


class Library(Mixer):
    """What models of libraries have besides a forward."""

    kind = "mixer"

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def get_norm(self) -> nn.Module:
        return self.norm

    def generate(self, x: Tensor) -> Tensor:
        return self(x)


def test_what_the_original_has_is_read_from_the_folded_model_or_refused_with_words() -> None:
    model = Library()
    folded = foldcc.parallelize(model, "dp=2")
    assert folded.config is model.config and folded.kind == "mixer" and folded.switch == 1
    folded.double()
    assert folded.dtype == torch.float64 and model.dtype == torch.float32 and folded.device.type == "cpu"
    assert folded.get_norm() is folded.norm is not model.norm
    with pytest.raises(FoldError, match="generate is a method of Library, and would run or change the original"):
        folded.generate(activations())
    assert not hasattr(folded, "generate") and not hasattr(folded, "nothing")
    with pytest.raises(FoldError, match="switch is an attribute of Library"):
        folded.switch = 2
    folded.note = "mine"
    assert folded.note == "mine" and not hasattr(model, "note")


def test_embeddings_of_a_library_s_model_are_the_folded_ones() -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    folded = FoldedModule(
        model, FoldedMesh.parse("dp=2"), tracer="export", kernels="auto", pipeline=(), verified=False, progress=print
    )
    assert folded.get_input_embeddings() is folded.model.embed_tokens is not model.model.embed_tokens
    assert folded.get_output_embeddings() is folded.lm_head and folded.base_model is folded.model
    assert folded.num_parameters() == model.num_parameters() and folded.config is model.config
    for name in ("generate", "push_to_hub", "resize_token_embeddings", "gradient_checkpointing_enable"):
        with pytest.raises(FoldError, match=f"{name} is a method of LlamaForCausalLM"):
            getattr(folded, name)


def test_buffers_that_no_state_dict_holds_are_right_after_meta_or_it_is_an_error_to_run() -> None:
    model, x = Mixer(), activations()
    with torch.device("meta"):
        on_meta = Mixer()
    folded = foldcc.parallelize(on_meta, "dp=2")
    with pytest.raises(FoldError, match=r"weight is on meta and has no values"):
        folded._places.local("first.weight", folded.first.weight)
    folded.to_empty(device="cpu").load_state_dict(model.state_dict())
    with pytest.raises(FoldError, match=r"Buffer shift has no values: to_empty left it"):
        folded(x)
    with pytest.raises(FoldError, match=r"Buffer shift has no values"):
        copy.deepcopy(folded).double()(x)
    folded.shift.copy_(model.shift)
    with pytest.raises(FoldError, match=r"uses a tensor of shape \[16\] that is no buffer, is on meta"):
        folded(x)

    partly = Mixer()
    partly.load_state_dict(model.state_dict())
    partly.shift.copy_(model.shift)
    partly.constant = model.constant
    folded = foldcc.parallelize(partly, "dp=2")
    folded.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert_the_same(folded, model, x)


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_state_dict_is_loaded_right(assign: bool) -> None:
    model, x, given = Mixer(), activations(), Mixer()
    folded = foldcc.parallelize(model, "dp=2,tp=2", example_inputs=(x,))
    folded.load_state_dict(given.state_dict(), assign=assign)
    model.load_state_dict(given.state_dict())
    assert_the_same(folded, model, x)


def loaded_on_processes(text: str) -> list[str]:
    """The parameters that differ, of a plain state dict that was copied or assigned, and after `.to` and deepcopy."""
    x = activations(2)
    wrong = []
    for assign in (False, True):
        torch.manual_seed(1)
        model, given = Gated(), Gated()
        folded = foldcc.parallelize(model, foldcc.FoldedMesh.parse(text, "cpu"), example_inputs=(x,))
        folded.load_state_dict(given.state_dict(), assign=assign)
        for other in (folded, copy.deepcopy(folded), folded.double()):
            wanted = given.to(other.up.dtype)
            output = other(x.to(other.up.dtype))
            torch.testing.assert_close(output, wanted(x.to(other.up.dtype)))
            wrong += [n for n, p in other.named_parameters() if not torch.equal(p.full_tensor(), wanted.get_parameter(n))]
    try:
        folded.up = nn.Parameter(given.up.detach())
        folded(x.double())
    except FoldError as error:
        return [*wrong, error.message]
    return wrong


class Gated(nn.Module):
    """A weight that tp divides in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(32, 16) / 4), nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (x @ self.up.T).chunk(2, -1)
        return torch.sigmoid(gate) * up @ self.down


@joins_blocks
def test_a_plain_state_dict_is_loaded_right_on_processes() -> None:
    ranks = run_distributed(loaded_on_processes, 2, "tp=2")
    assert ranks == [["Parameter up was replaced by a plain tensor."]] * 2


# --- the original ------------------------------------------------------------------------------------------------------


def test_the_weights_of_a_model_that_is_dropped_are_not_kept_alive_and_its_next_shape_is_compiled() -> None:
    model, x = nn.Sequential(Mixer(), nn.Linear(16, 16)), activations()
    plain = copy.deepcopy(model)
    folded = foldcc.parallelize(model, "dp=2,tp=2", example_inputs=None)
    assert_the_same(folded, plain, x)
    dropped = [weakref.ref(y) for y in (model, *model.parameters())]
    del model
    gc.collect()
    assert all(y() is None for y in dropped)
    assert_the_same(folded, plain, x[:, :4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert folded(x).dtype == plain(x).dtype == torch.bfloat16


def test_what_a_model_holds_besides_modules_is_neither_copied_nor_kept_from_the_original() -> None:
    model, x, recorder = nn.Sequential(Mixer()), activations(), Recorder()
    model[0].held = {"lock": recorder.lock, "tensor": (model[0].first.weight * 1).detach()}
    model[0].register_forward_hook(recorder.record)
    folded = foldcc.parallelize(model, "dp=2,tp=2", example_inputs=(x,))
    folded(x)
    assert recorder.seen == 1


class Recorder:
    """Nothing that can be copied."""

    def __init__(self) -> None:
        self.lock, self.seen = threading.Lock(), 0

    def record(self, *args: object) -> None:
        self.seen += 1


class Closing(nn.Module):
    """A function, a method and a part of one that refer to the module's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.function, self.method, self.part = lambda x: self.a(x), self.b.forward, functools.partial(self.c.forward)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x) + torch.relu(self.method(x)) * self.part(x)
        return y


class Helper:
    """An object that is no module and calls one."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


@pytest.mark.parametrize("function", ["closure", "in a list", "helper", "partial of a helper", "none of its own"])
def test_functions_that_a_module_holds_call_its_own_layers(function: str) -> None:
    model, x = Closing().double(), activations().double()
    plain, helper = model, Helper(model.a)
    if function == "in a list":
        model.function, model.functions = helper, [model.function]
    elif function != "closure":
        one = functools.partial(nn.functional.linear, weight=torch.eye(16, dtype=torch.float64))
        model.function = {"helper": helper, "partial of a helper": functools.partial(helper), "none of its own": one}[function]
    folded = foldcc.parallelize(model, "dp=2,tp=2", example_inputs=None)
    for length in (8, 4):
        assert_the_same(folded, plain, x[:, :length])
