"""A model as it is, in one process, drawing what its captured program draws: one key for each draw, and whole tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foldcc.ops.operator import by_name
from foldcc.ops.random import DRAWS, check_draw, everywhere, kept, name_of_draw


class Drawn(TorchDispatchMode):
    """Inside it, each random operator takes one number from the default generator, and draws what that is the key of.

    One that is given a generator of its own draws from that, as ever.

    Attributes:
        count: how often something was drawn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = name_of_draw(func)
        given = by_name(func, args, kwargs) if name else {}
        if not name or given.get("dropout_p") == 0 or given.get("train") is False or given.get("generator") is not None:
            return func(*args, **kwargs)
        if name not in DRAWS:  # without autograd, PyTorch leaves operators that are made of others as they are
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        check_draw(func, given)
        found = self._draw(name, given)
        return args[0].copy_(found) if func._schema.is_mutable else found

    def _draw(self, name: str, given: dict[str, Any]) -> Any:
        like = given["input"] if name == "native_dropout" else _like(name, given)
        share = {"native_dropout": 1 - given.get("p", 0), "bernoulli": given.get("p")}.get(name)
        if share in (0, 1):  # certain, and drawn by nobody
            found = torch.full_like(like, share)
            return (like * share, found.bool()) if name == "native_dropout" else found
        self.count += 1
        key = torch.empty((), dtype=torch.int64, device="cpu").random_().to(like.device)
        at = everywhere(like.shape, like.device)
        if name == "native_dropout":
            keep = kept(key, at, share)
            return like * keep * (1 / share), keep
        return DRAWS[name](key, given | {"at": at, "dtype": like.dtype})


def _like(name: str, given: dict[str, Any]) -> Tensor:
    """What an operator's result is like."""
    told = {n: x for n in ("dtype", "device") if isinstance(x := given.get(n), (torch.dtype, torch.device))}
    whole = {"dtype": torch.int64} if name in ("randint", "randperm", "multinomial") else {}
    if name == "multinomial":
        return torch.empty((*given["self"].shape[:-1], given["num_samples"]), **whole, device=given["self"].device)
    if name == "randperm" or given.get("size") is not None:
        return torch.empty([given["n"]] if name == "randperm" else given["size"], **whole | told)
    tensors = torch.broadcast_tensors(*(x for x in given.values() if isinstance(x, Tensor)))
    return torch.empty_like(tensors[0], **told)
