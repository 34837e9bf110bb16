"""Tune: times candidates for the tiles of the grouped products on this GPU, and writes the table of tiles.

    python -m foldcc tune                                           # all shapes: hours
    python -m foldcc tune --shapes OLMoE --dtype float16
    python -m foldcc tune --dry-run --target sm_90 --compile        # without a GPU

The kernels of one layer of experts are emitted once for each candidate. Then the layer runs once, forward and backward, and
where it calls a grouped product, every candidate computes that product. The tile of a class is the candidate with the lowest
geometric mean of its times over all shapes; one that does not run, computes something else or spills is none.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

import foldcc
from foldcc.changed import changed
from foldcc.codegen import source, tiles
from foldcc.codegen.tiles import CLASSES, MANY, SHARED, Table, Tile
from foldcc.errors import FoldError, listed
from foldcc.mesh import FoldedMesh, init_folded_mesh
from foldcc.module import FoldedModule
from foldcc.tables import table
from foldcc.tools.launches import Launch, launches
from foldcc.tools.machine_code import SPILLED, compile_all, complaint

SHAPES = {  # H, I, E, K
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "DeepSeek-V3": (7168, 2048, 256, 8),
    "Mixtral-8x7B": (4096, 14_336, 8, 2),
    "gpt-oss-20b": (2880, 2880, 32, 4),
    "Qwen3-Next": (2048, 512, 512, 10),
    "OLMoE": (2048, 1024, 64, 8),
}
TOKENS = (8192, 256)  # experts of these shapes have many rows, and few
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
# Rows and columns of candidates, for elements of two bytes; wider ones have as many bytes.
_SIDES = {
    "many": ((64, 128, 256), (64, 128, 256)),
    "few": ((16, 32, 64, 128), (64, 128, 256)),
    "outer": ((64, 128, 256), (64, 128, 256)),
}
_STEPS = ((32, 3), (32, 4), (64, 2), (64, 3), (64, 4), (128, 2))  # elements of a step, and stages
_WARPS = (4, 8)
_HELD = (32, 200)  # registers of a thread that accumulators may take, at least and at most
_TOLERANCE = 2e-2  # of a candidate's result, relative to its norm
_SAMPLE = 2**20  # elements of a result that are compared

Launcher = Callable[..., Any]
Candidates = Mapping[str, Sequence[Tile]]  # by class, the present tile first
Seconds = Mapping[str, Mapping[Tile, Mapping[str, float]]]  # by class, tile and place; infinite where a tile is none


# --- what is tried, and what is chosen ---


def candidates(table: Table, chip: str, element: int) -> dict[str, list[Tile]]:
    """For each class, the present tile and all others that fit a chip: its registers, and its shared memory."""

    def scaled(n: int) -> int:
        return max(16, 2 * n // element)

    found = {}
    for name, sides in _SIDES.items():
        grid = [
            Tile(scaled(rows), scaled(columns), scaled(step), warps, stages)
            for rows, columns, (step, stages), warps in product(*sides, _STEPS, _WARPS)
        ]
        fitting = [t for t in grid if fits(t, chip, element)]
        found[name] = list(dict.fromkeys([table.tiles[chip, element, name], *fitting]))
    return found


def fits(tile: Tile, chip: str, element: int) -> bool:
    return tile.shared(element) <= tiles.shared_memory(chip) and _HELD[0] <= registers(tile, element) <= _HELD[1]


def registers(tile: Tile, element: int) -> int:
    """Registers of a thread that the accumulators take."""
    return tile.rows * tile.columns * max(4, element) // 4 // (32 * tile.warps)


def chosen(seconds: Mapping[Tile, Mapping[str, float]], present: Tile) -> Tile:
    """The tile with the lowest geometric mean of its times; the present one, where none is faster.

    The times of all are of the same places, so that times relative to the present one's would choose the same.

    Raises:
        FoldError: every tile fails somewhere.
    """
    means = {tile: statistics.geometric_mean(at.values()) for tile, at in seconds.items()}
    best = min(means, key=lambda tile: (means[tile], tile != present))
    if math.isinf(means[best]):
        raise FoldError(f"None of {len(means)} candidates runs everywhere.", valid="other candidates")
    return best


def tuned(table: Table, chip: str, element: int, seconds: Seconds, origin: str) -> Table:
    """A table with the tiles that measurements choose for a chip and bytes of an element; the others stay.

    Raises:
        FoldError: a class was measured nowhere, or none of its candidates runs everywhere.
    """
    for name, at in seconds.items():
        if not any(at.values()):
            raise FoldError(f"Nothing of the class {name!r} was measured.", valid="shapes that fit into memory")
    new = {(chip, element, name): chosen(at, table.tiles[chip, element, name]) for name, at in seconds.items()}
    return Table({**table.tiles, **new}, {**table.origins, (chip, element): origin})


# --- a layer of experts ---


def gated(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


def folded_experts(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return foldcc.ops.experts(x, ids, weights, up, down, activation_fn=gated)


class Moe(nn.Module):
    """A router over experts that a function computes."""

    def __init__(self, gate: nn.Parameter, up: nn.Parameter, down: nn.Parameter, chosen: int, experts: Launcher):
        super().__init__()
        self.gate, self.up, self.down, self.chosen, self.experts = gate, up, down, chosen, experts

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, ids = F.linear(tokens, self.gate).softmax(-1, dtype=torch.float32).topk(self.chosen)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        return self.experts(tokens, ids, weights, self.up, self.down).view_as(x)


class Shifted(nn.Module):
    """A layer after one with a parameter, so that the gradient of what comes in is computed."""

    def __init__(self, layer: nn.Module, hidden: int):
        super().__init__()
        like = next(layer.parameters())
        self.layer, self.shift = layer, nn.Parameter(torch.zeros(hidden, device=like.device, dtype=like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x + self.shift)
        return y[0] if isinstance(y, tuple) else y


def random_weights(
    hidden: int, width: int, experts: int, device: str, dtype: torch.dtype
) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Weights of a router and of its experts, up and down."""

    def weight(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, device=device, dtype=dtype).mul_(shape[-1] ** -0.5))

    return weight(experts, hidden), weight(experts, 2 * width, hidden), weight(experts, hidden, width)


