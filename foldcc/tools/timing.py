"""Timing: what each candidate takes for the grouped products of a layer of experts, forward and backward, on this GPU.

The kernels of the layer are emitted once for each candidate. Then the layer runs once, and where it calls a grouped product,
every candidate computes that product. One that does not run, computes something else or spills is none.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import foldcc
from foldcc.changed import changed
from foldcc.codegen import source, tiles
from foldcc.codegen.tiles import MANY, Tile
from foldcc.errors import listed
from foldcc.mesh import FoldedMesh
from foldcc.module import FoldedModule
from foldcc.tools.candidates import Candidates
from foldcc.tools.machine_code import SPILLED
from foldcc.tools.moe_layer import SHAPES, TOKENS, example

_TOLERANCE = 2e-2  # of a candidate's result, relative to its norm
_SAMPLE = 2**20  # elements of a result that are compared

Launcher = Callable[..., Any]


def emitted(layer: nn.Module, x: Tensor, mesh: FoldedMesh, tried: Iterable[Tile]) -> Iterator[tuple[Tile, FoldedModule]]:
    """The layer, folded, with the kernels of each tile."""
    folded = foldcc.parallelize(layer, mesh, example_inputs={"x": x}, kernels="triton", verify=False)
    for tile in tried:
        with tiles.using(tiles.chip(), x.dtype.itemsize, many=tile, few=tile, outer=tile):
            other = folded.with_passes()
        yield tile, other


def classes_of(name: str, tokens: int) -> dict[str, str]:
    """The class of tiles that each kind of kernel takes, as its launcher chooses it."""
    _, _, experts, chosen = SHAPES[name]
    return {"grouped_linear": "many" if tokens * chosen > MANY * experts else "few", "grouped_outer": "outer"}


def all_measured(
    names: Iterable[str], dtype: torch.dtype, mesh: FoldedMesh, tried: Candidates, turns: int
) -> dict[str, dict[Tile, dict[str, float]]]:
    """Seconds of each class, tile and place. A tile that is none at one place is not tried at others."""
    seconds: dict[str, dict[Tile, dict[str, float]]] = {c: {t: {} for t in tried[c]} for c in tried}
    for name, tokens in product(names, TOKENS):
        place = f"{name}, {tokens} tokens"
        left = {c: [t for t in each if math.inf not in each[t].values()] for c, each in seconds.items()}
        print(f"{place}: {listed(f'{len(left[c])} {c}' for c in classes_of(name, tokens).values())}", flush=True)
        try:
            here, out = measured(name, tokens, dtype, mesh, left, turns)
        except torch.OutOfMemoryError:
            print("  is left out: memory does not suffice")
            continue
        for c, each in here.items():
            for tile, spent in each.items():
                seconds[c][tile][place] = spent
        for tile, why in out.items():
            print(f"  {tile}: {why}")
    return seconds


def measured(
    name: str, tokens: int, dtype: torch.dtype, mesh: FoldedMesh, tried: Candidates, turns: int
) -> tuple[dict[str, dict[Tile, float]], dict[Tile, str]]:
    """Seconds of all grouped products of a layer, by class and tile, and why tiles are none here."""
    layer, x = example(name, tokens, "cpu" if mesh.is_virtual else mesh.device_type, dtype)
    classes = classes_of(name, tokens)
    class_of: dict[str, str] = {}
    launchers: dict[str, dict[Tile, Launcher]] = {}
    for tile, folded in emitted(layer, x, mesh, dict.fromkeys(t for c in classes.values() for t in tried[c])):
        for kernel in folded.kernels.values():
            if kernel.kind in classes and tile in tried[classes[kernel.kind]]:
                class_of[kernel.name] = classes[kernel.kind]
                launchers.setdefault(kernel.name, {})[tile] = getattr(source.load(kernel.path), kernel.name)
    seconds = {c: dict.fromkeys(tried[c], 0.0) for c in classes.values()}
    out: dict[Tile, str] = {}
    timed = ModuleType("timed")
    for kernel_name, rivals in launchers.items():
        setattr(timed, kernel_name, timing(rivals, seconds[class_of[kernel_name]], out, turns))
    y = foldcc.parallelize(layer, mesh, example_inputs={"x": x}, kernels=timed, verify=False)(x=x)
    y.backward(torch.randn_like(y))
    return seconds, out


def timing(rivals: Mapping[Tile, Launcher], seconds: dict[Tile, float], out: dict[Tile, str], turns: int) -> Launcher:
    """The launcher of the first tile, which adds to the seconds of each tile what it takes for the same.

    Args:
        out: gets why tiles are none.
    """
    first = next(iter(rivals.values()))

    @functools.wraps(first)
    def timed(*arguments: Any) -> Any:
        wanted = first(*arguments)
        for tile, launcher in rivals.items():
            if math.isinf(seconds[tile]):
                continue
            why = failure(launcher, arguments, wanted)
            if why:
                seconds[tile], out[tile] = math.inf, why
            else:
                seconds[tile] += on_device(functools.partial(launcher, *arguments), turns)
        return wanted

    return timed


def failure(launcher: Launcher, arguments: Sequence[Any], wanted: Any) -> str:
    """Why a launcher is none, "" if it is: it does not run, its kernel spills, or it computes something else."""
    compiled: list[Any] = []
    names: dict[str, Any] = launcher.__globals__
    kernel = f"{launcher.__name__}_kernel"
    try:
        with changed(names, {kernel: _Kept(names[kernel], compiled)}):
            found = launcher(*arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a driver says
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    spilled = max((4 * getattr(c, "n_spills", 0) for c in compiled), default=0)
    if spilled > SPILLED:
        return f"it spills {spilled} bytes"
    far = max(map(_distance, _tensors(found), _tensors(wanted)))
    return "" if far <= _TOLERANCE else f"its result is {far:.1e} of the norm away from the first tile's"


@dataclass(frozen=True)
class _Kept:
    """Stands in place of a kernel, launches it, and keeps what it was compiled to."""

    function: Any
    compiled: list[Any]

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.compiled.append(self.function[grid](*args, **kwargs))


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _distance(found: Tensor, wanted: Tensor) -> float:
    """The norm of a difference, relative to what is wanted, over a sample of elements."""
    a, b = (x.flatten()[:: 1 + x.numel() // _SAMPLE].double() for x in (found, wanted))
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def on_device(fn: Callable[[], Any], turns: int) -> float:
    """Median seconds on the device alone: the launch happens while the device waits, and its caches are cold."""
    cold = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    times = []
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(turns + 3):
        cold.zero_()
        torch.cuda._sleep(2_000_000)
        start.record()
        fn()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])
