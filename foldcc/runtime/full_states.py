"""Whole values that torch.distributed.checkpoint.state_dict hands to parameters which are divided in blocks.

With `broadcast_from_rank0` it writes a rank's part into the parameter itself, and takes the first block's offset for that of
all: the rest of the value is then nowhere. So the one function that does so is given a value's parts by placements for such
parameters of folded models, and does what it did for all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed._state_dict_utils as utils
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from foldcc.runtime.placement import redistributed

_NAME = "_distribute_tensors"


def take_whole_values(in_blocks: Callable[[Any], bool]) -> None:
    """Lets DTensor lay out the values of parameters in blocks. Where PyTorch has no such function, loading refuses them."""
    before = getattr(utils, _NAME, None)
    if before is None:
        return

    def distribute(local_state_dict: dict[str, Any], keys: list[str], *args: Any, **kwargs: Any) -> None:
        for key in keys:
            pair = local_state_dict.get(key)
            if isinstance(pair, tuple) and in_blocks(pair[0]):
                local_state_dict[key] = _laid_out(*pair)
        before(local_state_dict, keys, *args, **kwargs)  # which leaves tensors as they are

    setattr(utils, _NAME, distribute)


def _laid_out(parameter: DTensor, value: Tensor) -> DTensor:
    mesh, whole = parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim
    value = value.to(parameter.device if parameter.device.type != "meta" else mesh.device_type, parameter.dtype)
    return redistributed(DTensor.from_local(value, mesh, whole, run_check=False), parameter.placements)
