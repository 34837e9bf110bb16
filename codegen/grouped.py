"""Grouped products: what the experts of a layer multiply, with what is read before and computed after spliced in.

    h = grouped_linear(permute(x, order, 2), w, counts, False)          one kernel: rows of x are read through the order,
    gate, up = h.split(48, -1)                                          gate and up columns are accumulated side by side,
    y = silu(gate) * up                                                 and h and y are written once; a sum over columns
    s = sum(y * z, [1])                                                 is stored by tiles and added up afterwards

A program computes a tile of rows of one expert. Which tile, a table says that is made of the experts' numbers of rows, on the
host or on the device, wherever they are: nothing waits for the device. The gradient of the weights is a loop over the rows
of an expert, without atomics, so that its result does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sympy import Expr, Integer, Symbol
from torch import Tensor, fx

from foldcc.codegen.dtypes import computed, converted
from foldcc.codegen.index import Index, Ranges, value_sizes
from foldcc.codegen.launchers import allocated, arguments, bound, decided, parameters, read_of, results
from foldcc.codegen.names import C, NoText, R
from foldcc.codegen.tiles import MANY, Tile, outer, tiles
from foldcc.codegen.values import Values
from foldcc.ir.node import argument_or, name_of

_GROUP = 8  # tiles of rows whose columns are computed together, for what they read to stay in cache
_PIECES = 4  # tiles of columns that a program accumulates, at most
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LOCAL = "acc block c0 columns expert first group high inside k left m n n_tiles place r0 row_ends stop tile tile_table w_tile"
_TAKEN = {*_LOCAL.split(), *(f"acc{i}" for i in range(_PIECES))}

Nodes = Sequence[fx.Node]


@dataclass
class Columns:
    """Columns of a product that a kernel reads, each kind an accumulator: `c + start`, or `2 * c` and `2 * c + 1`.

    Attributes:
        names: the accumulator of each kind, in the order of first use.
    """

    names: dict[Expr, str] = field(default_factory=dict)

    def element(self, index: Index) -> str:
        """The accumulator that holds an element of the product."""
        row, column = index
        if row != R or not ((column - C).is_Integer or column in (2 * C, 2 * C + 1)):
            raise NoText(f"the product is read at row {row} and column {column}")
        return self.names.setdefault(column, f"acc{len(self.names)}")

    @property
    def alternate(self) -> bool:
        """Whether even and odd columns are accumulated as one tile and told apart afterwards.

        Raises:
            NoText: only some of the accumulators could be, or there are too many.
        """
        odd = [c for c in self.names if not (c - C).is_Integer]
        if len(self.names) > _PIECES or (odd and len(odd) < len(self.names)):
            raise NoText(f"the product is read at columns {', '.join(map(str, self.names))}")
        return bool(odd)


def product_of(nodes: Nodes, operator: str) -> fx.Node:
    """The grouped product of a region.

    Raises:
        NoText: it has an operand that no kernel takes.
    """
    (found,) = (n for n in nodes if name_of(n.target) == operator)
    one, other = (x.meta["val"].dtype for x in found.all_input_nodes[:2])
    if one != other or one not in _DTYPES:
        raise NoText(f"{operator} of {one} and {other}")
    return found


def linear_text(name: str, nodes: Nodes, inputs: Nodes, outputs: Nodes) -> str:
    """A kernel and its launcher for `grouped_linear`, the rows that it reads and the pointwise nodes on its result.

    Raises:
        NoText: the nodes do not fit into one kernel; why.
    """
    product = product_of(nodes, "foldcc.grouped_linear")
    x, w, counts, transposed = _arguments(product)
    dtype = x.meta["val"].dtype
    wide, precision = computed(dtype), _precision(dtype)
    rows, depth = value_sizes(x)
    sums = [n for n in outputs if is_row_sum(n)]
    width = _width(nodes, [n for n in outputs if n not in sums], rows)

    before = _values(_operands(product, inputs), rows, depth, looped=True)
    operand = f"{before.at(x, (R, C))}.to(tl.{str(dtype)[6:]})"

    columns = Columns()
    after = _values(set(nodes), rows, width, uniform=frozenset({"expert"}))
    after.given[product] = columns.element
    after.given |= {n: lambda index: "expert" for n in inputs if _expert_of_row(n, counts)}
    after.given |= dict.fromkeys(sums, _unread)
    for n in [*(n for n in outputs if n not in sums), *sums]:  # each is stored as soon as it is known, to hold fewer values
        if n in sums:
            _store_part(n, after, rows, width)
        else:
            _store(n, after, width, any(_steps(n) for n in nodes))
    parts = f"triton.cdiv({after.text(width)}, BN), n_rows"
    alternate = columns.alternate
    if not columns.names:
        raise NoText(f"nothing is read of {product.name}")
    read = read_of(inputs, {**before.loads, **after.loads, w: None})

    depth_text, width_text = before.text(depth), after.text(width)
    w_k, w_n = (1, 2) if transposed else (2, 1)
    wide_index = ".to(tl.int64)" if value_sizes(w)[1] * value_sizes(w)[2] >= 2**31 else ""
    starts = (
        {"acc": "n"} if alternate else {a: f"(n + {column - C})" if column != C else "n" for column, a in columns.names.items()}
    )
    shape = "[BM, 2 * BN]" if alternate else "[BM, BN]"
    body = [
        f"columns = tl.cdiv({width_text}, BN)",
        f"group = tl.program_id(0) // ({_GROUP} * columns) * {_GROUP}",
        f"high = min(n_tiles - group, {_GROUP})",
        f"inside = tl.program_id(0) % ({_GROUP} * columns)",
        "tile = group + inside % high",
        "expert = tl.load(tile_table + tile)",
        "first = tl.load(tile_table + n_tiles + tile)",
        "stop = tl.load(tile_table + 2 * n_tiles + tile)",
        "if first >= stop:",
        "    return",
        "block = inside // high * BN",
        "r = (first + tl.arange(0, BM))[:, None]",
        "r_ok = r < stop",
        f"n = (2 * block + tl.arange(0, 2 * BN))[None, :]{wide_index}"
        if alternate
        else f"n = (block + tl.arange(0, BN))[None, :]{wide_index}",
        *(f"{a} = tl.zeros({shape}, {wide})" for a in starts),
        *before.lines,
        f"for c0 in range(0, {depth_text}, BK):",
        "    c = c0 + tl.arange(0, BK)[None, :]",
        f"    c_ok = c < {depth_text}",
        *(f"    {line}" for line in before.body),
        f"    left = {operand}",
        f"    k = (c0 + tl.arange(0, BK))[:, None]{wide_index}",
    ]
    for a, start in starts.items():
        mask = f"(k < {depth_text}) & (n < {'2 * ' if alternate else ''}{width_text})"
        place = f"{w.name}_ptr + expert * {w.name}_s0 + k * {w.name}_s{w_k} + {start} * {w.name}_s{w_n}"
        body += [f"    w_tile = tl.load({place}, mask={mask}, other=0)", f"    {a} = tl.dot(left, w_tile, {a}{precision})"]
    if alternate:
        names = [columns.names.get(column, f"acc{1 - i}") for i, column in enumerate((2 * C, 2 * C + 1))]
        body.append(f"{', '.join(names)} = tl.split(tl.reshape(acc, (BM, BN, 2)))")
    body += ["c = (block + tl.arange(0, BN))[None, :]", f"c_ok = c < {width_text}", *after.body]

    symbols = {*before.symbols, *after.symbols}
    beside = [n for n in after.loads if len(value_sizes(n)) == 2 and value_sizes(n)[0] == rows]
    # Tiles that the epilogue needs at once, beside those that it computes; one that puts every second column joins two.
    held = len(columns.names) + bool(beside) * (1 + any(_steps(n) for n in nodes))
    many, few = (_shape(t, 2 * held if beside else held) for t in tiles(dtype))
    launch = [
        f"n_rows = {after.text(rows)}",
        "if n_rows > 0:",
        f"    BM, BN, BK, warps, stages = {many} if n_rows > {after.text(MANY * value_sizes(counts)[0])} else {few}",
        f"    tile_table = {name}_tiles({counts.name}, n_rows, BM, {w.name}.device)",
        "    n_tiles = tile_table.shape[1]",
        *(f"    {n.name}_out = torch.empty(({parts}), dtype=torch.{wide[3:]}, device={w.name}.device)" for n in sums),
        f"    {name}_kernel[(n_tiles * triton.cdiv({width_text}, BN),)]({_CALL})",
        *(f"    {n.name}_out = {n.name}_out.sum(0)[:, None].to({n.meta['val'].dtype})" for n in sums),
    ]
    table = [
        f"def {name}_tiles(counts, rows, height, device):",
        '    """Expert, first row and end of its rows, for each tile of rows; tiles that are left over have no rows."""',
        "    ends = counts.cumsum(0)",
        "    needed = (counts + (height - 1)) // height",
        "    behind = needed.cumsum(0)",
        "    tile = torch.arange(min(rows, rows // height + counts.shape[0]), device=counts.device)",
        "    expert = torch.searchsorted(behind, tile, right=True).clamp_(max=counts.shape[0] - 1)",
        "    first = (ends - counts - (behind - needed) * height)[expert] + tile * height",
        "    return torch.stack([expert, first, ends[expert]]).to(device, non_blocking=True)",
    ]
    text = _module(name, body, launch, ("tile_table", "n_tiles"), inputs, read, outputs, symbols)
    return "\n".join([*table, "", "", text])


def outer_text(name: str, nodes: Nodes, inputs: Nodes, outputs: Nodes) -> str:
    """A kernel and its launcher for `grouped_outer` and the rows that it reads.

    Raises:
        NoText: the nodes do not fit into one kernel; why.
    """
    product = product_of(nodes, "foldcc.grouped_outer")
    x, grad, counts, transposed = _arguments(product)
    if list(outputs) != [product]:
        raise NoText("a gradient of weights has one result")
    dtype = x.meta["val"].dtype
    wide, precision = computed(dtype), _precision(dtype)
    rows = value_sizes(x)[0]
    experts, height, width = value_sizes(product)

    def operand(node: fx.Node, columns: Expr) -> tuple[Values, str]:
        values = _values(_operands(product, inputs), rows, columns)
        return values, f"{values.at(node, (R, C))}.to(tl.{str(dtype)[6:]})"

    (one, left), (other, right) = (
        operand(n, c) for n, c in zip((x, grad) if transposed else (grad, x), (height, width), strict=True)
    )
    read = read_of(inputs, {**one.loads, **other.loads})
    high, wide_text = one.text(height), other.text(width)
    # The longer side runs slowest, so that programs at one time share what they read.
    last_fast = f"tl.program_id(0) // tl.cdiv({wide_text}, BN)", f"tl.program_id(0) % tl.cdiv({wide_text}, BN)"
    first_fast = f"tl.program_id(0) % tl.cdiv({high}, BM)", f"tl.program_id(0) // tl.cdiv({high}, BM)"
    i, j = first_fast if height.is_Integer and width.is_Integer and height < width else last_fast
    body = [
        "expert = tl.program_id(1).to(tl.int64)",
        "stop = tl.load(row_ends + expert)",
        "first = tl.load(row_ends + expert - 1, mask=expert > 0, other=0)",
        f"m = ({i}) * BM + tl.arange(0, BM)",
        f"n = ({j}) * BN + tl.arange(0, BN)",
        f"acc = tl.zeros([BM, BN], {wide})",
        "for r0 in range(first, stop, BK):",
        "    r = (r0 + tl.arange(0, BK))[:, None]",
        "    r_ok = r < stop",
        "    c = m[None, :]",
        f"    c_ok = c < {high}",
        *(f"    {line}" for line in one.body),
        f"    left = tl.trans({left})",
        "    c = n[None, :]",
        f"    c_ok = c < {wide_text}",
        *(f"    {line}" for line in other.body),
        f"    acc = tl.dot(left, {right}, acc{precision})",
        f"place = {product.name}_out + (expert * {high} + m[:, None]) * {wide_text} + n[None, :]",
        f"tl.store(place, acc, mask=(m[:, None] < {high}) & (n[None, :] < {wide_text}))",
    ]
    launch = [
        f"BM, BN, BK, warps, stages = {_shape(outer(dtype), 1)}",
        f"row_ends = {counts.name}.cumsum(0).to({read[0].name}.device, non_blocking=True)",
        f"blocks = triton.cdiv({high}, BM) * triton.cdiv({wide_text}, BN)",
        f"{name}_kernel[(blocks, {one.text(experts)})]({_CALL})",
    ]
    return _module(name, body, launch, ("row_ends",), inputs, read, outputs, {*one.symbols, *other.symbols})


# --- parts ---

_CALL = "{arguments}, BM=BM, BN=BN, BK=BK, num_warps=warps, num_stages=stages"


def _arguments(product: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, bool]:
    one, other, counts, transposed = product.args
    assert isinstance(one, fx.Node) and isinstance(other, fx.Node) and isinstance(counts, fx.Node)
    return one, other, counts, bool(transposed)


def _operands(product: fx.Node, inputs: Nodes) -> set[fx.Node]:
    """The operands of a product that its kernel does not load as they are: it reads rows through them."""
    return {n for n in product.all_input_nodes if n not in inputs}


def _values(inside: set[fx.Node], rows: Expr, width: Expr, **options: Any) -> Values:
    """Values of a table, whose names are none of the kernel's own variables."""
    return Values(inside=inside, width=width, ranges=Ranges({R: rows, C: width}), taken=set(_TAKEN), **options)


