"""Rows: what each token gets of the rows that its experts made, and the gradients of that.

    y[t] = sum over k of weights[t, k] * rows[inverse[t * K + k]]          with inverse[order[i]] = i

A first kernel inverts the order. Then every token finds its own rows, so that sums have one order and nothing is added
into memory. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from foldcc.codegen.dtypes import computed
from foldcc.codegen.index import value_sizes
from foldcc.codegen.names import NoText
from foldcc.codegen.regions import Region, region
from foldcc.ir.node import argument, name_of

_WIDEST = 1024  # columns of a tile
_TILE = 1024  # elements of a tile, unless a row has more

_INVERSE = """
@triton.jit
def {name}_invert(order, stride, inverse, n, BN: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    tl.store(inverse + tl.load(order + i * stride, mask=i < n, other=0), i, mask=i < n)
"""

_SUM = """
@triton.jit
def {name}_kernel({arguments}, inverse, y, T, H, K: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH)[None, :]
    ok = (t < T)[:, None] & (c < H)
    total = tl.zeros([BT, BH], {wide})
    for k in range(K):
        at = tl.load(inverse + t * K + k, mask=t < T, other=0)[:, None]
        row = tl.load(rows + at * rows_s0 + c * rows_s1, mask=ok, other=0).to({wide})
        {add}
    tl.store(y + t[:, None] * H + c, total, mask=ok)
"""

_DOT = """
@triton.jit
def {name}_kernel({arguments}, inverse, y, T, H, K: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    for k in range(K):
        at = tl.load(inverse + t * K + k, mask=t < T, other=0)[:, None]
        total = tl.zeros([BT, BH], {wide})
        for c0 in range(0, H, BH):
            c = c0 + tl.arange(0, BH).to(tl.int64)[None, :]
            ok = (t < T)[:, None] & (c < H)
            row = tl.load(rows + at * rows_s0 + c * rows_s1, mask=ok, other=0).to({wide})
            total += row * tl.load(grad + t[:, None] * grad_s0 + c * grad_s1, mask=ok, other=0).to({wide})
        tl.store(y + t * K + k, tl.sum(total, 1), mask=t < T)
"""

_LAUNCHER = """
def {name}({inputs}):
    {own}, order = {given}, {order}
    U, H, K = order.shape[0], rows.shape[1], {copies}
    T = U // K
    inverse = torch.empty((U,), dtype=torch.int64, device=order.device)
    y = torch.empty((T, {width}), dtype={dtype}, device=rows.device)
    if {some} > 0:
        {name}_invert[(triton.cdiv(U, 1024),)](order, order.stride(0), inverse, U, BN=1024)
        {name}_kernel[({grid})]({own}, {strides}, inverse, y, T, H, K=K, BT={BT}, BH={BH})
    return y
"""

_WEIGHTED = "total += tl.load(weights + t * weights_s0 + k * weights_s1, mask=t < T, other=0).to({wide})[:, None] * row"


def rows_text(name: str, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> str:
    """The kernels and the launcher of `unpermute`, `gather_rows` or `unpermute_weights`.

    Raises:
        NoText: the rows are no vectors of floating-point numbers.
    """
    (node,) = nodes
    operation = name_of(node.target)
    rows, order = argument(node, "rows"), argument(node, "order")
    if rows.meta["val"].ndim != 2 or not rows.meta["val"].dtype.is_floating_point:
        raise NoText(f"rows of {rows.meta['val'].shape}, {rows.meta['val'].dtype}")
    if operation == "foldcc.gather_rows":
        read, copies = [("rows", rows)], argument(node, "copies")
    else:
        weights = argument(node, "weights")
        copies = value_sizes(weights)[1]
        other = ("grad", argument(node, "grad")) if operation == "foldcc.unpermute_weights" else ("weights", weights)
        read = [("rows", rows), other]
    if not str(copies).isdigit() or int(copies) < 1:
        raise NoText(f"{copies} rows of a token")
    wide = computed(node.meta["val"].dtype)
    dot = operation == "foldcc.unpermute_weights"
    hidden = value_sizes(rows)[1]
    block = min(_WIDEST, 1 << (int(hidden) - 1).bit_length()) if hidden.is_Integer and hidden > 0 else _WIDEST
    tokens = max(1, _TILE // block)
    kernel = (_DOT if dot else _SUM).format(
        name=name,
        wide=wide,
        arguments=", ".join([*(n for n, _ in read), *(f"{n}_s{d}" for n, _ in read for d in range(2))]),
        add=_WEIGHTED.format(wide=wide) if len(read) == 2 else "total += row",
    )
    launcher = _LAUNCHER.format(
        name=name,
        inputs=", ".join(n.name for n in inputs),
        own=", ".join(n for n, _ in read),
        given=", ".join(x.name for _, x in read),
        strides=", ".join(f"{n}.stride({d})" for n, _ in read for d in range(2)),
        order=order,
        copies=copies,
        width="K" if dot else "H",
        dtype=node.meta["val"].dtype,
        some="T" if dot else "T * H",
        grid=f"triton.cdiv(T, {tokens})," + ("" if dot else f" triton.cdiv(H, {block})"),
        BT=tokens,
        BH=block,
    )
    return "\n\n\n".join(x.strip() for x in (_INVERSE.format(name=name), kernel, launcher))


_OPERATORS = ("foldcc.unpermute", "foldcc.gather_rows", "foldcc.unpermute_weights")


def find(graph: fx.Graph, claimed: set[fx.Node]) -> list[Region]:
    """The gather-sums of a graph, and their gradients, among the nodes that no other region has claimed."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function" or node in claimed or name_of(node.target) not in _OPERATORS:
            continue
        here = region("rows", {node}, rows_text)
        try:
            here.source("kernel")
        except NoText:
            continue
        found.append(here)
    return found
