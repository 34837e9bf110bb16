"""foldcc, a compiler for distributed transformers.

It takes an unmodified PyTorch model and a folded mesh, and returns the same model running in parallel,
with attention and experts each laid out in the way that is best for them, over the same ranks.
"""

from importlib import import_module
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foldcc import inspect as inspect
    from foldcc import mesh as mesh
    from foldcc import ops as ops
    from foldcc.api import init_parameters, parallelize, set_capacity
    from foldcc.capture import register_experts
    from foldcc.codegen import load_kernels
    from foldcc.errors import FoldError
    from foldcc.ir.plan import Plan
    from foldcc.mesh import FoldedMesh, init_folded_mesh
    from foldcc.module import FoldedModule
    from foldcc.ops.capacity import Capacity
    from foldcc.precision import Precision
    from foldcc.runtime.clip import clip_grad_norm_
    from foldcc.saving import load, load_pretrained, save
    from foldcc.verification import verify

__version__ = "0.1.0"
IMPORTED = time()  # when this process began to read the package

__all__ = [
    "Capacity",
    "FoldError",
    "FoldedMesh",
    "FoldedModule",
    "Plan",
    "Precision",
    "clip_grad_norm_",
    "init_folded_mesh",
    "init_parameters",
    "load",
    "load_kernels",
    "load_pretrained",
    "parallelize",
    "register_experts",
    "save",
    "set_capacity",
    "verify",
]

# A wheel holds passes/ and codegen/ inside foldcc/ (see pyproject.toml, package-dir). In a checkout they stand
# beside it and are found there, installed or not, and never in another checkout.
_beside = Path(__file__).resolve().parent.parent
if all((_beside / part).exists() for part in ("pyproject.toml", "passes/__init__.py", "codegen/__init__.py")):
    __path__.append(str(_beside))

_HOMES = {  # imported on first use: `import foldcc` costs nothing
    "Capacity": "foldcc.ops.capacity",
    "FoldError": "foldcc.errors",
    "FoldedMesh": "foldcc.mesh",
    "FoldedModule": "foldcc.module",
    "Plan": "foldcc.ir.plan",
    "Precision": "foldcc.precision",
    "clip_grad_norm_": "foldcc.runtime.clip",
    "init_folded_mesh": "foldcc.mesh",
    "init_parameters": "foldcc.api",
    "load": "foldcc.saving",
    "load_kernels": "foldcc.codegen",
    "load_pretrained": "foldcc.saving",
    "parallelize": "foldcc.api",
    "register_experts": "foldcc.capture",
    "save": "foldcc.saving",
    "set_capacity": "foldcc.api",
    "verify": "foldcc.verification",
}


_MODULES = ("inspect", "mesh", "ops")  # so that `foldcc.ops.experts` needs no import of its own


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"foldcc.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'foldcc' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