def _expert_of_row(node: fx.Node, counts: fx.Node) -> bool:
    return name_of(node.target) == "foldcc.expert_of_row" and node.args[1] is counts


def _steps(node: fx.Node) -> bool:
    """Whether a node takes or puts every second column."""
    return (
        name_of(node.target) in ("aten.slice", "aten.slice_backward", "aten.slice_scatter") and argument_or(node, "step") == 2
    )


def _precision(dtype: torch.dtype) -> str:
    """How a product of a dtype is accumulated: never in less than float32, and without TF32."""
    given = {torch.float32: ', input_precision="ieee"', torch.float64: ', input_precision="ieee", out_dtype=tl.float64'}
    return given.get(dtype, "")


def _shape(tile: Tile, pieces: int) -> tuple[int, int, int, int, int]:
    """A tile whose columns several accumulators share, or one with what is loaded after it: all of them stand in registers."""
    return tile.rows, max(16, tile.columns >> (pieces - 1).bit_length()), tile.step, tile.warps, tile.stages


def _width(nodes: Nodes, outputs: Nodes, rows: Expr) -> Expr:
    """Columns that a kernel runs over: those of its narrowest node, which all outputs have a whole number of times.

    Raises:
        NoText: an output has other rows, or no such number.
    """
    odd = next((n for n in outputs if len(value_sizes(n)) != 2 or value_sizes(n)[0] != rows), None)
    if odd is not None:
        raise NoText(f"{odd.name} is no table of {rows} rows")
    tables = [n for n in nodes if isinstance(n.meta.get("val"), Tensor) and name_of(n.target) != "foldcc.permute"]
    shapes = [value_sizes(n) for n in tables]
    widths = {s[1] for s in shapes if len(s) == 2 and s[0] == rows and s[1] != 1} | {value_sizes(n)[1] for n in outputs}
    width = min(widths) if all(w.is_Integer for w in widths) else Integer(0)
    if width == 0 or any(value_sizes(n)[1] % width != 0 or value_sizes(n)[1] > _PIECES * width for n in outputs):
        raise NoText(f"tables of {', '.join(map(str, widths))} columns")
    return width


