"""Packed sequences: position ids that start again within a row say that attention stops there; our node does not.

Whether they do is in the values, which a tracer does not have. But positions that a model counts by itself are those of
one sequence per row; only positions that are given can be packed. So the queries are marked with their positions, and
once the graph is there, a mark that reads an input is refused and the others vanish.
"""

from __future__ import annotations

import torch
from torch import fx

from foldcc.errors import FoldError
from foldcc.ops.operator import LIBRARY

LIBRARY.define("at_positions(Tensor queries, Tensor position_ids) -> Tensor")
LIBRARY.impl("at_positions", lambda queries, position_ids: queries.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("foldcc::at_positions", lambda queries, position_ids: torch.empty_like(queries), lib=LIBRARY)
at_positions = torch.ops.foldcc.at_positions.default


def remove_marks(graph: fx.Graph, inputs: set[str]) -> None:
    """Removes the marks.

    Args:
        inputs: names of the placeholders that the caller of the model fills.

    Raises:
        FoldError: position ids come from an input, so the rows may hold several sequences.
    """
    for node in list(graph.find_nodes(op="call_function", target=at_positions)):
        given = _sources(node.args[1]) & inputs
        if given:
            raise FoldError(
                f"Attention is packed by {', '.join(sorted(given))}: where the positions start again, so does a "
                "sequence, and foldcc's attention does not carry that.",
                valid="an attention_mask besides the position_ids, which makes each row one sequence; or none of them",
            )
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def _sources(node: fx.Node) -> set[str]:
    """Names of the placeholders that a value is computed from."""
    found, stack = set(), [node]
    seen: set[fx.Node] = set()
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            stack += n.all_input_nodes
            if n.op == "placeholder":
                found.add(n.name)
    return found
