"""Keys: what random numbers of one call are functions of, besides where they stand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from foldcc.mesh import FoldedMesh


def draw_keys(count: int, mesh: FoldedMesh, device: torch.device) -> Iterator[Tensor]:
    """A key for each draw of a program, from PyTorch's default generator: the first rank's. Collective, unless there are none.

    One number for each, so that the generator stands where the model's own draws, key by key, would leave it.
    """
    if not count:
        return iter(())
    keys = torch.empty(count, dtype=torch.int64, device="cpu").random_().to(device)
    if not mesh.is_virtual:
        dist.broadcast(keys, src=0)
    return iter(keys.unbind())
