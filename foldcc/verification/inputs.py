"""What both programs are run on: random elements for all that is a real number, random positions for what is an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from foldcc import ops
from foldcc.program import Program
from foldcc.rules.aten import argument
from foldcc.verification.field import Field
from foldcc.verification.meanings import MOVES

aten = torch.ops.aten
_FEW = 64  # a buffer with so many distinct values at most, and several times as many elements, is data such as a mask
_SEEDED = 4  # every so many positions, one is a special one
_COMPARING = frozenset("eq ne lt le gt ge clamp clamp_min clamp_max maximum minimum floor ceil round trunc isin".split())
_IGNORED = 4  # every so many labels one is left out, and all of the first sample's, so that ranks count differently

_COUNTS = 100


def random_inputs(
    program: Program,
    field: Field,
    held: Mapping[str, Tensor],
    generator: torch.Generator,
    *,
    extreme: bool = False,
    full_rows: bool = False,
) -> dict[str, Tensor]:
    """A value for every slot of a captured program, by the slot's name: whole tensors.

    Args:
        held: buffers by name. Integers and booleans keep their values, and so do numbers that are data: few distinct ones,
            as in a mask, or such as something compares. Of other buffers the values are drawn.
        extreme: one value for each integer input: every label is ignored, every mask is zero, every id a special one.
        full_rows: of a padding mask so much is valid that every query of the program's attention may attend to something.
    """
    found = {}
    for slot, node in zip(program.slots, program.placeholders, strict=True):
        like = node.meta["val"]
        if slot.kind == "constant":
            constant = program.constants[slot.name]
            found[slot.name] = field.numbers(constant.cpu()) if constant.is_floating_point() else constant.cpu()
        elif slot.kind == "buffer" and (data := _data(node, held.get(slot.names[0]))) is not None:
            found[slot.name] = field.numbers(data)
        elif like.is_floating_point():
            found[slot.name] = field.random(like.shape, generator)
        elif slot.kind == "buffer" and held[slot.names[0]].device.type != "meta":
            found[slot.name] = held[slot.names[0]].cpu()
        else:
            found[slot.name] = _positions(node, generator, extreme)
            if full_rows and (windows := _masking(node)) and like.dim() == 2:
                found[slot.name][:, :: min(windows)] = 1
    return found


def _masking(node: fx.Node) -> list[int]:
    """The windows, or all positions where there is none, of attention that an input is the padding mask of."""
    readers = [user for user, x in _uses(node, _integral) if user.target is ops.attention and argument(user, "valid") is x]
    return [argument(user, "window") or argument(user, "k").meta["val"].shape[2] for user in readers]


def _data(node: fx.Node, buffer: Tensor | None) -> Tensor | None:
    """A float buffer's values where they are data, cut to the size that the program has."""
    like = node.meta["val"]
    if buffer is None or not like.is_floating_point() or buffer.device.type == "meta" or buffer.dim() != like.dim():
        return None
    if any(n > m for n, m in zip(like.shape, buffer.shape, strict=True)):
        return None
    values = buffer.detach().cpu()[tuple(slice(n) for n in like.shape)]
    distinct = len(values.unique())
    few = 2 <= distinct <= min(_FEW, max(2, values.numel() // 4))
    return values if few or any(_name(user) in _COMPARING for user, _ in _uses(node, _moved)) else None


def _positions(node: fx.Node, generator: torch.Generator, extreme: bool) -> Tensor:
    like = node.meta["val"]
    bound, ignored, special = _range(node)
    if not like.dim() and bound is None and like.dtype != torch.bool:  # a count, which programs divide by
        return torch.randint(1, _COUNTS, (), generator=generator, dtype=like.dtype)
    if extreme:
        return torch.full(tuple(like.shape), [*special, 0][0] if ignored is None else ignored, dtype=like.dtype)
    values = torch.randint(0, bound or 2, tuple(like.shape), generator=generator)
    if special:
        seeded = torch.randint(0, _SEEDED, tuple(like.shape), generator=generator) == 0
        drawn = torch.tensor(special)[torch.randint(0, len(special), tuple(like.shape), generator=generator)]
        values = torch.where(seeded, drawn, values)
    if ignored is not None and like.dim():
        left_out = torch.randint(0, _IGNORED, tuple(like.shape), generator=generator) == 0
        left_out[0] = True
        left_out[-1, ..., -1] = False
        values = torch.where(left_out, ignored, values)
    return values.to(like.dtype)


def _range(node: fx.Node) -> tuple[int | None, int | None, list[int]]:
    """How many values an integer input may take, if its uses say it, the label that is ignored, and special ids:
    padding, and what the program compares with, a step below and above it."""
    bounds: list[int] = []
    ignored, compared = None, set()
    for user, x in _uses(node, _integral):
        if user.target is aten.embedding.default and user.args[1] is x:
            rows = user.args[0].meta["val"].shape[0]
            bounds.append(rows)
            padding = argument(user, "padding_idx")
            compared |= {padding % rows} if padding is not None and padding != -1 else set()
        elif user.target is ops.token_loss and argument(user, "target") is x:
            bounds.append(argument(user, "logits").meta["val"].shape[1])
            ignored = argument(user, "ignore_index")
        elif _name(user) in _COMPARING:
            numbers = [int(y) for y in pytree.tree_leaves((user.args, user.kwargs)) if type(y) in (int, float) and y == y // 1]
            compared |= {c + step for c in numbers for step in ((0,) if _name(user) in ("eq", "ne") else (-1, 0, 1))}
    bound = min(bounds) if bounds else None
    return bound, ignored, sorted(c for c in compared if bound is None or 0 <= c < bound)


def _uses(node: fx.Node, through: Callable[[fx.Node], bool]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Who reads a value, or what is made of it by the operators that are looked through, with what they read; in blocks too."""
    seen, left = {node}, [node]
    while left:
        x = left.pop()
        for user in x.users:
            yield user, x
            entered = [user] if user.op == "call_function" and through(user) else []
            if user.op == "call_module":
                block = x.graph.owning_module.get_submodule(str(user.target))
                inside = block.graph.find_nodes(op="placeholder")
                entered = [p for p, a in zip(inside, user.args, strict=True) if a is x]
            for y in entered:
                if y not in seen:
                    seen.add(y)
                    left.append(y)


def _name(node: fx.Node) -> str:
    return str(node.target._schema.name.split("::")[1]) if hasattr(node.target, "_schema") else ""


def _integral(node: fx.Node) -> bool:
    return isinstance(v := node.meta.get("val"), Tensor) and not v.is_floating_point()


def _moved(node: fx.Node) -> bool:
    return _name(node) in MOVES or _name(node) in ("_to_copy", "to", "view", "_unsafe_view")
