"""Emitted source: files that hold kernels and their launchers, written once and loaded as modules."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch

from foldcc.errors import FoldError

TRITON = ((3, 6), (3, 7))  # versions that kernels are written for
NUMPY = (2, 4)  # from here on an array of one element is no number, as which the interpreter before Triton 3.7 takes it
OLDEST = (8, 0)  # compute capability, from which on matrix products of all these types are there
HEAD = "import torch\nimport triton\nimport triton.language as tl\n"
_TARGET: ContextVar[str | None] = ContextVar("target", default=None)


def target() -> str | None:
    """The GPU, such as "sm_90", that kernels are only compiled for; None if they are to run in this process."""
    return _TARGET.get()


@contextmanager
def only_compiled_for(gpu: str) -> Iterator[None]:
    """Inside, kernels are emitted and loaded for a GPU that need not be there, and do not run.

    Raises:
        FoldError: Triton is missing, or interprets its kernels in this process.
    """
    token = _TARGET.set(gpu)
    try:
        require_triton()
        yield
    finally:
        _TARGET.reset(token)


def directory() -> Path:
    """Where emitted files are kept: `FOLDCC_CACHE`, else `foldcc` in the user's cache directory."""
    given = os.environ.get("FOLDCC_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "foldcc"


def write(name: str, text: str) -> Path:
    """Puts text into a file whose name says what is in it. Two processes that write at once leave one whole file.

    Raises:
        FoldError: the directory cannot be written.
    """
    path = directory() / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.py"
    try:
        if not path.exists():
            put(path, text)
    except OSError as error:
        raise FoldError(
            f"Emitted kernels cannot be written: {error}.",
            at=str(path.parent),
            valid="a directory that can be written, in the environment variable FOLDCC_CACHE",
        ) from None
    return path


def put(path: Path, found: str | bytes) -> None:
    """Makes a file, of which nobody sees a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(found if isinstance(found, bytes) else found.encode())
    os.replace(file.name, path)


def load(path: Path) -> ModuleType:
    """The module in a file of kernels, as the file is now. Without a GPU, kernels run in Triton's interpreter.

    Raises:
        FoldError: Triton is missing.
    """
    require_triton()
    read = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    name = "_".join(["foldcc_kernels", path.stem, read, *([] if target() is None else [str(target())])])
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def unusable() -> str | None:
    """Why kernels cannot run, or be compiled, in this process; None if they can."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed, and kernels are written in it"
    version = _version(triton)
    if version not in TRITON:
        return f"Triton {triton.__version__} is installed, and kernels are written for {_told(TRITON)}"
    if target() is not None and triton.knobs.runtime.interpret:
        return "Triton interprets its kernels in this process, and does not compile them"
    interpreted = target() is None and (triton.knobs.runtime.interpret or not torch.cuda.is_available())
    if interpreted and version < (3, 7) and _version(numpy) >= NUMPY:
        return f"The interpreter of Triton {triton.__version__} fails on NumPy {numpy.__version__}, and kernels would run in it"
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability()) < OLDEST:
        return (
            f"The GPU is an sm_{capability[0]}{capability[1]}, and kernels are written for sm_{OLDEST[0]}{OLDEST[1]} and later"
        )
    return None


def _version(package: ModuleType) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", package.__version__)[:2])


def _told(versions: Sequence[tuple[int, int]]) -> str:
    return " and ".join(f"{a}.{b}" for a, b in versions)


def require_triton() -> None:
    """Makes sure that kernels can run, in Triton's interpreter on a machine without a GPU, or be compiled.

    Raises:
        FoldError: they cannot; why.
    """
    why = unusable()
    if why is not None:
        instead = f"kernels='aten', or Triton {_told(TRITON)} in a process of its own; interpreted, 3.7 or with numpy<2.4"
        raise FoldError(f"{why}.", valid=instead)
    import triton

    if target() is None and not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        _interpret()


def _interpret() -> None:
    """Switches Triton's interpreter on. Its own library, such as `tl.sum`, was made for a GPU when it was imported."""
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    triton.knobs.runtime.interpret = True
    for module in (tl, tl.standard):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))
    InterpreterBuilder.create_dot = _with_bfloat16(InterpreterBuilder.create_dot)


def _with_bfloat16(dot: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter keeps bfloat16 as its bits, and would multiply those as whole numbers."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(builder, wide(a), wide(b), *others)

    return create_dot