def example(name: str, tokens: int, device: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A layer of a standard shape, and what goes in."""
    hidden, width, experts, chosen = SHAPES[name]
    weights = random_weights(hidden, width, experts, device, dtype)
    x = torch.randn(1, tokens, hidden, device=device, dtype=dtype)
    return Shifted(Moe(*weights, chosen, folded_experts), hidden), x


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


# --- timing ---


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


# --- compiling without a GPU ---


def refused(name: str, dtype: torch.dtype, target: str, tried: Candidates, jobs: int) -> dict[tuple[str, Tile], str]:
    """Why candidates are none, by class and tile: kernels of a shape do not compile, do not fit, or spill."""
    kinds = {"grouped_linear": ("many", "few"), "grouped_outer": ("outer",)}
    found: list[tuple[str, Tile, Launch]] = []
    with source.only_compiled_for(target):
        layer, x = example(name, TOKENS[0], "meta", dtype)
        for tile, folded in emitted(layer, x, FoldedMesh.parse("dp=1"), dict.fromkeys(t for c in tried.values() for t in c)):
            for launch in launches(folded.program):
                kind = folded.kernels[launch.kernel].kind
                if any(tile in tried[c] for c in kinds.get(kind, ())):
                    found.append((kind, tile, launch))
    made = compile_all([launch for *_, launch in found], target, jobs)
    whys = [(kind, tile, complaint(c, target)) for (kind, tile, _), c in zip(found, made, strict=True)]
    return {(c, tile): why for kind, tile, why in whys if why for c in kinds[kind] if tile in tried[c]}


# --- the command line ---


def main(arguments: Sequence[str]) -> int:
    """`python -m foldcc tune`: 0 if the table is written, or the candidates are shown; 2 if they cannot be."""
    gpu = tiles.gpu() if torch.cuda.is_available() else None
    parser = argparse.ArgumentParser(prog="python -m foldcc tune", description="Times tiles on this GPU; writes their table.")
    parser.add_argument("--out", type=Path, default=tiles.PATH, help="the table; by default the one that is used")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="of the experts; all by default")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--turns", type=int, default=10, help="timed turns of each candidate, after 3 that are not timed")
    parser.add_argument("--dry-run", action="store_true", help="show the candidates, and time nothing")
    parser.add_argument("--target", choices=SHARED, default=gpu if gpu in SHARED else "sm_90", help="of a dry run: the GPU")
    parser.add_argument("--compile", action="store_true", help="of a dry run: compile the candidates for the first shape")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    options = parser.parse_args(arguments)
    dtype = DTYPES[options.dtype]
    try:
        if options.dry_run:
            tried = candidates(tiles.table().with_chip(options.target), options.target, dtype.itemsize)
            given = options.shapes[0], dtype, options.target, tried, options.jobs
            print(shown(tried, options.target, dtype.itemsize, refused(*given) if options.compile else {}))
            return 0
        if gpu is None:
            raise FoldError(
                "There is no CUDA device here, and tiles are timed on one.",
                torch=torch.__version__,
                valid="a machine with a GPU; or --dry-run, which shows the candidates",
            )
        print(tune(options.out, gpu, options.shapes, dtype, options.turns))
    except FoldError as error:
        print(f"python -m foldcc tune: {error}", file=sys.stderr)
        return 2
    return 0


def tune(out: Path, gpu: str, names: Sequence[str], dtype: torch.dtype, turns: int) -> str:
    """Writes the table with tiles that are timed here, and tells what they change."""
    check_writable(out)
    torch.manual_seed(0)
    before, element = tiles.table().with_chip(gpu), dtype.itemsize
    dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_folded_mesh("cuda", attention={})
        seconds = all_measured(names, dtype, mesh, candidates(before, gpu, element), turns)
    finally:
        dist.destroy_process_group()
    after = tuned(before, gpu, element, seconds, origin(names, dtype))
    out.write_text(str(after))
    return compared(before, after, gpu, element, seconds)


def check_writable(out: Path) -> None:
    """Raises if a file cannot be written: better now than after hours."""
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise FoldError(f"The table cannot be written to {out}.", valid="--out, with a file that can be written")


def origin(names: Sequence[str], dtype: torch.dtype) -> str:
    """What the table says about tiles that were timed here."""
    machine = torch.cuda.get_device_name(), f"torch {torch.__version__}", f"triton {metadata.version('triton')}"
    return f"timed on {listed(machine)}, {time.strftime('%Y-%m-%d')}: {str(dtype)[6:]} of {listed(names)}"


def compared(before: Table, after: Table, chip: str, element: int, seconds: Seconds) -> str:
    """A table of what the tiles of two tables take, by class and place."""
    rows = []
    for name, at in seconds.items():
        old, new = (x.tiles[chip, element, name] for x in (before, after))
        for place, spent in at[new].items():
            was = at[old].get(place, math.inf)
            rows.append([name, place, str(old), f"{1e3 * was:.3f}", str(new), f"{1e3 * spent:.3f}", f"{spent / was:.2f}"])
    return table(["class", "place", "before", "ms", "after", "ms", "ratio"], rows, right=(3, 5, 6))


def shown(tried: Candidates, chip: str, element: int, why: Mapping[tuple[str, Tile], str]) -> str:
    """A table of candidates: what they take of a chip, and why they are none."""
    rows = []
    for name in CLASSES:
        for t in tried[name]:
            sizes = [str(n) for n in (t.rows, t.columns, t.step, t.warps, t.stages, registers(t, element))]
            rows.append([name, *sizes, f"{t.shared(element):,}", why.get((name, t), "")])
    head = ["class", "rows", "columns", "step", "warps", "stages", "accumulators", "shared", "left out"]
    limits = f"{chip}, {element} bytes: {_HELD[0]} to {_HELD[1]} registers of a thread for accumulators"
    return f"{limits}, {tiles.shared_memory(chip):,} bytes of shared memory\n\n{table(head, rows, right=range(1, 8))}"


__all__ = ["SHAPES", "Moe", "Shifted", "folded_experts", "gated", "main", "on_device", "random_weights", "tuned"]
