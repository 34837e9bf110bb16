"""Chains: pointwise operators and the reductions over their rows, as one kernel that reads each input and writes each
output once.

    def rms_norm(x, weight):                       a launcher, which anyone can call with tensors
        y = torch.empty(...)
        rms_norm_kernel[(rows,)](x, ..., y, ...)
        return y

A sum over leading dimensions, as of a norm's weight gradient, is a kernel of its own: a fixed number of programs sums
stripes of rows, and a second kernel sums the stripes, so that the result does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from sympy import Expr, Integer
from torch import fx

from foldcc.codegen.dtypes import computed, converted
from foldcc.codegen.index import Ranges, parted, product, value_sizes
from foldcc.codegen.launchers import allocated, arguments, bound, decided, parameters, read_of, results
from foldcc.codegen.lines import COLUMNS, REDUCTIONS
from foldcc.codegen.names import C, NoText, R
from foldcc.codegen.values import Values
from foldcc.ir.node import name_of
from foldcc.rules.reductions import dims_of

_TILE = 4096  # elements of a tile, at most
_WIDEST = 4096  # a longer row is read in a loop
_STRIPES, _STRIPE = 64, 32  # programs that share the rows of a column sum, and rows that each takes at a time
_BY_ROW = {**REDUCTIONS, "aten._softmax": "sum", "aten._softmax_backward_data": "sum"}


@dataclass(frozen=True)
class Domain:
    """Rows and columns that a kernel runs over."""

    rows: Expr
    width: Expr

    @property
    def ranges(self) -> Ranges:
        return Ranges({R: self.rows, C: self.width})


def column_sum(node: fx.Node) -> bool:
    """Whether a node sums over the leading dimensions of its operand and keeps the last ones."""
    if name_of(node.target) != "aten.sum" or not isinstance(node.args[0], fx.Node):
        return False
    rank = len(value_sizes(node.args[0]))
    dims = dims_of(node, rank)
    return len(dims) < rank and dims == set(range(len(dims)))


def domain_of(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Domain:
    """The rows and columns of a group of nodes.

    Raises:
        NoText: its reductions run over rows of several lengths, or its outputs have several sizes.
    """
    reductions = [n for n in nodes if name_of(n.target) in _BY_ROW]
    widths = {_reduced(n) for n in reductions}
    if len(widths) > 1:
        raise NoText(f"rows of {', '.join(map(str, widths))} elements")
    if widths:
        (width,) = widths
        rows = sympy.cancel(_count(_operand(reductions[0])) / width)
        counts = {rows, sympy.expand(rows * width)}
    else:
        count = _count(outputs[0])
        width = value_sizes(outputs[0])[-1] if value_sizes(outputs[0]) else Integer(1)
        rows, counts = sympy.cancel(count / width) if count != 0 else Integer(0), {count}
    odd = next((n for n in outputs if sympy.expand(_count(n)) not in counts), None)
    if odd is not None:
        raise NoText(f"{odd.name} has {_count(odd)} elements, and the kernel {rows} rows of {width}")
    return Domain(rows, width)


def _count(node: fx.Node) -> Expr:
    return product(value_sizes(node))


def _operand(node: fx.Node) -> Any:
    return node.args[0]


def _reduced(node: fx.Node) -> Expr:
    """How many elements of its operand make one of its results."""
    if name_of(node.target) not in REDUCTIONS:
        return value_sizes(node)[-1]
    return sympy.cancel(product(value_sizes(_operand(node))) / product(value_sizes(node)))


def chain_text(name: str, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> str:
    """A kernel and its launcher for nodes that are computed row by row.

    Args:
        inputs: the tensors that the launcher takes, in order.
        outputs: those that it returns.

    Raises:
        NoText: the nodes do not fit into one kernel; why.
    """
    domain = domain_of(nodes, outputs)
    reduces = any(name_of(n.target) in _BY_ROW for n in nodes)
    looped = reduces and not (domain.width.is_Integer and domain.width <= _WIDEST)
    values = Values(inside=set(nodes), width=domain.width, ranges=domain.ranges, looped=looped)
    stores: list[str] = []
    for output in outputs:
        by_row = reduces and sympy.expand(_count(output) - domain.rows) == 0
        position = R if by_row else R * domain.width + C
        text = values.at(output, parted(position, value_sizes(output), domain.ranges))
        store = f"tl.store({output.name}_out + {values.text(position)}, {text}, mask=r_ok{'' if by_row else ' & c_ok'})"
        (values.lines if by_row and looped else stores).append(store)
    values.body += stores
    return _module(name, values, domain, inputs, outputs, reduces)


def _module(
    name: str, values: Values, domain: Domain, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], reduces: bool
) -> str:
    width, rows = values.text(domain.width), values.text(domain.rows)
    if values.looped:
        inner = [*values.lines]
        if any("tl.store" in line for line in values.body):
            inner += ["for c0 in range(0, {W}, BW):", *(f"    {line}" for line in [*COLUMNS, *values.body])]
    else:
        start = "" if reduces else "tl.program_id(1) * BW + "
        inner = [f"c = {start}tl.arange(0, BW)[None, :]", "c_ok = c < {W}", *values.body]
    read = read_of(inputs, values.loads)
    symbols = sorted({s.name for s in values.symbols})
    head = [*parameters(read, results(outputs)), *symbols]
    kernel = [
        "@triton.jit",
        f"def {name}_kernel({', '.join([*head, 'BR: tl.constexpr', 'BW: tl.constexpr'])}):",
        "    r = (tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR))[:, None]",
        f"    r_ok = r < {rows}",
        *(f"    {line.replace('{W}', width)}" for line in inner),
    ]
    needed = sorted({s.name for x in (domain.rows, domain.width) for s in x.free_symbols} | decided(outputs) | set(symbols))
    tile_rows, tile_width = _tile(domain, values.looped, reduces)
    grid = f"triton.cdiv({rows}, {tile_rows})," + ("" if reduces else f" triton.cdiv({width}, {tile_width})")
    given = [*arguments(read, results(outputs)), *symbols]
    call = f"{name}_kernel[({grid})]({', '.join([*given, f'BR={tile_rows}', f'BW={tile_width}'])})"
    launcher = [
        f"def {name}({', '.join(n.name for n in inputs)}):",
        *(f"    {s} = {bound(s, inputs)}" for s in needed),
        *(f"    {allocated(n, [*read, *inputs][0])}" for n in outputs),
        *([f"    if {rows} * {width} > 0:", f"        {call}"] if needed else [f"    {call}"]),
        f"    return {', '.join(results(outputs))}",
    ]
    return "\n".join([*kernel, "", "", *launcher])


def _tile(domain: Domain, looped: bool, reduces: bool) -> tuple[int, int]:
    """Rows and columns of a tile: whole rows where they are reduced, and as many as keep it at `_TILE` elements."""
    width = 1024
    if domain.width.is_Integer:
        width = 1 << max(0, int(domain.width) - 1).bit_length()
    width = min(width, 1024 if looped or not reduces else _WIDEST)
    rows = max(1, min(64, _TILE // 4 // width))
    if domain.rows.is_Integer:
        rows = min(rows, 1 << max(0, int(domain.rows) - 1).bit_length())
    return rows, width


def column_sum_text(name: str, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> str:
    """Two kernels and their launcher for a sum over leading dimensions and what it is made of."""
    (output,) = outputs
    operand = _operand(output)
    width = _count(output)
    domain = Domain(sympy.cancel(_count(operand) / width), width)
    values = Values(inside={n for n in nodes if n is not output}, width=Integer(-1), ranges=domain.ranges)
    term = converted(values.at(operand, parted(R * width + C, value_sizes(operand), domain.ranges)), operand, output)
    wide = computed(output.meta["val"].dtype)
    read = read_of(inputs, values.loads)
    symbols = sorted({s.name for s in values.symbols} | {s.name for x in (domain.rows, width) for s in x.free_symbols})
    w, rows = values.text(width), values.text(domain.rows)
    tile = min(128, 1 << max(0, int(width) - 1).bit_length()) if width.is_Integer else 128
    head = [*parameters(read, ["stripes"]), *symbols, "S"]
    given = [*arguments(read, ["stripes"]), *symbols, "S"]
    return "\n".join(
        [
            "@triton.jit",
            f"def {name}_stripes({', '.join([*head, 'BR: tl.constexpr', 'BW: tl.constexpr'])}):",
            "    c = tl.program_id(0) * BW + tl.arange(0, BW)[None, :]",
            f"    c_ok = c < {w}",
            f"    total = tl.zeros([BR, BW], {wide})",
            f"    for r0 in range(tl.program_id(1) * BR, {rows}, S * BR):",
            "        r = (r0 + tl.arange(0, BR)).to(tl.int64)[:, None]",
            f"        r_ok = r < {rows}",
            *(f"        {line}" for line in values.body),
            f"        total += tl.where(r_ok & c_ok, {term}, 0).to({wide})",
            f"    tl.store(stripes + tl.program_id(1) * {w} + c, tl.sum(total, 0)[None, :], mask=c_ok)",
            "",
            "",
            "@triton.jit",
            f"def {name}_join(stripes, out, {''.join(f'{s}, ' for s in symbols)}S, BS: tl.constexpr, BW: tl.constexpr):",
            "    c = tl.program_id(0) * BW + tl.arange(0, BW)[None, :]",
            "    s = tl.arange(0, BS)[:, None]",
            f"    term = tl.load(stripes + s * {w} + c, mask=(s < S) & (c < {w}), other=0)",
            f"    tl.store(out + c, tl.sum(term, 0)[None, :], mask=c < {w})",
            "",
            "",
            f"def {name}({', '.join(n.name for n in inputs)}):",
            *(f"    {s} = {bound(s, inputs)}" for s in symbols),
            f"    S = min({_STRIPES}, max(1, triton.cdiv({rows}, {_STRIPE})))",
            f"    stripes = torch.empty((S, {w}), dtype={wide.replace('tl.', 'torch.')}, device={read[0].name}.device)",
            f"    {allocated(output, read[0])}",
            f"    grid = triton.cdiv({w}, {tile})",
            f"    {name}_stripes[(grid, S)]({', '.join([*given, f'BR={_STRIPE}', f'BW={tile}'])})",
            f"    {name}_join[(grid,)]({', '.join(['stripes', f'{output.name}_out', *symbols])}, S, BS={_STRIPES}, BW={tile})",
            f"    return {output.name}_out",
        ]
    )
