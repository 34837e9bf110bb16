"""Hooks on modules inside a folded model see what they see in one process, in the order of one process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_model, token_batch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import foldcc
from foldcc.errors import FoldError
from foldcc.testing import in_float64, run_distributed
from foldcc.testing.equivalence import relative_error

MESH = "dp=2,tp=2|ep=4"


class Log:
    """What hooks were called with: (module, kind, tensors)."""

    def __init__(self, model: nn.Module, paths: list[str], *, backward: bool = True) -> None:
        self.calls: list[tuple[str, str, list[Any]]] = []
        self.handles = []
        for path in paths:
            module = model.get_submodule(path)
            self.handles += [
                module.register_forward_pre_hook(self.watch(path, "enters"), with_kwargs=True),
                module.register_forward_hook(self.watch(path, "leaves")),
            ]
            if backward:
                self.handles += [
                    module.register_full_backward_pre_hook(self.watch(path, "gradient enters")),
                    module.register_full_backward_hook(self.watch(path, "gradient leaves")),
                ]

    def watch(self, path: str, kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, *given: Any) -> None:
            # A mask is what it is made of in a folded model.
            leaves = [x for k, x in pytree.tree_leaves_with_path(given) if "attention_mask" not in pytree.keystr(k)]
            assert not any(isinstance(x, torch._subclasses.FakeTensor) for x in leaves)
            self.calls.append((path, kind, [whole(x).detach().clone() for x in leaves if isinstance(x, Tensor)]))

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_alike(found: Log, wanted: Log, *, within: float = 1e-12) -> None:
    assert [c[:2] for c in found.calls] == [c[:2] for c in wanted.calls]
    for (path, kind, mine), (_, _, theirs) in zip(found.calls, wanted.calls, strict=True):
        assert len(mine) == len(theirs), (path, kind)
        for x, y in zip(mine, theirs, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype), (path, kind)
            assert x.equal(y) if not x.is_floating_point() else relative_error(x, y) <= within, (path, kind)
    found.calls.clear(), wanted.calls.clear()


class Layer(nn.Module):
    """A residual branch, in a checkpoint if it is asked for."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        def branch(x: Tensor) -> Tensor:
            y: Tensor = self.down(torch.relu(self.up(self.norm(x))))
            return y

        y = checkpoint(branch, x, use_reentrant=False) if self.checkpointed else branch(x)
        return x + y * scale, y


class Stack(nn.Module):
    def __init__(self, layers: int = 2, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(checkpointed) for _ in range(layers))
        self.shared = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(self.shared(x), scale=0.5)
        return x


PATHS = ["layers.1", "layers.1.up", "shared"]  # of one of two layers, one inside another, and one that is called twice