def _store(output: fx.Node, values: Values, width: Expr, alternate: bool) -> None:
    """Stores all columns of an output that belong to columns `c` of the kernel."""
    whole = value_sizes(output)[1]
    pieces = int(whole / width)
    row = f"{output.name}_out + r * {whole}"
    if pieces == 2 and alternate:
        zeros = f"tl.zeros([BM, BN], {computed(output.meta['val'].dtype)})"
        even, odd = (values.at(output, (R, 2 * C + i)) for i in range(2))
        both = f"tl.interleave({zeros} + {even}, {zeros} + {odd})"
        place = "(2 * block + tl.arange(0, 2 * BN))[None, :]"
        values.body.append(f"tl.store({row} + {place}, {both}, mask=r_ok & ({place} < {whole}))")
        return
    for i in range(pieces):
        text = values.at(output, (R, C + i * width))
        values.body.append(f"tl.store({row} + {values.text(C + i * width)}, {text}, mask=r_ok & c_ok)")


def is_row_sum(node: fx.Node) -> bool:
    """Whether a node sums the columns of a table, to one column."""
    if name_of(node.target) != "aten.sum" or not isinstance(node.args[0], fx.Node):
        return False
    dims: Any = argument_or(node, "dim")
    return len(value_sizes(node.args[0])) == 2 and dims in ([1], [-1]) and bool(argument_or(node, "keepdim"))


