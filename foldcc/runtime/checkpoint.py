"""What a checkpoint sees of a folded model and of its optimizer: shards that are boxes.

The shard of a fused weight, such as gate and up over `etp`, is several blocks of its dimension; `_StridedShard` says
so. torch.distributed.checkpoint and torch.distributed.checkpoint.state_dict take the first block's offset for that of all,
so that by themselves they refuse to store it, and load something else into it.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from foldcc.errors import FoldError
from foldcc.runtime.full_states import take_whole_values
from foldcc.runtime.placement import redistributed
from foldcc.runtime.reductions import complete_reductions, tell_all_ranks_of_infinities

_meshes: WeakSet[DeviceMesh] = WeakSet()  # of folded models; what others lay out in blocks is theirs
_watching: list[Any] = []
_hooked: WeakSet[torch.optim.Optimizer] = WeakSet()


def store_boxes(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A state_dict hook that gives each rank one box of such a parameter, by an all-to-all over the axes concerned.

    Loading needs no counterpart: copying into a parameter brings the values to the layout that the parameter has.
    """
    for name, value in state.items():
        state[name] = boxed(value)


def refuse_overwritten(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Stands against what PyTorch's `set_model_state_dict(..., full_state_dict=True)` does, see `full_states.py`.

    It writes one box into the parameters themselves, and then loads them into themselves.
    """
    for name, parameter in module.named_parameters():
        if state.get(prefix + name) is parameter and _in_blocks(parameter):
            raise FoldError(
                f"{name} was written over as if a rank held one box of it, and it holds blocks; load the model again.",
                placements=parameter.placements,
                valid="load_state_dict, or set_model_state_dict without full_state_dict, with DTensors; "
                "torch.distributed.checkpoint.load into state_dict()",
            )


def watch_optimizers(*meshes: DeviceMesh) -> None:
    """From its first step on, an optimizer of parameters on these meshes stores boxes too, and takes them.

    What it reduces of them is complete when it gets it, and what a scaler of losses finds infinite is so on all ranks.
    """
    _meshes.update(meshes)
    if not _watching:
        take_whole_values(_in_blocks)
        complete_reductions(lambda x: x.device_mesh in _meshes)
        tell_all_ranks_of_infinities(lambda x: x.device_mesh in _meshes)
        _watching.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer not in _hooked and any(_in_blocks(p) for group in optimizer.param_groups for p in group["params"]):
        _hooked.add(optimizer)
        optimizer.register_state_dict_post_hook(_store_moments)
        optimizer.register_load_state_dict_post_hook(_take_moments)
        _take_moments(optimizer)  # what was loaded before the first step


def _store_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "state": pytree.tree_map_only(Tensor, boxed, state["state"])}


def _take_moments(optimizer: torch.optim.Optimizer) -> None:
    """Brings what the optimizer keeps of each parameter, in its shape, to the parameter's layout."""
    for parameter, kept in optimizer.state.items():
        if isinstance(parameter, DTensor) and _in_blocks(parameter):
            for name, value in kept.items():
                if isinstance(value, DTensor) and value.shape == parameter.shape:
                    kept[name] = redistributed(value, parameter.placements)


def _in_blocks(x: Any) -> bool:
    return isinstance(x, DTensor) and x.device_mesh in _meshes and any(isinstance(p, _StridedShard) for p in x.placements)


def boxed(x: Any) -> Any:
    """The same value, of which each rank has one box."""
    if not _in_blocks(x):
        return x
    return redistributed(x, [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in x.placements])


def as_laid_out(module: nn.Module, state: dict[str, Any], prefix: str, *, assign: bool) -> None:
    """Makes the plain tensors of a state dict that is loaded what the module's parameters are: DTensors of the same mesh.

    A plain tensor is the whole value. Copied, it comes to the parameter's layout by itself; assigned, it is the parameter
    and must have that layout already.
    """
    for name, p in module.named_parameters(remove_duplicate=False):
        value = state.get(prefix + name)
        if not isinstance(p, DTensor) or not isinstance(value, Tensor) or value.shape != p.shape:
            continue
        if isinstance(value, DTensor) and value.device_mesh != p.device_mesh:
            raise FoldError(
                f"{prefix}{name} is a DTensor on {value.device_mesh}, and the parameter is on {p.device_mesh}.",
                valid="whole values, full_tensor() of each; or torch.distributed.checkpoint, which brings them to another mesh",
            )
        if not isinstance(value, DTensor):
            whole = [Replicate()] * p.device_mesh.ndim
            value = DTensor.from_local(value.to(p.device), p.device_mesh, whole, run_check=False)
        if assign or _in_blocks(p):  # copying would do the latter too, but not say why PyTorch 2.11 cannot
            value = redistributed(value, p.placements, p.device_mesh)
        state[prefix + name] = value
