"""What a checkpoint sees of a folded model: shards that are boxes.

The shard of a fused weight, such as gate and up over `etp`, is several blocks of its dimension; `_StridedShard` says
so, and torch.distributed.checkpoint, which stores one box for each rank, refuses it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def store_boxes(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A state_dict hook that gives each rank one box of such a parameter, by an all-to-all over the axes concerned.

    Loading needs no counterpart: copying into a parameter brings the values to the layout that the parameter has.
    """
    for name, value in state.items():
        if isinstance(value, DTensor) and any(isinstance(p, _StridedShard) for p in value.placements):
            boxes = [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in value.placements]
            state[name] = value.redistribute(placements=boxes)
