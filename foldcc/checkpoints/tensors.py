"""The tensors of a model that checkpoints hold, and which of them this rank has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from foldcc.tree import unsaved_buffers


def tensors(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Every parameter, and every buffer that checkpoints hold, with all of its names."""
    unsaved = {name for name, _ in unsaved_buffers(model)}
    buffers = ((n, b) for n, b in model.named_buffers(remove_duplicate=False) if n not in unsaved)
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, x in (*model.named_parameters(remove_duplicate=False), *buffers):
        found.setdefault(id(x), ([], x))[0].append(name)
    yield from found.values()


def held(model: nn.Module, names: Iterable[str]) -> Tensor | None:
    """A tensor of the folded model by one of its names; None if it is on another pipeline stage."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        for x in (module._parameters.get(attribute), module._buffers.get(attribute)):
            if x is not None:
                return x
    return None


def some(things: Iterable[object], most: int = 8) -> str | None:
    """`a, b, and 7 more`, for an error."""
    found = list(map(str, things))
    more = [f"and {len(found) - most} more"] if len(found) > most else []
    return ", ".join([*found[:most], *more]) or None
