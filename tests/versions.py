"""What older versions of PyTorch lack; tests that need it are skipped there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion


def since(version: tuple[int, int], lacking: str) -> Any:
    """A mark of tests that PyTorch can run since a version.

    Args:
        lacking: what earlier versions do not do.
    """
    return pytest.mark.skipif(TorchVersion(torch.__version__) < version, reason=f"PyTorch {torch.__version__} {lacking}")


joins_blocks = since((2, 12), "joins no weight that is cut in several blocks")
dynamo_traces_modules_that_functions_are_given = since((2, 12), "has a Dynamo that takes such modules for constants")
TRACERS = ("export", pytest.param("dynamo", marks=dynamo_traces_modules_that_functions_are_given))
