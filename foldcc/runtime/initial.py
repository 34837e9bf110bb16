"""Initial values of parameters: random numbers that are a function of a seed, the parameter's name and global positions.

Modules initialise themselves, as they are written. What they draw into a parameter, each rank draws for the part that it holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from foldcc.errors import FoldError, listed
from foldcc.layout import Layout
from foldcc.mesh import FoldedMesh
from foldcc.ops.operator import by_name
from foldcc.ops.random import DRAWS, check_draw, everywhere, name_of_draw
from foldcc.runtime.placement import positions

aten = torch.ops.aten
_CONSTANT = (aten.fill_.Scalar, aten.zero_.default)


def initialise(
    tree: nn.Module,
    original: nn.Module,
    initialiser: Callable[[nn.Module], None] | None,
    layouts: Mapping[str, Layout],
    mesh: FoldedMesh,
    seed: int,
    elsewhere: Collection[int],
) -> None:
    """Gives every parameter of a tree its initial values.

    Args:
        original: of the same structure, whose classes say how.
        initialiser: initialises what a module holds itself; None for each module's `reset_parameters`.
        layouts: of parameters that are divided, by name.
        elsewhere: the ids of those whose values are on other pipeline stages.

    Raises:
        FoldError: a parameter is initialised in a way that is no function of its positions, or by nothing.
    """
    with torch.no_grad(), _Initial(tree, layouts, mesh, seed, elsewhere) as mode:
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

    def __init__(self, tree: nn.Module, layouts: Mapping[str, Layout], mesh: FoldedMesh, seed: int, elsewhere: Collection[int]):
        super().__init__()
        self.names = {id(p): name for name, p in tree.named_parameters()}
        self.layouts, self.mesh, self.seed, self.elsewhere = layouts, mesh, seed, elsewhere
        self.path = ""
        self.written: set[str] = set()
        self.draws: Counter[str] = Counter()
        self.rows: dict[int, tuple[Tensor, Tensor, int]] = {}  # what stands for a row of a parameter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = name_of_draw(func)
        if func is aten.select.int and id(args[0]) in self.names and args[1] == 0:
            row = torch.empty(args[0].shape[1:])
            self.rows[id(row)] = (row, args[0], args[2] % len(args[0]))
            return row
        if not name and not any(id(x) in self.names or id(x) in self.rows for x in given):
            return func(*args, **kwargs)
        if func in _CONSTANT and id(args[0]) in self.rows:
            _, parameter, place = self.rows[id(args[0])]
            if id(parameter) not in self.elsewhere:
                local, at = self._held(parameter)
                local[at[0] == place] = args[1] if func is aten.fill_.Scalar else 0
            return args[0]
        if not (func._schema.is_mutable and len(given) == 1 and id(given[0]) in self.names):
            raise FoldError(
                f"An initialisation runs {func}, which is no function of a parameter's own positions.",
                at=self.path,
                valid="normal_, uniform_ and other draws, constants, and arithmetic with numbers, in place; or load_state_dict",
            )
        self.written.add(self.names[id(args[0])])
        if not name:
            return func(*args, **kwargs)
        self._draw(func, name, args[0], by_name(func, args, kwargs))
        return args[0]

    def _draw(self, func: Any, operator: str, parameter: Tensor, given: dict[str, Any]) -> None:
        check_draw(func, given)
        if id(parameter) in self.elsewhere:
            return
        local, at = self._held(parameter)
        name = self.names[id(parameter)]
        told = f"{self.seed} {name} {self.draws[name]}".encode()
        self.draws[name] += 1
        key = int.from_bytes(blake2b(told, digest_size=8).digest(), "little", signed=True)
        local.copy_(DRAWS[operator](torch.tensor(key, device=local.device), given | {"at": at, "dtype": local.dtype}))

    def _held(self, parameter: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What this rank holds of a parameter, and its positions along each dimension."""
        if not isinstance(parameter, DTensor):
            return parameter, everywhere(parameter.shape, parameter.device)
        local, layout = parameter.to_local(), self.layouts.get(self.names[id(parameter)])
        at = everywhere(parameter.shape, local.device)
        return local, at if layout is None else positions(at, layout, self.mesh, self.mesh.here)