def _unread(index: Index) -> str:
    raise NoText("a sum over all columns is read in the kernel, which has some of them")


def _store_part(node: fx.Node, values: Values, rows: Expr, width: Expr) -> None:
    """Stores a row's sum over the columns of a tile; the launcher adds those of all tiles, in one order."""
    x: Any = node.args[0]
    if value_sizes(x)[1] != width:
        raise NoText(f"a sum over {value_sizes(x)[1]} columns, and the kernel has {width}")
    term = f"tl.where(r_ok & c_ok, {converted(values.at(x, (R, C)), x, node)}, 0)"
    place = f"{node.name}_out + (inside // high).to(tl.int64) * {values.text(rows)} + r"
    values.body.append(f"tl.store({place}, tl.sum({term}, 1)[:, None], mask=r_ok)")


def _module(
    name: str,
    body: Sequence[str],
    launch: Sequence[str],
    extra: Sequence[str],
    inputs: Nodes,
    read: Nodes,
    outputs: Nodes,
    symbols: set[Symbol],
) -> str:
    """A kernel and its launcher.

    Args:
        extra: what the launcher makes for the kernel.
        read: the inputs that the kernel reads.
        symbols: sizes that data decide, in the text of the kernel.

    Raises:
        NoText: one of these sizes is a dimension of no input.
    """
    sizes = sorted(s.name for s in symbols)
    ours = [*extra, *parameters(read, results(outputs)), *sizes]
    theirs = [*extra, *arguments(read, results(outputs)), *sizes]
    return "\n".join(
        [
            "@triton.jit",
            f"def {name}_kernel({', '.join(ours)}, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):",
            *(f"    {line}" for line in body),
            "",
            "",
            f"def {name}({', '.join(n.name for n in inputs)}):",
            *(f"    {s} = {bound(s, inputs)}" for s in sorted({*sizes, *decided(outputs)})),
            *(f"    {allocated(n, read[0])}" for n in outputs),
            *(f"    {line.replace('{arguments}', ', '.join(theirs))}" for line in launch),
            f"    return {', '.join(results(outputs))}",
        ]
    )
