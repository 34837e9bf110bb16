"""Dispatch plan: which row goes where, without a global sort and without waiting for the device.

    order = sort(ids, stable)[1];  counts = count(ids, E)                                      becomes

    a kernel counts the ids of each block by expert; a second adds up the blocks, expert by expert; a third puts each
    position where its expert starts, plus what earlier blocks have of it, plus what stands before it in its own block.

The order of rows that arrive in chunks, (source, expert) by (source, expert), and the expert of each row follow from the
sizes of the chunks alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from foldcc.codegen.index import value_sizes
from foldcc.codegen.names import NoText
from foldcc.codegen.regions import Region, is_free, region
from foldcc.ir.node import argument, name_of
from foldcc.rules.kinds import RESHAPES, SAME

_BLOCK = 128  # ids of a block; each is compared with each
_SCAN = 512  # blocks that are added up at once
_TILE = 4096  # elements of a tile of rows and experts
_MOST = 4096  # experts

_COUNTED = """
@triton.jit
def {name}_histogram(ids, blocks, n, BN: tl.constexpr, EP: tl.constexpr, E: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    i = b * BN + tl.arange(0, BN)
    e = tl.load(ids + i, mask=i < n, other=0).to(tl.int32)
    expert = tl.arange(0, EP)
    tl.store(blocks + b * E + expert, tl.histogram(e, EP, mask=i < n), mask=expert < E)


@triton.jit
def {name}_prefix(blocks, before, counts, n_blocks, BB: tl.constexpr, E: tl.constexpr):
    e = tl.program_id(0)
    total = tl.zeros([], tl.int64)
    for b0 in range(0, n_blocks, BB):
        b = b0 + tl.arange(0, BB).to(tl.int64)
        here = tl.load(blocks + b * E + e, mask=b < n_blocks, other=0).to(tl.int64)
        tl.store(before + b * E + e, total + tl.cumsum(here, 0) - here, mask=b < n_blocks)
        total += tl.sum(here, 0)
    tl.store(counts + e, total)


@triton.jit
def {name}_starts(counts, starts, EP: tl.constexpr, E: tl.constexpr):
    expert = tl.arange(0, EP)
    here = tl.load(counts + expert, mask=expert < E, other=0)
    tl.store(starts + expert, tl.cumsum(here, 0) - here, mask=expert < E)


@triton.jit
def {name}_place(ids, starts, before, order, n, BN: tl.constexpr, E: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, BN)
    i = b * BN + local
    e = tl.load(ids + i, mask=i < n, other=E).to(tl.int32)
    same = (e[:, None] == e[None, :]) & (local[None, :] < local[:, None])
    rank = tl.sum(same.to(tl.int32), 1)
    start = tl.load(starts + e, mask=i < n, other=0) + tl.load(before + b * E + e, mask=i < n, other=0)
    tl.store(order + start + rank, i, mask=i < n)


def {name}({ids}):
    ids = {ids}.reshape(-1)
    n, device = ids.shape[0], ids.device
    n_blocks = triton.cdiv(n, {block})
    order = torch.empty((n,), dtype=torch.int64, device=device)
    counts = torch.empty(({experts},), dtype=torch.int64, device=device)
    starts = torch.empty(({experts},), dtype=torch.int64, device=device)
    blocks = torch.empty((n_blocks, {experts}), dtype=torch.int32, device=device)
    before = torch.empty((n_blocks, {experts}), dtype=torch.int64, device=device)
    if n > 0:
        {name}_histogram[(n_blocks,)](ids, blocks, n, BN={block}, EP={padded}, E={experts})
    {name}_prefix[({experts},)](blocks, before, counts, n_blocks, BB={scan}, E={experts})
    if n > 0:
        {name}_starts[(1,)](counts, starts, EP={padded}, E={experts})
        {name}_place[(n_blocks,)](ids, starts, before, order, n, BN={block}, E={experts})
    return {outputs}
"""

_CHUNKED = """
@triton.jit
def {name}_kernel(table, order, chunks, BN: tl.constexpr):
    c = tl.program_id(0)
    source = tl.load(table + c)
    target = tl.load(table + chunks + c)
    n = tl.load(table + 2 * chunks + c)
    i = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    tl.store(order + target + i, source + i, mask=i < n)


def {name}({inputs}):
    rows, chunks = {rows}, {chunks}
    # On the host, chunks in the order of the experts: where each starts in the rows and in the order, and its length.
    sizes = chunks.reshape(-1, {experts}).t().reshape(-1)
    source = (chunks.cumsum(0) - chunks).reshape(-1, {experts}).t().reshape(-1)
    table = torch.stack([source, sizes.cumsum(0) - sizes, sizes]).to(rows.device, non_blocking=True)
    order = torch.empty((rows.shape[0],), dtype=torch.int64, device=rows.device)
    if rows.shape[0] > 0:
        tiles = triton.cdiv(int(sizes.max()), {tile})
        {name}_kernel[(sizes.shape[0], tiles)](table, order, sizes.shape[0], BN={tile})
    counts = chunks.reshape(-1, {experts}).sum(0)
    return {outputs}
"""

_OF_ROW = """
@triton.jit
def {name}_kernel(counts, stride, expert_of, n, BN: tl.constexpr, EP: tl.constexpr, E: tl.constexpr):
    expert = tl.arange(0, EP)
    ends = tl.cumsum(tl.load(counts + expert * stride, mask=expert < E, other=0), 0)
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    passed = (ends[None, :] <= i[:, None]) & (expert < E)[None, :]
    tl.store(expert_of + i, tl.sum(passed.to(tl.int32), 1), mask=i < n)


def {name}({inputs}):
    rows, counts = {rows}, {counts}
    counts, n = counts.to(rows.device, non_blocking=True), rows.shape[0]
    expert_of = torch.empty((n,), dtype=torch.int64, device=rows.device)
    if n > 0:
        {name}_kernel[(triton.cdiv(n, {tile}),)](counts, counts.stride(0), expert_of, n, BN={tile}, EP={padded}, E={experts})
    return expert_of
"""


def sort_text(name: str, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> str:
    """The kernels and the launcher of the stable order of ids, and of how often each occurs."""
    count = next(n for n in nodes if name_of(n.target) == "foldcc.count")
    experts = _experts(argument(count, "experts"))
    (ids,) = inputs
    if any(n is not count and n.target is not operator.getitem for n in outputs):
        raise NoText("the ids are read as well")
    return _COUNTED.format(
        name=name,
        ids=ids.name,
        experts=experts,
        padded=max(32, _padded(experts)),  # a histogram has at least as many bins as a warp has threads
        block=_BLOCK,
        scan=_SCAN,
        outputs=", ".join("counts" if n is count else "order" for n in outputs),
    ).strip()


def by_expert_text(name: str, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> str:
    """The kernel and the launcher of the order that puts the chunks of one expert together."""
    node = next(n for n in nodes if name_of(n.target) == "foldcc.by_expert")
    rows, chunks, experts = node.args
    results = {n: "counts" if n.args[1] else "order" for n in nodes if n.target is operator.getitem}
    return _CHUNKED.format(
        name=name,
        inputs=_names(inputs),
        rows=rows,
        chunks=chunks,
        experts=experts,
        tile=1024,
        outputs=", ".join(results[n] for n in outputs),
    ).strip()


def expert_of_row_text(name: str, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> str:
    """The kernel and the launcher of the expert of each row."""
    rows, counts = nodes[0].args
    experts = _experts(value_sizes(counts)[0])
    padded = _padded(experts)
    return _OF_ROW.format(
        name=name,
        inputs=_names(inputs),
        rows=rows,
        counts=counts,
        experts=experts,
        padded=padded,
        tile=max(1, min(256, _TILE // padded)),
    ).strip()


def _experts(given: Any) -> int:
    """How many experts there are.

    Raises:
        NoText: too many for a histogram, or data decide.
    """
    if not str(given).isdigit() or not 1 <= int(given) <= _MOST:
        raise NoText(f"{given} experts")
    return int(given)


def _padded(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _names(nodes: Sequence[fx.Node]) -> str:
    return ", ".join(n.name for n in nodes)


# --- regions ---


def find(graph: fx.Graph, claimed: set[fx.Node]) -> list[Region]:
    """The dispatch plans of a graph, among the nodes that no other region has claimed."""
    found: list[Region] = []
    for node in graph.nodes:
        if node.op != "call_function" or node in claimed:
            continue
        grow = _GROWN.get(name_of(node.target))
        nodes = grow(node) if grow else set()
        if not nodes or any(n in claimed and not is_free(n) for n in nodes) or any(nodes & set(r.nodes) for r in found):
            continue
        plan = region("plan", nodes, _TEXTS[name_of(node.target)])
        try:
            if plan.outputs:
                plan.source("kernel")
                found.append(plan)
        except NoText:
            continue
    return found


def _sorted(sort: fx.Node) -> set[fx.Node]:
    """A stable sort of ids of which only the order is read, and the count of the same ids; nothing if it is not that."""
    ids = argument(sort, "self")
    value = ids.meta["val"]
    if value.ndim != 1 or value.dtype != torch.int64 or argument(sort, "descending") or not argument(sort, "stable"):
        return set()
    read = {n for n in sort.users if n.users}
    if any(n.target is not operator.getitem or n.args[1] != 1 for n in read):
        return set()
    root, path = _root(ids)
    for count in root.graph.nodes:
        if count.op == "call_function" and name_of(count.target) == "foldcc.count" and _root(count.args[0])[0] is root:
            return {sort, *sort.users, count, *path, *_root(count.args[0])[1]}
    return set()


def _root(node: Any) -> tuple[fx.Node, set[fx.Node]]:
    """Where a node's elements come from in the same order, and what is on the way there."""
    path = set()
    while node.op == "call_function" and name_of(node.target) in SAME | RESHAPES:
        path.add(node)
        node = node.args[0]
    return node, path


def _chunked(node: fx.Node) -> set[fx.Node]:
    chunks: Any = node.args[1]
    if not isinstance(node.args[0], fx.Node) or chunks.meta["val"].device.type != "cpu":
        return set()
    return {node, *node.users} if all(n.target is operator.getitem for n in node.users) else set()


def _of_row(node: fx.Node) -> set[fx.Node]:
    return {node} if all(isinstance(x, fx.Node) and isinstance(x.meta["val"], Tensor) for x in node.args) else set()


_GROWN: dict[str, Callable[[fx.Node], set[fx.Node]]] = {
    "aten.sort": _sorted,
    "foldcc.by_expert": _chunked,
    "foldcc.expert_of_row": _of_row,
}
_TEXTS = {"aten.sort": sort_text, "foldcc.by_expert": by_expert_text, "foldcc.expert_of_row": expert_of_row_text}
