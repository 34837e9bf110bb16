"""Router: everything between a router's scores and its weights, as one kernel that holds whole rows.

    scores = softmax(logits)                               one row per token, [BR, E]
    weights, ids = topk(scores, K)                         the largest, K times
    weights = weights / sum(weights)                       [BR, K]

A region starts at the last top-k and grows over what it is made of and what is made of it, as long as the text can be written.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from foldcc.codegen.index import value_sizes
from foldcc.codegen.launchers import allocated, arguments, bound, decided, parameters, read_of, results
from foldcc.codegen.names import NoText
from foldcc.codegen.regions import Region, in_sequence, is_computed, is_free, region
from foldcc.codegen.whole_rows import SPECIAL, WholeRows
from foldcc.ir.node import name_of

_WIDEST = 1024  # elements of a row that top-k searches
_TILE = 2048  # elements of the largest tile, at best


def router_text(name: str, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> str:
    """A kernel and its launcher for top-k and the nodes around it.

    Raises:
        NoText: the nodes do not fit into one kernel; why.
    """
    last = [n for n in nodes if _is_top(n)][-1]
    tiles = WholeRows(inside=set(nodes), rows=sympy.prod(value_sizes(last.args[0])[:-1]))
    for n in outputs:
        lead = tiles.lead(n)
        tiles.store(n, lead, tiles.tile(n, lead))
    read = read_of(inputs, tiles.loads)
    if not read:
        raise NoText("it reads nothing")
    rows = tiles.text(tiles.rows)
    symbols = sorted({s.name for s in tiles.symbols} | decided(outputs))
    taken = [*parameters(read, results(outputs)), *symbols, "BR: tl.constexpr"]
    block = max(1, min(64, _TILE // tiles.largest))
    given = [*arguments(read, results(outputs)), *symbols, f"BR={block}"]
    return "\n".join(
        [
            "@triton.jit",
            f"def {name}_kernel({', '.join(taken)}):",
            "    r0 = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)",
            *(f"    {line}" for line in tiles.lines),
            "",
            "",
            f"def {name}({', '.join(n.name for n in inputs)}):",
            *(f"    {s} = {bound(s, inputs)}" for s in symbols),
            *(f"    {allocated(n, read[0])}" for n in outputs),
            f"    if {rows} > 0:",
            f"        {name}_kernel[(triton.cdiv({rows}, {block}),)]({', '.join(given)})",
            f"    return {', '.join(results(outputs))}",
        ]
    )


# --- regions ---


def _is_top(node: fx.Node) -> bool:
    return node.op == "call_function" and name_of(node.target) == "aten.topk"


def find(graph: fx.Graph, claimed: set[fx.Node]) -> list[Region]:
    """The routers of a graph, among the nodes that no other region has claimed."""
    taken, found = set(claimed), []
    for seed in reversed([n for n in graph.nodes if _is_top(n)]):
        if seed in taken or not _is_small(seed):
            continue
        try:
            grown = _checked(_with_pieces(seed), taken)
        except NoText:
            continue
        related = _related(seed)
        while larger := _larger(grown, related, taken):
            grown = larger
        taken |= {n for n in grown.nodes if not is_free(n)}
        found.append(grown)
    return found


def _is_small(seed: fx.Node) -> bool:
    sizes = value_sizes(seed.args[0])
    return len(sizes) > 1 and bool(sizes[-1].is_Integer) and bool(sizes[-1] <= _WIDEST)


def _related(seed: fx.Node) -> set[fx.Node]:
    """What a node is made of, and what is made of it."""
    found: set[fx.Node] = set()
    for near in (lambda n: n.all_input_nodes, lambda n: n.users):
        left = [seed]
        while left:
            new = [n for n in near(left.pop()) if n not in found]
            found.update(new)
            left += new
    return found


def _larger(found: Region, related: set[fx.Node], taken: set[fx.Node]) -> Region | None:
    """A region with one node more, if there is one."""
    for node in [*reversed(found.inputs), *_readers(found)]:
        if node in taken or node not in related or not _is_known(node):
            continue
        try:
            return _checked({*found.nodes} | _with_pieces(node), taken)
        except NoText:
            continue
    return None


def _is_known(node: fx.Node) -> bool:
    return _is_piece(node) or (is_computed(node) and value_sizes(node) != ())


def _is_piece(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and _is_top(node.args[0])


def _with_pieces(node: fx.Node) -> set[fx.Node]:
    """A node, or a top-k and its two results."""
    top: Any = node.args[0] if _is_piece(node) else node
    return {top, *top.users} if _is_top(top) else {node}


def _readers(of: Region) -> list[fx.Node]:
    """What is computed next from a region."""
    found: dict[fx.Node, None] = {}
    left = [n for n in of.nodes if not is_free(n)]
    while left:
        for user in left.pop().users:
            if is_free(user):
                left.append(user)
            elif user not in of.nodes:
                found[user] = None
    return list(found)


def _checked(nodes: set[fx.Node], taken: set[fx.Node]) -> Region:
    """A region of nodes and of what moves their operands, whose text can be written."""
    nodes = set(nodes)
    left = list(nodes)
    while left:
        for x in left.pop().all_input_nodes:
            if x not in nodes and x not in taken and is_free(x) and name_of(x.target) in SPECIAL:
                nodes.add(x)
                left.append(x)
    found = region("router", nodes, router_text)
    if not in_sequence(found.nodes[0].graph, [found]):
        raise NoText("a path leaves it and comes back")
    found.source("kernel")
    return found
