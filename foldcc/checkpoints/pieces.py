"""Tensors that are not read yet: what is made of a checkpoint's tensors before a rank reads the part that it holds.

A library that renames and rearranges what it loads (fuses experts, splits a projection, transposes) does so by PyTorch's
functions. On a `Piece` they are only written down. Which elements of the files a part of the result consists of then follows
backwards, one set of positions for each dimension:

    w = stack([e0, e1, e2]).transpose(1, 2)
    read(w, [2], [0, 1], [5, 6])  reads  e2 at [5, 6], [0, 1]  and nothing else
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from foldcc.ops.operator import by_name

aten = torch.ops.aten
Positions = Sequence[Tensor]  # int64, one for each dimension: what is wanted is their product
Read = Callable[[Tensor, Positions], None]
_MOST_RUNS = 16  # of neighbours along a dimension that are read one by one


class Piece(torch.Tensor):
    """A tensor without values.

    Attributes:
        read: writes the elements at given positions into a tensor of their shape.
        leaves: what it is made of.
    """

    read: Read
    leaves: tuple[Any, ...]

    @staticmethod
    def __new__(cls, like: Tensor, read: Read, leaves: tuple[Any, ...]) -> Piece:
        options: Any = {"strides": like.stride(), "dtype": like.dtype, "device": "cpu"}
        new: Piece = torch.Tensor._make_wrapper_subclass(cls, like.shape, **options)
        new.read, new.leaves = read, leaves
        return new

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"Piece({list(self.shape)}, {self.dtype}, of {list(self.leaves)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        on_meta = pytree.tree_map_only(Piece, lambda x: x.new_meta(), (args, kwargs))
        made = func(*on_meta[0], **{**on_meta[1], **({"device": "meta"} if kwargs.get("device") is not None else {})})
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Piece)]
        leaves = tuple(dict.fromkeys(leaf for x in given for leaf in x.leaves))
        readers = _readers(func, args, kwargs, made)
        results = [Piece(x, r, leaves) for x, r in zip(pytree.tree_leaves(made), readers, strict=True)]
        return pytree.tree_unflatten(results, pytree.tree_structure(made))

    def new_meta(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")


def leaf(shape: Sequence[int], dtype: torch.dtype, name: Any, fetch: Callable[[tuple[slice, ...]], Tensor]) -> Piece:
    """What is read as it is, by slices."""

    def read(out: Tensor, at: Positions) -> None:
        _fetch(out, at, fetch)

    return Piece(torch.empty(tuple(shape), dtype=dtype, device="meta"), read, (name,))


def part(x: Piece, at: Positions) -> Tensor:
    """The elements of a piece at these positions."""
    out = torch.empty([len(p) for p in at], dtype=x.dtype)
    x.read(out, at)
    return out


def whole(x: Piece) -> Tensor:
    return part(x, [torch.arange(n) for n in x.shape])


def _fetch(out: Tensor, at: Positions, fetch: Callable[[tuple[slice, ...]], Tensor]) -> None:
    """Reads runs of neighbours; where there are many along a dimension, what lies between them too."""
    if not all(map(len, at)):
        return
    for dim, places in enumerate(at):
        runs = _runs(places)
        if len(runs) > _MOST_RUNS:
            first = int(places.min())
            near = torch.arange(first, int(places.max()) + 1)
            between = out.new_empty([*out.shape[:dim], len(near), *out.shape[dim + 1 :]])
            _fetch(between, [*at[:dim], near, *at[dim + 1 :]], fetch)
            out.copy_(between.index_select(dim, places - first))
            return
        if len(runs) > 1:
            for here, n in runs:
                _fetch(out.narrow(dim, here, n), [*at[:dim], places[here : here + n], *at[dim + 1 :]], fetch)
            return
    out.copy_(fetch(tuple(slice(int(p[0]), int(p[-1]) + 1) for p in at)))


def _runs(places: Tensor) -> list[tuple[int, int]]:
    """(first, length) of each run of neighbouring positions."""
    starts = [0, *(int(i) + 1 for i in (places.diff() != 1).nonzero().flatten())]
    return [(a, b - a) for a, b in zip(starts, [*starts[1:], len(places)], strict=True)]


# --- where the elements of a result come from --------------------------------------------------------------------------

_SAME = {aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh.default}
_SHAPED = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default,
}  # fmt: skip
_ALONG = {aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}


def _readers(func: Any, args: Any, kwargs: Any, made: Any) -> list[Read]:
    """What reads each result of a function. One that does more than to move elements is given its operands whole."""
    given = by_name(func, args, kwargs)
    if func in _SAME:
        return [given["self"].read]
    if func is aten._to_copy.default:
        return [_cast(given["self"], made.dtype)]
    if func is aten.cat.default:
        return [_joined(given["tensors"], given["dim"] % made.dim())]
    if func is aten.stack.default:
        dim = given["dim"] % made.dim()
        return [_joined([p.unsqueeze(dim) for p in given["tensors"]], dim)]
    if func in (aten.transpose.int, aten.permute.default, aten.t.default):
        numbered = torch.empty([1] * made.dim()).as_strided([1] * made.dim(), list(range(made.dim())))
        return [_permuted(given["self"], func(numbered, *args[1:], **kwargs).stride())]
    if func in _SHAPED:
        return [_reshaped(given["self"], made.shape)]
    if func in _ALONG:
        x, dim = given["self"], given["dim"] % given["self"].dim()
        taken = func(**{**given, "self": torch.arange(x.shape[dim]), "dim": 0})
        return [_taken(x, dim, places) for places in pytree.tree_leaves(taken)]
    return [_computed(func, args, kwargs, i) for i in range(len(pytree.tree_leaves(made)))]


def _cast(x: Piece, dtype: torch.dtype) -> Read:
    def read(out: Tensor, at: Positions) -> None:
        if out.dtype == dtype:
            x.read(out, at)
        else:
            out.copy_(part(x, at).to(dtype))

    return read


def _joined(parts: Sequence[Piece], dim: int) -> Read:
    def read(out: Tensor, at: Positions) -> None:
        first = 0
        for p in parts:
            here = ((at[dim] >= first) & (at[dim] < first + p.shape[dim])).nonzero().flatten()
            wanted = [*at[:dim], at[dim][here] - first, *at[dim + 1 :]]
            first += p.shape[dim]
            if len(here) and len(_runs(here)) == 1:
                p.read(out.narrow(dim, int(here[0]), len(here)), wanted)
            elif len(here):
                out.index_copy_(dim, here, part(p, wanted).to(out.dtype))

    return read


def _permuted(x: Piece, order: Sequence[int]) -> Read:
    """`order[i]` is the operand's dimension that dimension i of the result was."""
    back = [list(order).index(d) for d in range(len(order))]
    return lambda out, at: x.read(out.permute(back), [at[i] for i in back])


