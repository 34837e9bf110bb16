"""PyTorch's switches at a call: what is captured follows them, and what is compiled does not depend on them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock

import torch
from torch.random import fork_rng

_COMPILES = RLock()


@dataclass(frozen=True)
class Modes:
    """The switches that decide which program a call runs.

    Attributes:
        grad: gradients are recorded.
        autocast: the dtype to which operators cast on the program's device; None without autocast.
    """

    grad: bool
    autocast: torch.dtype | None

    @classmethod
    def now(cls, device: torch.device) -> Modes:
        casts = torch.is_autocast_enabled(device.type)
        return cls(torch.is_grad_enabled(), torch.get_autocast_dtype(device.type) if casts else None)

    def __str__(self) -> str:
        off = "" if self.grad else ", without gradients"
        return off if self.autocast is None else f"{off}, under autocast to {self.autocast}"


@contextmanager
def traceable() -> Iterator[None]:
    """Without inference mode, whose tensors cannot be traced; whether gradients are recorded is as before."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


@contextmanager
def compiling() -> Iterator[None]:
    """Whatever the caller's switches are, passes trace and prove with gradients and without autocast.

    And whenever that is, the caller's models draw the same random numbers.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch._C._DisableAutocast(), fork_rng(devices=[]):
        yield


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """One thread compiles at a time: capture, tracing and proofs change what PyTorch's functions are.

    Hooks on tensors that are saved, such as those of a checkpoint around the call, see nothing of it.
    Garbage is collected afterwards: what is compiled refers to itself all over, so that looking for garbage finds little, and
    looks at all of it each time.
    """
    with _COMPILES, torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x
