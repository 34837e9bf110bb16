"""Tune: times candidates for the tiles of the grouped products on this GPU, and writes the table of tiles.

python -m foldcc tune                                           # all shapes: hours
python -m foldcc tune --shapes OLMoE --dtype float16
python -m foldcc tune --dry-run --target sm_90 --compile        # without a GPU
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from foldcc.codegen import source, tiles
from foldcc.codegen.tiles import CLASSES, SHARED, Table, Tile
from foldcc.errors import FoldError, listed
from foldcc.mesh import FoldedMesh, init_folded_mesh
from foldcc.tables import table
from foldcc.tools.candidates import HELD, Candidates, Seconds, candidates, registers, tuned
from foldcc.tools.launches import Launch, launches
from foldcc.tools.machine_code import compile_all, complaint
from foldcc.tools.moe_layer import SHAPES, TOKENS, example
from foldcc.tools.timing import all_measured, emitted

DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}


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
    limits = f"{chip}, {element} bytes: {HELD[0]} to {HELD[1]} registers of a thread for accumulators"
    return f"{limits}, {tiles.shared_memory(chip):,} bytes of shared memory\n\n{table(head, rows, right=range(1, 8))}"


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
