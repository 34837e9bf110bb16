"""What both programs are run on: random elements for all that is a real number, random positions for what is an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from foldcc.ir.node import argument
from foldcc.ir.program import Program
from foldcc.ops.captured import captured_record
from foldcc.verification.field import Field
from foldcc.verification.meanings import REARRANGES
from foldcc.verification.steps import plain_name, steps

aten = torch.ops.aten
_FEW = 64  # a buffer with so many distinct values at most, and several times as many elements, is data such as a mask
_SEEDED = 3  # every so many positions, one is a special one; no position of every third sample
_EQUAL = frozenset("eq ne isin".split())
_BOUNDED = frozenset("lt le gt ge clamp clamp_min clamp_max maximum minimum hardtanh threshold bucketize searchsorted".split())
_COMPARING = _EQUAL | _BOUNDED | frozenset("floor ceil round trunc sort argsort topk argmax argmin max min amax amin".split())
_FROM_MANY = frozenset("cumsum sum prod argmax argmin argsort one_hot bincount".split())
_IGNORED = 4  # every so many labels one is left out, and all of the first sample's, so that ranks count differently

_COUNTS = 100
_SEGMENTS = 4
_HUGE = 1e30  # a number from here on is no threshold, but the end of a type


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
    found: dict[str, Tensor] = {}
    data: dict[fx.Node, Tensor] = {}  # which keeps its values, as integers or real numbers
    for slot, node in zip(program.slots, program.placeholders, strict=True):
        kept = program.constants[slot.name] if slot.kind == "constant" else held.get(slot.names[0])
        kept = _data(node, kept) if slot.kind == "buffer" and node.meta["val"].is_floating_point() else kept
        if slot.kind in ("buffer", "constant") and kept is not None and kept.device.type != "meta":
            data[node] = kept.detach().cpu()
    field.near[:] = _thresholds(program, data)
    keys = torch.Generator().manual_seed(field.seed)  # as the module draws them, see `origin`
    for slot, node in zip(program.slots, program.placeholders, strict=True):
        like = node.meta["val"]
        if node in data:
            found[slot.name] = field.numbers(data[node]) if data[node].is_floating_point() else data[node]
        elif slot.kind == "key":
            found[slot.name] = torch.empty((), dtype=torch.int64).random_(generator=keys)
        elif like.is_floating_point():
            found[slot.name] = field.random(like.shape, generator)
            if slot.kind == "input" and (equal := _numbers(node, _moved, _EQUAL)):
                special = field.numbers(torch.tensor(sorted(equal), dtype=torch.float64))
                found[slot.name] = _seeded(found[slot.name], special, generator)
        else:
            found[slot.name] = _positions(node, data, generator, extreme)
            if full_rows and (windows := _masking(node)) and like.dim() == 2:
                found[slot.name][:, :: min(windows)] = 1
    return found


def _masking(node: fx.Node) -> list[int]:
    """The windows, or all positions where there is none, of attention that an input is the padding mask of."""
    found = []
    for user, x in _uses(node, _integral):
        p = captured_record(user.target).positions
        if p is not None and argument(user, p.valid) is x:
            found.append(argument(user, p.window) or argument(user, p.keys).meta["val"].shape[p.dim])
        if p is not None and argument(user, p.pairs) is x:
            found.append(1)  # how far it goes is not known
    return found


def _seeded(values: Tensor, special: Tensor, generator: torch.Generator) -> Tensor:
    """Special values at some positions, and at none of every third sample, which is then a plain one."""
    seeded = torch.randint(0, _SEEDED, tuple(values.shape), generator=generator) == 0
    if values.dim():
        seeded[1::3] = False
    drawn = special[torch.randint(0, len(special), tuple(values.shape), generator=generator)]
    return torch.where(seeded, drawn.to(values.dtype), values)


def _thresholds(program: Program, data: Mapping[fx.Node, Tensor]) -> list[float]:
    """The numbers that the program compares with, those of buffers included."""
    found: set[float] = set()
    for block in [program.graph, *program.blocks.values()]:
        for node in block.graph.nodes:
            found |= set(_compared(node)) if plain_name(node) in _BOUNDED else set()
    for node, values in data.items():
        bounding = any(plain_name(user) in _BOUNDED for user, _ in _uses(node, _moved))
        if bounding and values.is_floating_point() and values.numel() <= _FEW:
            found |= {abs(x) for x in values.flatten().tolist()}
    return sorted(x for x in found if 0 < x < _HUGE)


def _compared(node: fx.Node) -> list[float]:
    return [abs(float(x)) for x in pytree.tree_leaves((node.args[1:], node.kwargs)) if type(x) in (int, float)]


def _numbers(node: fx.Node, through: Callable[[fx.Node], bool], names: frozenset[str]) -> set[float]:
    """The numbers that a value is compared with by operators of some names."""
    users = [u for u, _ in _uses(node, through) if plain_name(u) in names]
    return {float(x) for u in users for x in pytree.tree_leaves((u.args, u.kwargs)) if type(x) in (int, float)}


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
    return values if few or any(plain_name(user) in _COMPARING for user, _ in _uses(node, _moved)) else None


def _positions(node: fx.Node, data: Mapping[fx.Node, Tensor], generator: torch.Generator, extreme: bool) -> Tensor:
    like = node.meta["val"]
    bound, ignored, special, there = _range(node, data)
    if not like.dim() and bound is None and like.dtype != torch.bool:  # a count, which programs divide by
        return torch.randint(1, _COUNTS, (), generator=generator, dtype=like.dtype)
    if extreme:
        return torch.full(tuple(like.shape), [*special, 0][0] if ignored is None else ignored, dtype=like.dtype)
    each = bound or (_SEGMENTS if _compared_with_itself(node) and like.dtype != torch.bool else 2)
    there = range(each) if there is None else range(max(0, there.start), there.stop)[:each]
    values = torch.randint(there.start, there.stop, tuple(like.shape), generator=generator)
    values = _seeded(values, torch.tensor(special), generator) if special else values
    if ignored is not None and like.dim():
        left_out = torch.randint(0, _IGNORED, tuple(like.shape), generator=generator) == 0
        left_out[0] = True
        left_out[(-1,) * left_out.dim()] = False
        values = torch.where(left_out, ignored, values)
    return values.to(like.dtype)


def _compared_with_itself(node: fx.Node) -> bool:
    """Whether a value's elements are compared with each other, as segments of packed samples are."""
    there = {node, *(user for user, x in _uses(node, _integral))}
    return any(
        plain_name(user) in ("eq", "ne", "lt", "le", "gt", "ge")
        and len(user.all_input_nodes) == 2
        and there >= {*user.all_input_nodes}
        for user in there
    )


