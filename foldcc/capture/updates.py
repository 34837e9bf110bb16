"""State that a model updates in its forward: the new value of a buffer is a result of the program.

    self.count += 1                                                    count_1 = count + 1
    return y                                 becomes                   return y, detach(count_1)

It has no gradient, as what is written into a buffer has none in a step of training, and is a node of its own, so that it may be
laid out as the buffer is, however else the value is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx
from torch.export.graph_signature import OutputKind, OutputSpec

from foldcc.errors import FoldError
from foldcc.ir.program import Slot

aten = torch.ops.aten


def return_updates(graph: fx.GraphModule, specs: Iterable[OutputSpec], slots: Sequence[Slot], marks: int) -> list[str]:
    """Has the graph return the new values of buffers behind what the model returns, in front of marks for hooks.

    Args:
        specs: of what the graph returns, which has them first.
        marks: how many of the last results are for hooks.

    Returns:
        The slots of the buffers, in the order of their values.

    Raises:
        FoldError: the model changes what is no buffer.
    """
    (output,) = graph.graph.find_nodes(op="output")
    returned: list[fx.Node | None] = []
    updates: dict[str, fx.Node] = {}
    for spec, value in zip(specs, output.args[0], strict=True):
        if spec.kind == OutputKind.USER_OUTPUT:
            returned.append(value)
            continue
        slot = next((s for s in slots if s.kind == "buffer" and spec.target in s.names), None)
        if spec.kind != OutputKind.BUFFER_MUTATION or slot is None:
            raise FoldError(
                f"The forward pass changes {spec.target}, which is no buffer of the model.",
                valid="a forward that returns what it computes; state in a buffer (register_buffer)",
            )
        updates[slot.name] = _detached(graph.graph, value)
    own = len(returned) - marks
    output.args = ((*returned[:own], *updates.values(), *returned[own:]),)
    return list(updates)


def _detached(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """The value without its gradient, right behind it, so that it belongs to the layer that it comes from."""
    behind = value if value.op != "placeholder" else list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(behind):
        node = graph.call_function(aten.detach.default, (value,))
    node.meta = dict(value.meta)
    return node
