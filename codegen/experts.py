"""Finding the grouped products of a graph, with the rows that they read and what is computed on their result.

    permute -> grouped_linear -> split -> silu -> mul          one region
    permute -> grouped_outer                                   another; both read the rows through the order

A product takes the pointwise nodes that follow it, those that only they read, and those that read only what it reads. Rows
that are put in order only for products are put in order by them; rows that anything else reads, such as a backward pass, are
there and are read in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from foldcc.codegen.grouped import is_row_sum, linear_text, outer_text
from foldcc.codegen.lines import REDUCTIONS
from foldcc.codegen.names import NoText
from foldcc.codegen.regions import (
    MOST,
    Region,
    Text,
    in_sequence,
    is_computed,
    is_free,
    own,
    path,
    read_outside,
    region,
)
from foldcc.ir.node import name_of

_TEXTS: dict[str, Text] = {"foldcc.grouped_linear": linear_text, "foldcc.grouped_outer": outer_text}
# A tile does not hold a whole row, and rows of a product are not reordered after it.
_REFUSED = {*REDUCTIONS, "aten._softmax", "aten._softmax_backward_data", "aten.scatter", "aten.scatter_add", "foldcc.permute"}


def find(graph: fx.Graph, claimed: set[fx.Node]) -> list[Region]:
    """The grouped products of a graph as regions, which can run one after another.

    A permute that only products read is among the nodes of the last of them, and all of them read through it.

    Args:
        claimed: nodes that belong to others.
    """
    found: list[Region] = []
    for product in graph.nodes:
        if _is_product(product) and product not in claimed:
            try:
                alone = _checked(product, {product}, _rows_put_in_order(product, claimed))
            except NoText:
                continue
            found.append(_grown(product, alone, claimed, found) if alone.text is linear_text else alone)
    return found


def _grown(product: fx.Node, found: Region, claimed: set[fx.Node], others: Sequence[Region]) -> Region:
    """A product with the nodes after it that one kernel can compute with it."""
    tried: set[fx.Node] = set()
    taken, rows = claimed.union(*map(own, others)), _rows_put_in_order(product, claimed)
    while near := next((n for n in product.graph.nodes if n not in tried and _belongs(n, product, found, taken)), None):
        tried.add(near)
        try:
            wider = _checked(product, {*found.nodes, near, *path(near, taken)}, rows)
        except NoText:
            continue
        if in_sequence(product.graph, [*others, wider]):
            found = wider
    return found


def _belongs(node: fx.Node, product: fx.Node, found: Region, taken: set[fx.Node]) -> bool:
    """Whether a node computes with a result of the region, or only for it, or with nothing but what the region reads."""
    if node in taken or node in found.nodes or not is_computed(node):
        return False
    if is_row_sum(node):
        return node.args[0] in found.nodes
    if name_of(node.target) in _REFUSED:
        return False
    read = {n for n in _read(node, taken) if not is_free(n)}
    if read and read <= set(found.inputs):
        return True
    after = any(n in found.nodes for n in read)
    return after or not (read_outside(node, set(found.nodes)) or node in _read(product, taken))


def _read(node: fx.Node, taken: set[fx.Node]) -> set[fx.Node]:
    """What a node reads, also by way of what only moves elements."""
    return {x for n in (node, *path(node, taken)) for x in n.all_input_nodes}


def _rows_put_in_order(product: fx.Node, claimed: set[fx.Node]) -> set[fx.Node]:
    """The permutes among a product's operands that nothing but products reads."""
    operands = [n for n in product.all_input_nodes if name_of(n.target) == "foldcc.permute" and n not in claimed]
    return {n for n in operands if all(_is_product(u) and u not in claimed for u in n.users)}


def _is_product(node: fx.Node) -> bool:
    return node.op == "call_function" and name_of(node.target) in _TEXTS


def _checked(product: fx.Node, nodes: set[fx.Node], rows: set[fx.Node]) -> Region:
    """A region whose text can be written, of a product that reads through `rows`."""
    name = name_of(product.target)
    found = region(name.removeprefix("foldcc."), nodes | rows, _TEXTS[name])
    elsewhere = {n for n in rows if max(n.users, key=list(product.graph.nodes).index) is not product}
    kept = tuple(n for n in found.nodes if n not in elsewhere)
    found = replace(found, nodes=kept, outputs=tuple(n for n in found.outputs if n not in rows))
    if len(found.inputs) + len(found.outputs) > MOST:
        raise NoText(f"{len(found.inputs)} inputs")
    found.source("kernel")
    return found
