"""Launches: what the kernels of a program are launched with, found without a GPU and without data.

Each launcher of an emitted file runs once on tensors without data. In place of its kernels stand recorders, which note what
these would be launched with; that is all that Triton's compiler wants. Sizes that data decide are made up, one large and one
small, so that a launcher that chooses its tile by them shows both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from foldcc.changed import changed
from foldcc.codegen.index import sizes
from foldcc.errors import FoldError
from foldcc.ir.program import Program

_ROWS = (65_537, 33)  # sizes that data decide: odd, as most are, so that nothing is taken to be aligned
_READ = 4096  # elements of a vector of whole numbers that a launcher may read, such as the rows of each expert


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


def launches(program: Program) -> list[Launch]:
    """Every launch of the kernels of an emitted program, each once."""
    found: dict[Launch, None] = {}
    for main in program.mains:
        for block in main.children():
            assert isinstance(block, fx.GraphModule)
            for node in block.graph.nodes:
                if "kernel" in node.meta:
                    found |= dict.fromkeys(x for rows in _ROWS for x in launched(node, rows))
    return list(found)


def launched(node: fx.Node, rows: int) -> list[Launch]:
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
