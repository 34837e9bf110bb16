"""What tests of foldcc, and of code that uses it, are built from; see docs/testing.md. The strategies need hypothesis."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foldcc.testing.batches import decoder_batch, uneven_batch
    from foldcc.testing.configs import DecoderConfig, ExpertsConfig
    from foldcc.testing.decoder import Decoder
    from foldcc.testing.draws import drawing_alike
    from foldcc.testing.equivalence import Equivalence, check_equivalence
    from foldcc.testing.float64 import in_float64
    from foldcc.testing.folds import folded_meshes
    from foldcc.testing.processes import end_processes, run_distributed
    from foldcc.testing.routing import Routing
    from foldcc.testing.strategies import (
        Case,
        dense_models,
        inputs,
        meshes,
        models,
        moe_models,
        programs,
        routings,
    )
    from foldcc.testing.text import assert_rewrites, program

__all__ = [
    "Case",
    "Decoder",
    "DecoderConfig",
    "Equivalence",
    "ExpertsConfig",
    "Routing",
    "assert_rewrites",
    "check_equivalence",
    "decoder_batch",
    "dense_models",
    "drawing_alike",
    "end_processes",
    "folded_meshes",
    "in_float64",
    "inputs",
    "meshes",
    "models",
    "moe_models",
    "program",
    "programs",
    "routings",
    "run_distributed",
    "uneven_batch",
]

_HOMES = {  # imported on first use: pytest loads the plugin beside this in every run
    "batches": ["decoder_batch", "uneven_batch"],
    "configs": ["DecoderConfig", "ExpertsConfig"],
    "decoder": ["Decoder"],
    "draws": ["drawing_alike"],
    "equivalence": ["Equivalence", "check_equivalence"],
    "float64": ["in_float64"],
    "folds": ["folded_meshes"],
    "processes": ["end_processes", "run_distributed"],
    "routing": ["Routing"],
    "strategies": ["Case", "dense_models", "inputs", "meshes", "models", "moe_models", "programs", "routings"],
    "text": ["assert_rewrites", "program"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "mutate":
        return import_module("foldcc.testing.mutate")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'foldcc.testing' has no attribute {name!r}")
    value = getattr(import_module(f"foldcc.testing.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "mutate"})
