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
            leaves = pytree.tree_leaves(given)
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
    def __init__(self, layers: int = 3, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(checkpointed) for _ in range(layers))
        self.shared = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(self.shared(x), scale=0.5)
        return x


PATHS = ["layers.1", "layers.1.up", "layers.0.down", "shared"]


def sample(batch: int = 4, length: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
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
        with pytest.warns(UserWarning, match=r"Another program was compiled, for hooks on layers\.0\.down \(arguments by name, grad"):
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
    assert not found.calls and not folded.program.observed