def _taken(x: Piece, dim: int, places: Tensor) -> Read:
    """What stands at some places along a dimension; at one place, the dimension is gone."""

    def read(out: Tensor, at: Positions) -> None:
        if places.dim():
            x.read(out, [*at[:dim], places[at[dim]], *at[dim + 1 :]])
        else:
            x.read(out.unsqueeze(dim), [*at[:dim], places[None], *at[dim:]])

    return read


def _reshaped(x: Piece, shape: Sequence[int]) -> Read:
    """Dimensions are cut or joined in groups of the same product. What a group needs of the operand is a product again."""
    groups = _groups(x.shape, shape)

    def read(out: Tensor, at: Positions) -> None:
        wanted: list[Tensor] = []
        places = []
        for before, after in groups:
            flat = torch.zeros(1, dtype=torch.int64)
            for d in after:
                flat = (flat[:, None] * shape[d] + at[d]).flatten()
            found: list[Tensor] = []
            inner, place = 1, torch.zeros_like(flat)
            for d in reversed(before):
                here, index = (flat // inner % x.shape[d]).unique(return_inverse=True)
                place += index * prod(len(f) for f in found)
                found.insert(0, here)
                inner *= x.shape[d]
            wanted += found
            places.append(place)
        near = part(x, wanted)
        sizes = iter(near.shape)
        near = near.reshape([prod(next(sizes) for _ in before) for before, _ in groups])
        for dim, place in enumerate(places):
            if not torch.equal(place, torch.arange(near.shape[dim])):
                near = near.index_select(dim, place)
        out.copy_(near.reshape(out.shape))

    return read


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The dimensions of two shapes of one tensor that belong together: of equal products, as small as possible."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left: list[int] = []
        right: list[int] = []
        while not (left or right) or prod(before[d] for d in left) != prod(after[d] for d in right):
            if j == len(after) or (i < len(before) and prod(before[d] for d in left) <= prod(after[d] for d in right)):
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        found.append((left, right))
    return found


def _computed(func: Any, args: Any, kwargs: Any, result: int) -> Read:
    def read(out: Tensor, at: Positions) -> None:
        values = pytree.tree_map_only(Piece, whole, (args, kwargs))
        y = pytree.tree_leaves(func(*values[0], **values[1]))[result]
        for dim, places in enumerate(at):
            y = y.index_select(dim, places)
        out.copy_(y)

    return read
