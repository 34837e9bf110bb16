"""Ahead of time: every kernel of a program, compiled for a GPU that need not be there.

    python -m foldcc kernels --target sm_90 --model Qwen3-30B-A3B

Each launcher of an emitted file runs once on tensors without data. In place of its kernels stand recorders, which note what
these would be launched with; that is all that Triton's compiler wants. Sizes that data decide are made up, one large and one
small, so that a launcher that chooses its tile by them shows both. Registers and spills are read off the machine code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from foldcc.changed import changed
from foldcc.codegen import source
from foldcc.codegen.index import sizes
from foldcc.codegen.tiles import SHARED
from foldcc.errors import FoldError, listed
from foldcc.ir.program import Program
from foldcc.mesh import FoldedMesh

SPILLED = 32  # bytes of a thread that may stand in memory instead of registers without a remark
_ROWS = (65_537, 33)  # sizes that data decide: odd, as most are, so that nothing is taken to be aligned
_READ = 4096  # elements of a vector of whole numbers that a launcher may read, such as the rows of each expert
_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma",
    "tcgen05": r"tcgen05\.mma",
    "TMA": r"cp\.async\.bulk\.tensor",
    "cp.async": r"cp\.async\.c[ag]",
}

_QWEN = {"hidden_size": 2048, "vocab_size": 151_936}
_MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 8}
_GPT_OSS = {"hidden_size": 2880, "intermediate_size": 2880, "num_experts_per_tok": 4, "vocab_size": 201_088}
# Class name of a standard model in Transformers, without its ending, and its published dimensions for two layers.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-30B-A3B": (
        "Qwen3Moe",
        {**_QWEN, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "norm_topk_prob": True},
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        {"hidden_size": 7168, "intermediate_size": 18_432, "moe_intermediate_size": 2048, "n_routed_experts": 256}
        | {"num_experts_per_tok": 8, "first_k_dense_replace": 1, "vocab_size": 129_280},
    ),
    "Mixtral-8x7B": (
        "Mixtral",
        {**_MIXTRAL, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "vocab_size": 32_000},
    ),
    "Mixtral-8x22B": (
        "Mixtral",
        {**_MIXTRAL, "hidden_size": 6144, "intermediate_size": 16_384, "num_attention_heads": 48, "vocab_size": 32_768},
    ),
    "gpt-oss-20b": ("GptOss", {**_GPT_OSS, "num_local_experts": 32}),
    "gpt-oss-120b": ("GptOss", {**_GPT_OSS, "num_local_experts": 128}),
    "Qwen3-Next": (  # without its linear attention, whose loop over chunks unrolls; `--model qwen3_next --seq 64` has it
        "Qwen3Next",
        {**_QWEN, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts": 512}
        | {"num_experts_per_tok": 10, "layer_types": ["full_attention"] * 48},
    ),
    "OLMoE": (
        "Olmoe",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50_304}
        | {"num_attention_heads": 16},
    ),
}


@dataclass(frozen=True)
class Launch:
    """One function of an emitted file and what it is launched with: all that its machine code depends on.

    Attributes:
        kernel: name in `model.kernels`; function: of what Triton compiles.
        signature: type of each argument, "constexpr" for those that are part of the code.
        constants: the values of the latter. aligned: positions of arguments that 16 divides.
        options: warps, stages, and the like.
    """

    kernel: str
    function: str
    path: Path
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


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


# --- what is launched ---


def launches(program: Program) -> list[Launch]:
    """Every launch of the kernels of an emitted program, each once."""
    found: dict[Launch, None] = {}
    for main in program.mains:
        for block in main.children():
            assert isinstance(block, fx.GraphModule)
            for node in block.graph.nodes:
                if "kernel" in node.meta:
                    found |= dict.fromkeys(x for rows in _ROWS for x in _launched(node, rows))
    return list(found)


def _launched(node: fx.Node, rows: int) -> list[Launch]:
    """What a launcher launches, if sizes that data decide are `rows`.

    Raises:
        FoldError: it does more with the values of its arguments than to read vectors of whole numbers.
    """
    import triton

    found: list[Launch] = []
    kernel: Any = node.meta["kernel"]
    launcher: Any = node.target
    recorders = {
        name: _Recorder(function, kernel.name, kernel.path, found)
        for name, function in launcher.__globals__.items()
        if isinstance(function, triton.JITFunction)
    }
    with changed(launcher.__globals__, recorders):
        try:
            launcher(*fx.map_arg(node.args, lambda n: _without_data(n.meta["val"], rows)))
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise FoldError(f"The launcher {kernel.name} needs data: {why}", at=str(kernel.path)) from error
    return found


def _without_data(value: Any, rows: int) -> Any:
    """A tensor like a fake one: on `meta`, or ones if it is a vector that a launcher may read."""
    if not isinstance(value, Tensor):
        return value if not isinstance(value, torch.SymInt) else rows
    shape, strides = (
        [int(n.subs(dict.fromkeys(n.free_symbols, rows))) for n in sizes(x)] for x in (value.shape, value.stride())
    )
    if value.dtype in (torch.int32, torch.int64) and value.dim() == 1 and shape[0] <= _READ:
        return torch.ones(shape, dtype=value.dtype)
    return torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")


@dataclass(frozen=True)
class _Recorder:
    """Stands in place of a kernel and notes its launches."""

    function: Any
    kernel: str
    path: Path
    found: list[Launch]

    def __getitem__(self, grid: Any) -> Any:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        parameters = {p.name: p for p in self.function.params}
        options = {name: x for name, x in kwargs.items() if name not in parameters}
        given = self.function.signature.bind(*args, **{name: x for name, x in kwargs.items() if name in parameters})
        given.apply_defaults()
        types = {name: "constexpr" if parameters[name].is_constexpr else _type(x) for name, x in given.arguments.items()}
        aligned = [
            i
            for i, (name, x) in enumerate(given.arguments.items())
            if types[name] != "constexpr" and (isinstance(x, Tensor) or (isinstance(x, int) and x % 16 == 0))
        ]
        constants = [(name, x) for name, x in given.arguments.items() if types[name] == "constexpr"]
        told = tuple(types.items()), tuple(constants), tuple(aligned), tuple(options.items())
        self.found.append(Launch(self.kernel, self.function.__name__, self.path, *told))


def _type(x: Any) -> str:
    """How Triton takes an argument: None and 1 become part of the code."""
    if isinstance(x, Tensor):
        return f"*{_TYPES[x.dtype]}"
    if x is None or (x == 1 and not isinstance(x, (bool, float))):
        return "constexpr"
    if isinstance(x, bool):
        return "u1"
    return "fp32" if isinstance(x, float) else "i32" if -(2**31) <= x < 2**31 else "i64"


_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


# --- compiling ---


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


# --- models ---


def standard_model(name: str, layers: int = 2, device: str = "meta") -> nn.Module:
    """A standard model by its name, or one from a configuration of Transformers, in bfloat16.

    Args:
        name: one of `MODELS`, a configuration file or the folder that holds it, or a `model_type` of Transformers.

    Raises:
        FoldError: it is none of these.
    """
    import transformers

    if name in MODELS:
        family, published = MODELS[name]
        dimensions = {k: x[:layers] if isinstance(x, list) else x for k, x in published.items()}
        if not hasattr(transformers, f"{family}Config"):
            raise FoldError(f"Transformers {transformers.__version__} has no {family}.", valid=listed(MODELS))
        config = getattr(transformers, f"{family}Config")(**dimensions, num_hidden_layers=layers)
    elif Path(name).exists():
        config = transformers.AutoConfig.from_pretrained(name)
    elif name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name, num_hidden_layers=layers)
    else:
        raise FoldError(
            f"There is no model {name!r}.", valid=f"{listed(MODELS)}; a configuration file; a model_type of Transformers"
        )
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def compile_model(
    model: nn.Module, mesh: FoldedMesh, target: str, batch: int, length: int, *, only: str = "*", jobs: int = 2
) -> list[Compiled]:
    """Folds a model over a virtual mesh and compiles its kernels, forward and backward.

    Args:
        only: the kernels whose names match.

    Raises:
        FoldError: the model does not fold, the target is unknown, or Triton is missing.
    """
    import foldcc

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


# --- the command line ---


def report(found: Sequence[Compiled], target: str) -> str:
    """A table of all kernels, then what is wrong with them."""
    from foldcc.tables import table

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


def complaint(c: Compiled, target: str) -> str:
    """What is wrong with a launch, "" if nothing is."""
    if c.error:
        return f"does not compile: {c.error}"
    if c.shared > SHARED[target]:
        return f"exceeds the shared memory of {target}: {c.shared:,} of {SHARED[target]:,} bytes"
    return f"spills {c.spilled} bytes" if c.spilled > SPILLED else ""


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


__all__ = [
    "MODELS",
    "SHARED",
    "Compiled",
    "Launch",
    "compile_all",
    "compile_model",
    "complaint",
    "launches",
    "main",
    "standard_model",
]
