"""What both programs are run on: random elements for all that is a real number, random positions for what is an index."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from foldcc import ops
from foldcc.program import Program
from foldcc.rules.aten import argument
from foldcc.verification.field import Field

aten = torch.ops.aten
_IGNORED = 4  # every so many labels one is left out, and all of the first sample's, so that ranks count differently

_COUNTS = 100


def random_inputs(program: Program, field: Field, held: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """A value for every slot of a captured program, by the slot's name: whole tensors.

    Args:
        held: buffers by name; of these, integers and booleans keep their values.
    """
    found = {}
    for slot, node in zip(program.slots, program.placeholders, strict=True):
        like = node.meta["val"]
        if slot.kind == "constant":
            constant = program.constants[slot.name]
            found[slot.name] = field.numbers(constant.cpu()) if constant.is_floating_point() else constant.cpu()
        elif like.is_floating_point():
            found[slot.name] = field.random(like.shape, generator)
        elif slot.kind == "buffer" and held[slot.names[0]].device.type != "meta":
            found[slot.name] = held[slot.names[0]].cpu()
        else:
            found[slot.name] = _positions(node, generator)
    return found


def _positions(node: fx.Node, generator: torch.Generator) -> Tensor:
    like = node.meta["val"]
    bound, ignored = _range(node)
    if not like.dim() and bound is None and like.dtype != torch.bool:  # a count, which programs divide by
        return torch.randint(1, _COUNTS, (), generator=generator, dtype=like.dtype)
    values = torch.randint(0, bound or 2, tuple(like.shape), generator=generator)
    if ignored is not None and like.dim():
        left_out = torch.randint(0, _IGNORED, tuple(like.shape), generator=generator) == 0
        left_out[0] = True
        left_out[-1, ..., -1] = False
        values = torch.where(left_out, ignored, values)
    return values.to(like.dtype)


def _range(node: fx.Node) -> tuple[int | None, int | None]:
    """How many values an integer input may take, if its uses say it, and the label that is ignored."""
    bounds: list[int] = []
    ignored = None
    seen, left = {node}, [node]
    while left:
        x = left.pop()
        for user in x.users:
            if user.target is aten.embedding.default and user.args[1] is x:
                bounds.append(user.args[0].meta["val"].shape[0])
            elif user.target is ops.token_loss and argument(user, "target") is x:
                bounds.append(argument(user, "logits").meta["val"].shape[1])
                ignored = argument(user, "ignore_index")
            elif user not in seen and isinstance(v := user.meta.get("val"), Tensor) and not v.is_floating_point():
                seen.add(user)
                left.append(user)
    return (min(bounds) if bounds else None), ignored
