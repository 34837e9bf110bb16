"""What decides which stages a pipeline makes of a program, as a hash: the program, the passes, and the code of all of them.

The program is one that was captured just now, so that whatever a model is made of, its code, its configuration and what its
forward was given, is in the key by what it came to. Weights are not: no pass reads them.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._functorch import config as functorch
from torch._subclasses import FakeTensor

from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program
from foldcc.ops import captured_record, record

# What passes and readers of stages are given of a node; the rest of its meta is for PyTorch's tracers.
META = (
    *("val", "source", "nn_module_stack", "dims", "rule", "unknown", "letters", "ways", "layout", "grad", "parameter", "dtype"),
    *("types", "origin", "used_up", "result", "again", "inline", "nodes", "count", "stage", "joint", "returns"),
)
_OURS = ("aten", "prims", "foldcc")  # namespaces of operators whose gradients and shapes PyTorch and foldcc define
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_NAMES = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.SymInt, slice, range)
_BLAS = ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
_ATTENTION = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")


class Unkept(Exception):
    """Why a program is not kept on disk."""


def key_of(program: Program, passes: Sequence[Pass]) -> str:
    """The hash of a program that passes are to run over.

    Raises:
        Unkept: something that decides what they make of it is not known to be the same next time.
    """
    found = sha256(code())
    for line in (*_switches(program), *map(_told, passes), *_lines(program)):
        found.update(line.encode() + b"\n")
    return found.hexdigest()


@cache
def code() -> bytes:
    """A hash of this package, as this process runs it, and of PyTorch's version.

    Raises:
        Unkept: it was edited since, so that files are not what runs.
    """
    found = sha256(f"torch {torch.__version__}".encode())
    for name in ("foldcc", "foldcc.passes", "foldcc.codegen"):  # in a checkout, the last two stand beside the first
        root = Path(sys.modules[name].__path__[0])
        for file in sorted(root.rglob("*.py")):
            if file.stat().st_ctime > sys.modules["foldcc"].IMPORTED:
                raise Unkept(f"{file} is newer than this process, which runs other code")
            found.update(f"{name} {file.relative_to(root)}".encode() + file.read_bytes())
    return found.digest()


def _switches(program: Program) -> Iterator[str]:
    """What PyTorch's operators are traced into depends on the machine, and on switches of this process."""
    yield f"python {sys.version_info[:3]} sympy {sympy.__version__}"
    yield f"{torch.get_default_dtype()} {torch.are_deterministic_algorithms_enabled()} {functorch.get_hash()!r}"
    yield f"{[getattr(torch.backends.cuda, f'{name}_enabled')() for name in _ATTENTION]}"
    yield f"{[getattr(torch.backends.cuda.matmul, name) for name in _BLAS]} {torch.backends.cpu.get_cpu_capability()}"
    if any(n.meta["val"].device.type == "cuda" for n in program.placeholders):
        yield f"{torch.version.cuda} {torch.cuda.get_device_properties()}"


def _lines(program: Program) -> Iterator[str]:
    for f in fields(program):
        x = getattr(program, f.name)
        if f.name == "literals":  # of what is no tensor, passes know where it stands
            yield f"literals {list(x)}"
        elif f.name == "out_spec":
            yield f"outputs {x.num_leaves}"
        elif f.name == "mesh":
            yield f"mesh {x.device_type} {x.sizes}"
        elif f.name == "plan":
            yield f"plan {x}"
        elif f.name not in ("graph", "backward"):
            yield f"{f.name} {_told(x)}"
    for main in program.mains:
        for name, graph in (("main", main), *main.named_children()):
            yield name
            assert isinstance(graph, fx.GraphModule)
            for node in graph.graph.nodes:
                yield f"{node.name} {node.op} {_target(node)} {_told(node.args)} {_told(node.kwargs)}"
                yield _told({k: node.meta[k] for k in META if k in node.meta})


def _target(node: fx.Node) -> str:
    """An operator, and what is known of it that is not foldcc's own."""
    x: Any = node.target
    if isinstance(x, str) and node.op != "get_attr":
        return x
    if isinstance(x, torch._ops.OpOverload) and x.namespace in _OURS:
        return f"{x} {_told((captured_record(x), record(x)))}"
    if isinstance(x, (FunctionType, BuiltinFunctionType)):
        return _told(x)
    raise Unkept(f"operator {x} is neither PyTorch's nor foldcc's, and its code may have changed the next time")


def _told(x: Any) -> str:
    """A value in words that are the same in another process."""
    if isinstance(x, fx.Node):
        return f"%{x.name}"
    if type(x) in _PLAIN:
        return repr(x)
    if type(x) in _NAMES:
        return str(x)
    if isinstance(x, FakeTensor):
        return f"{x.dtype} {tuple(x.shape)} {x.stride()} {x.device}"
    if isinstance(x, Tensor):
        return f"{x.dtype} {tuple(x.shape)} {x.device} {_elements(x)}"
    if isinstance(x, Mapping):
        return f"{{{', '.join(f'{_told(k)}: {_told(v)}' for k, v in x.items())}}}"
    if isinstance(x, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_told, x)))}}}"
    if isinstance(x, (tuple, list)):
        return f"[{', '.join(map(_told, x))}]"
    if isinstance(x, sympy.Symbol):
        return f"{x.name}"
    if isinstance(x, torch._ops.OpOverload):
        return str(x)
    if isinstance(x, Program):
        return "\n".join(_lines(x))
    return _defined(x)


def _defined(x: Any) -> str:
    """What is defined in a file: it has to be one of foldcc's or of Python's, whose code is in the key."""
    kind = x if isinstance(x, (type, FunctionType, BuiltinFunctionType)) else type(x)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__ not in (operator.__name__, "_operator", "builtins") and not kind.__module__.startswith("foldcc."):
        raise Unkept(f"{name} is defined outside of foldcc, and its code may have changed the next time")
    if kind is x:
        return name
    if is_dataclass(x):
        return f"{name} {_told({f.name: getattr(x, f.name) for f in fields(x)})}"
    raise Unkept(f"what decides it is in a {name}, which says nothing that could be compared the next time")


def _elements(x: Tensor) -> str:
    if x.device.type == "meta":
        raise Unkept("a constant of the model is on meta")
    whole = x.detach().cpu().contiguous().view(-1)
    return sha256(whole.view(torch.uint8).numpy().tobytes() if x.numel() else b"").hexdigest()
