"""Ahead of time: every kernel of a program, compiled for a GPU that need not be there.

python -m foldcc kernels --target sm_90 --model Qwen3-30B-A3B
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

import foldcc
from foldcc.codegen import source
from foldcc.codegen.tiles import SHARED
from foldcc.errors import FoldError, listed
from foldcc.mesh import FoldedMesh
from foldcc.tables import table
from foldcc.tools.launches import launches
from foldcc.tools.machine_code import Compiled, compile_all, complaint
from foldcc.tools.standard_models import MODELS, standard_model


def compile_model(
    model: nn.Module, mesh: FoldedMesh, target: str, batch: int, length: int, *, only: str = "*", jobs: int = 2
) -> list[Compiled]:
    """Folds a model over a virtual mesh and compiles its kernels, forward and backward.

    Args:
        only: the kernels whose names match.

    Raises:
        FoldError: the model does not fold, the target is unknown, or Triton is missing.
    """
    _check_target(target)
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    with source.only_compiled_for(target):
        folded = foldcc.parallelize(
            model, mesh, example_inputs={"input_ids": ids, "labels": ids}, kernels="triton", verify=False
        )
        found = [launch for launch in launches(folded.program) if fnmatch(launch.kernel, only)]
        if not found:
            raise FoldError(f"The program has no kernel {only!r}.", valid=listed(folded.kernels))
        return list(compile_all(found, target, jobs))


def _check_target(target: str) -> None:
    if target not in SHARED:
        raise FoldError(f"There is no target {target!r}.", valid=listed(SHARED))


def report(found: Sequence[Compiled], target: str) -> str:
    """A table of all kernels, then what is wrong with them."""
    head = ["kernel", "function", "tile", "warps", "stages", "registers", "spilled", "shared", "instructions", "seconds"]
    rows = []
    for c in found:
        options = dict(c.launch.options)
        tile = " ".join(f"{k}={x}" for k, x in c.launch.constants if k.isupper())
        wide = [str(options.get("num_warps", 4)), str(options.get("num_stages", 3))]
        used = [str(c.registers), str(c.spilled), f"{c.shared:,}", ", ".join(c.instructions)]
        rows.append([c.launch.kernel, c.launch.function, tile, *wide, *used, f"{c.seconds:.1f}"])
    lines = [table(head, rows, right=(3, 4, 5, 6, 7, 9)), ""]
    lines += [f"{c.launch.function} {wrong}" for c in found if (wrong := complaint(c, target))]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """`python -m foldcc kernels`: 0 if all kernels compile and fit, 1 if one does not, 2 if there are none to compile."""
    parser = argparse.ArgumentParser(prog="python -m foldcc kernels", description="Compiles a model's kernels without a GPU.")
    parser.add_argument("--target", default="sm_90", help=f"the GPU: {listed(SHARED)}")
    parser.add_argument("--model", default="Qwen3-30B-A3B", help=f"{listed(MODELS)}; a configuration file; or a model_type")
    parser.add_argument("--mesh", default="dp=1", help="the folded mesh; kernels are those of one of its ranks")
    parser.add_argument("--layers", type=int, default=2, help="layers of a model that is no file")
    parser.add_argument("--batch", type=int, default=2, help="samples of the whole batch")
    parser.add_argument("--seq", type=int, default=4096, help="tokens of a sample")
    parser.add_argument("--only", default="*", help="the kernels whose names match, such as 'grouped_*'")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        _check_target(options.target)
        mesh = FoldedMesh.parse(options.mesh)
        model = standard_model(options.model, options.layers)
        given = options.target, options.batch, options.seq
        found = compile_model(model, mesh, *given, only=options.only, jobs=options.jobs)
    except FoldError as error:
        print(f"python -m foldcc kernels: {error}", file=sys.stderr)
        return 2
    kernels = len({c.launch.kernel for c in found})
    print(report(found, options.target))
    print(
        f"{options.model}: {kernels} kernels, {len(found)} functions for {options.target}, {time.perf_counter() - start:.0f} s"
    )
    if options.json:
        options.json.write_text(json.dumps([_record(c) for c in found], indent=1))
    return int(any(c.error or c.shared > SHARED[options.target] for c in found))


def _record(c: Compiled) -> dict[str, Any]:
    launch = {"kernel": c.launch.kernel, "function": c.launch.function, **dict(c.launch.constants), **dict(c.launch.options)}
    used = {"registers": c.registers, "spilled": c.spilled, "shared": c.shared, "instructions": c.instructions}
    return {**launch, **used, "seconds": c.seconds, "error": c.error}