def sample(batch: int = 4, length: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_what_they_see_in_one_process(when: str) -> None:
    model = Stack().double()
    reference = copy.deepcopy(model)
    if when == "before":
        found = Log(model, PATHS)
        folded = foldcc.parallelize(model, "dp=2,tp=2")
    else:
        folded = foldcc.parallelize(model, "dp=2,tp=2", example_inputs=(sample(),))
        step(folded, sample())
        with pytest.warns(UserWarning, match=r"compiled, for hooks on layers\.1 \(arguments by name, gradients\)"):
            found = Log(folded, PATHS)
            step(folded, sample())
        found.calls.clear()
    wanted = Log(reference, PATHS)
    for x in (sample(), sample(), sample(2, 4)):
        mine, theirs = step(folded, x), step(reference, x)
        assert_alike(found, wanted)
        assert mine.keys() == theirs.keys() and all(relative_error(mine[n], g) <= 1e-12 for n, g in theirs.items())
    with torch.no_grad():
        folded(sample()), reference(sample())
    assert_alike(found, wanted)
    found.remove()
    step(folded, sample())
    assert not found.calls and sum("hooks" in text for text in folded.programs) == 3


def family() -> nn.Module:
    model = tiny_model("mixtral", num_hidden_layers=1).double()
    model.config._experts_implementation = "eager"  # it shares no code with the folded program
    return model


LAYER = "model.layers.0"
BLOCKS = [LAYER, f"{LAYER}.mlp", f"{LAYER}.mlp.gate", f"{LAYER}.mlp.experts", "model.embed_tokens", "lm_head"]


def test_hooks_on_a_moe_block_and_around_it_see_what_they_see_in_one_process() -> None:
    model, batch = family(), token_batch(4, 8)
    wanted = Log(reference := family(), BLOCKS)
    with in_float64():
        found = Log(model, BLOCKS)
        folded = foldcc.parallelize(model, MESH, example_inputs=batch)
        for m in (folded, reference):
            m(**batch).loss.backward()
    assert_alike(found, wanted)


def test_hooks_see_bfloat16() -> None:
    model, x = Stack(1).bfloat16(), sample(dtype=torch.bfloat16)
    folded = foldcc.parallelize(model, "dp=2,tp=2", example_inputs=(x,))
    found, wanted = Log(folded, PATHS[2:]), Log(model, PATHS[2:])
    step(folded, x), step(model, x)
    assert_alike(found, wanted, within=2 * torch.finfo(torch.bfloat16).eps)


def test_what_a_hook_makes_of_an_output_is_differentiated() -> None:
    model = Stack(1).double()
    folded = foldcc.parallelize(model, "dp=2,tp=2", example_inputs=(sample(),))
    for m in (folded, model):
        kept: list[Tensor] = []
        log = Log(m, ["layers.0.up"])
        m.get_submodule("layers.0.up").register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
        (m(sample()).square().mean() + kept[0].abs().mean()).backward()
        m.log = log
    assert_alike(folded.log, model.log)
    for (name, p), q in zip(folded.named_parameters(), model.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) <= 1e-12, name


def test_hooks_inside_a_checkpoint_are_called_in_the_forward() -> None:
    model, x = Stack(1, checkpointed=True).double(), sample()
    folded = foldcc.parallelize(model, "dp=2", example_inputs=(x,))
    found, wanted = (Log(m, ["layers.0.up"], backward=False) for m in (folded, model))
    step(folded, x), step(model, x)
    assert len(wanted.calls) == 4  # the original computes again in the backward, a program does not
    del wanted.calls[2:]
    assert_alike(found, wanted)


def in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.detach().mul_(2)


CHANGES = {
    "returned something": ("forward_hook", lambda m, args, output: output * 2),
    "changed a tensor in place": ("forward_hook", in_place),
    "returned something ": ("forward_pre_hook", lambda m, args: (args[0] * 2,)),
    "returned something  ": ("full_backward_hook", lambda m, entering, leaving: (leaving[0],)),
    "returned something   ": ("full_backward_pre_hook", lambda m, leaving: (leaving[0] * 2,)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_hook_that_would_change_a_value_is_an_error_that_names_it(what: str) -> None:
    register, hook = CHANGES[what]
    folded = foldcc.parallelize(Stack(1), "dp=2")
    getattr(folded.get_submodule("layers.0.norm"), f"register_{register}")(hook)
    with pytest.raises(FoldError, match=rf"hook test_hooks\.\S+ on layers\.0\.norm \(LayerNorm\) {what.strip()}"):
        folded(sample(dtype=torch.float32)).sum().backward()


def test_hooks_that_ask_for_what_a_program_has_not_are_refused_by_name() -> None:
    def watch(*_: object) -> None: ...

    model = Stack(1)
    handle = model.layers[0].norm.register_forward_hook(watch, always_call=True)
    with pytest.raises(FoldError, match=r"layers\.0\.norm \(LayerNorm\) has a forward hook, .*watch, which is to be"):
        foldcc.parallelize(model, "dp=2")
    handle.remove()
    folded = foldcc.parallelize(model, "dp=2")
    folded.get_submodule("shared").register_backward_hook(watch)
    with pytest.raises(FoldError, match=r"shared \(Linear\) has a backward hook, .*watch, which is of the kind"):
        folded(sample(dtype=torch.float32))


def test_hooks_that_dynamo_would_not_see_are_refused_by_name() -> None:
    model = Stack(1)
    model.shared.register_forward_hook(lambda *_: None)
    with pytest.raises(FoldError, match="Dynamo does not see hooks, and there are some on shared"):
        foldcc.parallelize(model, "dp=2", example_inputs=(sample(dtype=torch.float32),), capture="dynamo")


def test_a_hook_on_what_the_captured_forward_does_not_call_is_announced() -> None:
    model = tiny_model("mixtral", num_hidden_layers=1)
    model.model.layers[0].mlp.experts.act_fn.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"does not call model\.layers\.0\.mlp\.experts\.act_fn \(SiLU"):
        foldcc.parallelize(model, "dp=2", example_inputs=token_batch(2, 4))


def test_activation_statistics_of_every_module() -> None:
    """The script that users have: means of every module's output, by name, in evaluation, with a copy of the model besides."""
    model, x = Stack(2).double(), sample()
    seen: dict[nn.Module, dict[str, float]] = {}

    def statistics(of: nn.Module) -> None:
        for name, module in of.named_modules():
            if not list(module.children()):
                module.register_forward_hook(
                    lambda m, args, output, name=name, of=of: seen.setdefault(of, {}).update({name: output.mean().item()})
                )

    folded = foldcc.parallelize(model, "dp=2,tp=2")
    statistics(folded), statistics(model)
    model.eval(), folded.eval()
    with torch.no_grad():
        for m in (folded, model):
            m(x)
    assert seen[folded].keys() == seen[model].keys() and len(seen[model]) == 7
    assert all(abs(seen[folded][name] - mean) <= 1e-14 for name, mean in seen[model].items())


def test_a_hook_on_the_model_itself_goes_on_to_the_folded_model_and_is_removed_by_its_handle() -> None:
    model, calls = Stack(1), []
    handles = [
        model.register_forward_hook(lambda *_: calls.append("model")),
        model.shared.register_forward_hook(lambda *_: calls.append("shared")),
    ]
    folded, x = foldcc.parallelize(model, "dp=2", example_inputs=(sample(dtype=torch.float32),)), sample(dtype=torch.float32)
    assert not calls
    folded(x)
    assert calls == ["shared", "model"]
    for handle in handles:
        handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folded(x)
    assert calls == ["shared", "model"]


def hooked_on_a_rank(text: str) -> list[tuple[str, str, list[Tensor]]]:
    mesh = foldcc.FoldedMesh.parse(text, "cpu")
    torch.manual_seed(1)
    model, x = Stack(1).double(), sample().chunk(mesh.size("dp"))[mesh.coordinate(dist.get_rank(), "dp")]
    log = Log(model, PROCESSES)
    folded = foldcc.parallelize(model, mesh, example_inputs=(x,))
    step(folded, x)
    if dist.get_rank() == 0:
        folded.get_submodule("layers.0.norm").register_forward_hook(lambda *_: None)
    try:
        folded(x)
    except FoldError as error:
        log.calls.append(("error", str(error), []))
    return log.calls


PROCESSES = ["layers.0", "layers.0.up", "shared"]


def test_hooks_on_processes_see_this_ranks_samples_and_are_the_same_on_every_rank() -> None:
    mesh = foldcc.FoldedMesh.parse("dp=2,tp=2")
    ranks = run_distributed(hooked_on_a_rank, mesh.world_size, str(mesh), timeout=400)
    torch.manual_seed(1)
    model = Stack(1).double()
    wanted = Log(model, PROCESSES)
    step(model, sample())
    for rank, (*calls, (error, text, _)) in enumerate(ranks):
        assert error == "error" and "hooks on layers.0 (arguments by name, gradients)" in text and "layers.0.norm" in text
        found, own = Log(model, []), Log(model, [])
        position = mesh.coordinate(rank, "dp")
        found.calls = calls
        own.calls = [(path, kind, [x.chunk(mesh.size("dp"))[position] for x in given]) for path, kind, given in wanted.calls]
        assert_alike(found, own)
