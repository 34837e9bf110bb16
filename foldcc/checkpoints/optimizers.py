"""What optimizers keep, by the names of parameters: so that it does not matter which rank holds them, and in which group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate, Shard, zeros
from torch.optim import Optimizer

from foldcc.checkpoints.tensors import some, tensors
from foldcc.errors import FoldError
from foldcc.mesh import FoldedMesh
from foldcc.runtime.checkpoint import boxed
from foldcc.runtime.placement import redistributed

if TYPE_CHECKING:
    from foldcc.module import FoldedModule

# Of each optimizer, by the name of a parameter: its group, the group's options, and what is kept of it besides tensors.
Told = list[dict[str, dict[str, Any]]]


def stored(model: FoldedModule, optimizers: list[Optimizer]) -> tuple[dict[str, Tensor], Told]:
    """The tensors that optimizers keep on this rank, by key; and the rest. What is tied is of the first stage that has it."""
    elsewhere = {id(model.get_parameter(n)) for n in model._elsewhere.counted}
    found: dict[str, Tensor] = {}
    told: Told = []
    for i, (optimizer, names) in enumerate(_named(model, optimizers)):
        told.append({})
        for number, group in enumerate(optimizer.param_groups):
            options = {key: x for key, x in group.items() if key != "params"}
            for p in (p for p in group["params"] if id(p) not in elsewhere):
                kept = optimizer.state.get(p, {})
                found |= {_key(i, names[id(p)], key): boxed(x) for key, x in kept.items() if isinstance(x, Tensor)}
                others = {key: x for key, x in kept.items() if not isinstance(x, Tensor)}
                host = [key for key, x in kept.items() if isinstance(x, Tensor) and x.device.type == "cpu"]
                told[-1][names[id(p)]] = {"group": number, "options": options, "others": others, "host": host}
    return found, told


def _key(optimizer: int, name: str, key: str) -> str:
    return f"optimizer{optimizer}.{name}:{key}"


def _named(model: FoldedModule, optimizers: list[Optimizer]) -> list[tuple[Optimizer, dict[int, str]]]:
    """Each optimizer, and the names of its parameters: of those of a tied one, that which is first in the whole model."""
    first = {name: names[0] for names, _ in tensors(model._compiler.model) for name in names}
    names = {id(p): first[name] for name, p in model.named_parameters()}
    for optimizer in optimizers:
        others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
        if others:
            raise FoldError(
                f"{type(optimizer).__name__} holds {len(others)} parameters that are not the folded model's.",
                shapes=some(list(p.shape) for p in others),
                valid="an optimizer of folded.parameters(), made behind to_empty; others' state in an argument of your own",
            )
    return [(optimizer, names) for optimizer in optimizers]


def of_all_stages(mesh: FoldedMesh, mine: Told) -> Told:
    """What every pipeline stage has told. Collective over the world."""
    if mesh.size("pp") == 1:
        return mine
    told: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(told, mine)
    return [{name: x for theirs in told for name, x in theirs[i].items()} for i in range(len(mine))]


def check(model: FoldedModule, optimizers: list[Optimizer], told: Told) -> None:
    """Raises unless the optimizers are of as many parameters as those that were stored, in groups of the same options."""
    if len(told) != len(optimizers):
        raise FoldError(
            f"The checkpoint holds {len(told)} optimizers, and {len(optimizers)} are given.",
            valid="as many, in the same order; none for weights alone" if told else "none; or foldcc.save with an optimizer",
        )
    for (optimizer, names), saved in zip(_named(model, optimizers), told, strict=True):
        own = {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        if missing := own - set(saved):
            raise FoldError(
                f"The checkpoint's optimizer does not hold {len(missing)} parameters that {type(optimizer).__name__} holds.",
                missing=some(sorted(missing)),
                valid="the parameters that it was made with; the same ones frozen",
            )
        for group in optimizer.param_groups:
            theirs = {saved[names[id(p)]]["group"] for p in group["params"]}
            if len(theirs) > 1:
                raise FoldError(
                    f"Parameters of one group of {type(optimizer).__name__} were in {len(theirs)} groups of the checkpoint's.",
                    valid="groups that were divided as they are, or further",
                )


def room(model: FoldedModule, optimizers: list[Optimizer], told: Told, there: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by key to read into, laid out over ranks as the parameters are.

    Args:
        there: what the checkpoint holds, by key.
    """
    keys: dict[str, list[str]] = {}
    for key in there:
        owner, _, what = key.rpartition(":")
        keys.setdefault(owner, []).append(what)
    found = {}
    for i, (optimizer, names) in enumerate(_named(model, optimizers)):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            name = names[id(p)]
            for what in keys.get(_key(i, name, "")[:-1], ()):
                entry: TensorStorageMetadata = there[_key(i, name, what)]
                device = torch.device("cpu") if what in told[i][name]["host"] else p.device
                found[_key(i, name, what)] = _empty(boxed(p), entry, device)
    return found


def _empty(p: Tensor, entry: TensorStorageMetadata, device: torch.device) -> Tensor:
    dtype = entry.properties.dtype
    if not isinstance(p, DTensor) or len(entry.size) != p.dim():
        return torch.zeros(entry.size, dtype=dtype, device=device)
    alike = [Replicate() if isinstance(q, Shard) and entry.size[q.dim] != p.shape[q.dim] else q for q in p.placements]
    return zeros(entry.size, dtype=dtype, device_mesh=p.device_mesh, placements=alike)


def take(model: FoldedModule, optimizers: list[Optimizer], told: Told, read: Mapping[str, Tensor]) -> None:
    """Gives optimizers what was read."""
    for i, (optimizer, names) in enumerate(_named(model, optimizers)):
        for group in optimizer.param_groups:
            for p in group["params"]:
                name, state = names[id(p)], {}
                for key in [k for k in read if k.startswith(_key(i, name, ""))]:
                    x = read[key]
                    if isinstance(x, DTensor) and isinstance(p, DTensor) and x.shape == p.shape:
                        x = redistributed(x, p.placements)
                    state[key.rpartition(":")[2]] = x
                state |= told[i][name]["others"]
                if state:
                    optimizer.state[p] = state
                group.update(told[i][name]["options"])
