"""Machine code: what a launch is compiled to for a GPU that need not be there, and what is wrong with it.

Registers and spills are read off the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from foldcc.codegen import source
from foldcc.codegen.tiles import SHARED
from foldcc.tools.launches import Launch

SPILLED = 32  # bytes of a thread that may stand in memory instead of registers without a remark
_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma",
    "tcgen05": r"tcgen05\.mma",
    "TMA": r"cp\.async\.bulk\.tensor",
    "cp.async": r"cp\.async\.c[ag]",
}


@dataclass(frozen=True)
class Compiled:
    """What became of a launch.

    Attributes:
        registers, spilled: of a thread; registers, and bytes in memory: what does not fit into them, and small arrays, such
            as those with which the sine of a large number is computed.
        shared: bytes of a program.
        instructions: what of "wgmma", "tcgen05", "TMA" and "cp.async" it has.
        error: why it does not compile, "" if it does.
    """

    launch: Launch
    seconds: float
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instructions: tuple[str, ...] = ()
    error: str = ""


def complaint(c: Compiled, target: str) -> str:
    """What is wrong with a launch, "" if nothing is."""
    if c.error:
        return f"does not compile: {c.error}"
    if c.shared > SHARED[target]:
        return f"exceeds the shared memory of {target}: {c.shared:,} of {SHARED[target]:,} bytes"
    return f"spills {c.spilled} bytes" if c.spilled > SPILLED else ""


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compiles what a launch needs, and looks at the result; it is never taken from Triton's cache."""
    with source.only_compiled_for(target):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        triton.knobs.compilation.always_compile = True
        start = time.perf_counter()
        try:
            code = ASTSource(
                getattr(source.load(launch.path), launch.function),
                dict(launch.signature),
                dict(launch.constants),
                {(i,): [["tt.divisibility", 16]] for i in launch.aligned},
            )
            done = triton.compile(code, target=GPUTarget("cuda", int(target[3:]), 32), options=dict(launch.options))
        except Exception as error:  # whatever a compiler says is a line of the report
            text = str(error).strip() or repr(error)
            return Compiled(launch, time.perf_counter() - start, error=f"{type(error).__name__}: {text.splitlines()[-1]}")
        seconds = time.perf_counter() - start
        registers, spilled = _resources(done.asm["cubin"], triton.knobs.nvidia.cuobjdump.path)
        used = tuple(name for name, text in _INSTRUCTIONS.items() if re.search(text, done.asm["ptx"]))
        return Compiled(launch, seconds, registers, spilled, done.metadata.shared, used)


def _resources(cubin: bytes, cuobjdump: str) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it keeps in memory of its own."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
    return found["REG"], max(found["STACK"], found["LOCAL"])


def compile_all(found: Sequence[Launch], target: str, jobs: int = 2) -> Iterator[Compiled]:
    """The launches of a program compiled by several processes, in order."""
    if jobs == 1:
        yield from (compile_launch(launch, target) for launch in found)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_launch, found, [target] * len(found))