def _range(node: fx.Node, data: Mapping[fx.Node, Tensor]) -> tuple[int | None, int | None, list[int], range | None]:
    """How many values an integer input may take, if its uses say it, the label that is ignored, and special ids:
    padding, and what the program compares with or steps at, a step below and above it; and which values may be drawn."""
    bounds: list[int] = []
    ignored, compared = None, set()
    for user, x in _uses(node, _each):
        index = captured_record(user.target).index
        if index is not None and argument(user, index.operand) is x:
            rows = argument(user, index.table).meta["val"].shape[index.dim]
            bounds.append(rows)
            if index.padding and (padding := argument(user, index.padding)) not in (None, -1):
                compared.add(padding % rows)
            ignored = argument(user, index.ignored) if index.ignored else ignored
        elif plain_name(user) in _EQUAL | _BOUNDED:
            numbers = [int(y) for y in pytree.tree_leaves((user.args, user.kwargs)) if type(y) in (int, float) and y == y // 1]
            compared |= {c + step for c in numbers for step in ((0,) if plain_name(user) in _EQUAL else (-1, 0, 1))}
    bound = min(bounds) if bounds else None
    found, there = (set(), None) if node.meta["val"].dtype == torch.bool else steps(node, bound, data)
    return bound, ignored, sorted(c for c in compared | found if there is None or c in there), there


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


def _integral(node: fx.Node) -> bool:
    return isinstance(v := node.meta.get("val"), Tensor) and not v.is_floating_point()


def _each(node: fx.Node) -> bool:
    """Whether a node makes an integer of each integer, so that the range of one tells that of the other."""
    together = plain_name(node) in ("add", "sub", "mul") and len(node.all_input_nodes) > 1
    return _integral(node) and not together and plain_name(node) not in _FROM_MANY


def _moved(node: fx.Node) -> bool:
    return plain_name(node) in REARRANGES | {"_to_copy", "to"}
