"""Top-k: the largest elements of each row of a tile, and where they are, by searching it k times.

The bits of a float, the meaning of its sign undone, are a whole number that orders like the float. Above a position they make
one number, so that one maximum finds both; of a float64 there is no room for that.
"""

from __future__ import annotations

from typing import Any

from foldcc.codegen.dtypes import computed
from foldcc.codegen.names import NoText
from foldcc.codegen.padded import Padded
from foldcc.ir.node import argument


def largest(tiles: Padded, node: Any, lead: int, x: str) -> tuple[str, str]:
    """Values and positions of the largest elements of a row, in order, of equal ones the first.

    Args:
        x: the tile that is searched.

    Raises:
        NoText: what is asked for is something else.
    """
    source, k, name = node.args[0], argument(node, "k"), node.name
    axis = tiles.last(node, source, lead, argument(node, "dim"))
    wide = computed(source.meta["val"].dtype)
    if not argument(node, "largest") or not isinstance(k, int) or k < 1 or wide == "tl.int64":
        raise NoText(f"{node.target} of {wide}, the smallest, or none")
    pads = tiles.pads(source, lead)
    width, kept = pads[-1], 1 << (k - 1).bit_length()
    columns, places = (tiles.columns(len(pads), -1, n) for n in (width, kept))
    bits, most = (32, (1 << 31) - 1) if wide == "tl.float32" else (64, (1 << 63) - 1)
    lowest, shift = (-(1 << 62), width.bit_length() - 1) if bits == 32 else (-most, 0)
    left = tiles.keep(f"{name}_left", f"{x}.to(tl.int{bits}, bitcast=True)")
    left = tiles.keep(f"{name}_left", f"tl.where({x} == {x}, {left} ^ (({left} >> {bits - 1}) & {most}), {most})")
    packed = f"({left}.to(tl.int64) << {shift}) + {width - 1} - {columns}" if bits == 32 else left
    left = tiles.keep(f"{name}_left", tiles.without_padding(packed, source, lead, [axis - 1], str(lowest)))
    shape = f"[{', '.join(map(str, ['BR', *pads[:-1], kept]))}]"
    top = tiles.keep(f"{name}_top", f"tl.full({shape}, {lowest}, tl.int64)")
    best, at = f"{name}_best", f"{name}_at"
    loop = [
        f"{best} = tl.expand_dims(tl.max({left}, {axis}), {axis})",
        f"{top} = tl.where({places} == {name}_k, {best}, {top})",
    ]
    if bits == 32:
        loop.append(f"{left} = tl.where({left} == {best}, {lowest}, {left})")
    else:
        ids = tiles.keep(f"{name}_ids", f"tl.zeros({shape}, tl.int64)")
        loop += [
            f"{at} = tl.expand_dims(tl.min(tl.where({left} == {best}, {columns}, {width}), {axis}), {axis})",
            f"{ids} = tl.where({places} == {name}_k, {at}, {ids})",
            f"{left} = tl.where({columns} == {at}, {lowest}, {left})",
        ]
    tiles.lines += [f"for {name}_k in range({k}):", *(f"    {line}" for line in loop)]
    if bits == 32:
        ids = tiles.keep(f"{name}_ids", f"{width - 1} - ({top} & {width - 1})")
        top = tiles.keep(f"{name}_top", f"({top} >> {shift}).to(tl.int32)")
    value = f"({top} ^ (({top} >> {bits - 1}) & {most})).to({wide}, bitcast=True)"
    return tiles.keep(f"{name}_values", value), ids
