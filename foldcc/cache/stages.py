"""Runs passes over a program, or reads what they left of it when they ran over the same one before."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from foldcc.cache import files
from foldcc.cache.key import Unkept, key_of
from foldcc.cache.packed import pack, unpack
from foldcc.codegen import Emit
from foldcc.ir.pipeline import Pass, Stage, Stages, check_contracts, run_passes, warn_of
from foldcc.ir.program import Program


def run_or_read(
    program: Program,
    passes: Sequence[Pass],
    *,
    seconds: float = 0.0,
    check: Callable[[Program], None],
    progress: Callable[[str], None],
) -> Stages:
    """As `run_passes`. Kernels are emitted again: their source is a file already, and Triton keeps what it compiled."""
    check_contracts(passes, program.properties)
    emits = next((i for i, p in enumerate(passes) if isinstance(p, Emit)), len(passes))
    try:
        key = key_of(program, passes[:emits])
    except Unkept as why:
        stages = run_passes(program, passes, seconds=seconds, check=check, progress=progress)
        return Stages(stages[:], f"not kept on disk: {why}.")
    found = _read(key, program, passes[:emits], seconds)
    if found is None:
        found = run_passes(program, passes[:emits], seconds=seconds, check=check, progress=progress)
        found = Stages(found[:], _write(key, program, found))
    if emits == len(passes):
        return found
    later = run_passes(found[-1].program, passes[emits:], check=check, progress=progress)
    return Stages([*found, *later[1:]], found.told)


def _read(key: str, program: Program, passes: Sequence[Pass], seconds: float) -> Stages | None:
    start = time.perf_counter()
    packed = files.read(key)
    if packed is None:
        return None
    try:
        left: list[Any] = unpack(packed, program)
        rest = [
            Stage(p.name, took, before, after, made, p) for p, (took, before, after, made) in zip(passes, left, strict=True)
        ]
    except Exception as error:  # whatever comes of a file that other code wrote, it is said, and compiled
        files.damaged(key, f"{type(error).__name__}: {error}")
        return None
    for p, stage in zip(passes, rest, strict=True):
        warn_of(p, stage.program)
    took = f"{1000 * (time.perf_counter() - start):.0f} ms"
    told = f"read from disk in {took}, and compiled in the times above: {files.path_of(key)}"
    return Stages([Stage("capture", seconds, 0, program.node_count(), program), *rest], told)


def _write(key: str, program: Program, stages: Stages) -> str:
    """Keeps stages, and says where, or why not."""
    try:
        packed = pack([(s.seconds, s.before, s.after, s.program) for s in stages[1:]], program)
    except Unkept as why:
        return f"not kept on disk: {why}."
    return f"kept on disk: {files.path_of(key)}" if files.write(key, packed) else "not kept on disk, which cannot be written."
