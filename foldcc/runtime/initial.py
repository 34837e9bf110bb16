"""Initial values of parameters: random numbers that are a function of a seed, the parameter's name and global positions.

Modules initialise themselves, as they are written. What they draw into a parameter, each rank draws for the part that it holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from foldcc.errors import FoldError, listed
from foldcc.layout import Layout
from foldcc.mesh import FoldedMesh
from foldcc.ops.operator import by_name
from foldcc.ops.random import DRAWS, check_draw, everywhere, name_of_draw
from foldcc.runtime.placement import positions


def initialise(
    tree: nn.Module,
    original: nn.Module,
    initialiser: Callable[[nn.Module], None] | None,
    layouts: Mapping[str, Layout],
    mesh: FoldedMesh,
    seed: int,
) -> None:
    """Gives every parameter of a tree its initial values.

    Args:
        original: of the same structure, whose classes say how.
        initialiser: initialises what a module holds itself; None for each module's `reset_parameters`.
        layouts: of parameters that are divided, by name.

    Raises:
        FoldError: a parameter is initialised in a way that is no function of its positions, or by nothing.
    """
    with torch.no_grad(), _Initial(tree, layouts, mesh, seed) as mode:
        for path, module in tree.named_modules():
            mode.path = path
            if initialiser is not None:
                initialiser(module)
            elif any(True for _ in module.parameters(recurse=False)):
                _reset(module, type(original.get_submodule(path)), path)
    left = [name for name, _ in tree.named_parameters() if name not in mode.written]
    if left:
        raise FoldError(f"Nothing initialises {left[0]}.", parameters=listed(left), valid="load_state_dict")


def _reset(module: nn.Module, cls: type, path: str) -> None:
    reset = getattr(cls, "reset_parameters", None)
    if reset is None:
        raise FoldError(
            f"{cls.__name__} does not say how its parameters are initialised.",
            at=path or None,
            valid="a method reset_parameters(); or load_state_dict",
        )
    reset(module)


class _Initial(TorchDispatchMode):
    """Attributes:
    path: of the module that initialises itself.
    written: the parameters that have values, by name.
    """

    def __init__(self, tree: nn.Module, layouts: Mapping[str, Layout], mesh: FoldedMesh, seed: int):
        super().__init__()
        self.names = {id(p): name for name, p in tree.named_parameters()}
        self.layouts, self.mesh, self.seed = layouts, mesh, seed
        self.path = ""
        self.written: set[str] = set()
        self.draws: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        read = [self.names[id(x)] for x in _tensors((args, kwargs)) if id(x) in self.names]
        name = name_of_draw(func)
        if not read and not name:
            return func(*args, **kwargs)
        alone = func._schema.is_mutable and len(read) == 1 == len(list(_tensors((args, kwargs))))
        if not alone:
            raise FoldError(
                f"An initialisation runs {func}, which is no function of a parameter's own positions.",
                at=self.path,
                valid="normal_, uniform_ and other draws, constants, and arithmetic with numbers, in place; or load_state_dict",
            )
        self.written.update(read)
        if not name:
            return func(*args, **kwargs)
        self._draw(func, name, read[0], args[0], by_name(func, args, kwargs))
        return args[0]

    def _draw(self, func: Any, operator: str, name: str, parameter: Tensor, given: dict[str, Any]) -> None:
        check_draw(func, given)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        at = everywhere(parameter.shape, local.device)
        if isinstance(parameter, DTensor) and name in self.layouts:
            at = positions(at, self.layouts[name], self.mesh, dist.get_rank())
        told = f"{self.seed} {name} {self.draws[name]}".encode()
        self.draws[name] += 1
        key = int.from_bytes(blake2b(told, digest_size=8).digest(), "little", signed=True)
        local.copy_(DRAWS[operator](torch.tensor(key, device=local.device), given | {"at": at, "dtype": local.dtype}))


def _tensors(arguments: Any) -> Iterator[Tensor]:
    return (x for x in torch.utils._pytree.tree_leaves(arguments) if isinstance(x, Tensor))
