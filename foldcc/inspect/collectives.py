"""Each collective of a training step: its axes, the bytes that one rank sends, and the module that it serves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foldcc.ir.pipeline import Stages
from foldcc.ir.program import Program
from foldcc.ir.sizes import Sizes, axes_of, communicates, human
from foldcc.ir.text import short
from foldcc.ir.walk import Mains, module_of, parts
from foldcc.ops import record
from foldcc.tables import table


@dataclass(frozen=True)
class Collective:
    """One collective of a block, over all calls of the block.

    Attributes:
        operator: its name, such as `all_gather`.
        axes: the mesh axes whose ranks form its groups.
        direction: "forward" or "backward".
        module: path of the module that it serves, of the first layer when layers repeat; empty for the model itself.
        calls: in one training step.
        bytes_per_call: that one rank sends in one call. Ring algorithms are assumed for gathers and reductions:
            (n - 1) / n of the payload for each of a reduction's two halves (Thakur et al. 2005, section 4).
        expected: the size is data, and this is what balanced routing sends.
        dtype: of what is sent.
    """

    operator: str
    axes: tuple[str, ...]
    direction: str
    module: str
    calls: int
    bytes_per_call: float
    expected: bool
    dtype: torch.dtype

    @property
    def bytes(self) -> float:
        """Bytes that one rank sends in a training step."""
        return self.calls * self.bytes_per_call


class Collectives(Sequence[Collective]):
    """The collectives of a training step. Printed they are a table, with dtypes if they differ; `~` marks an expected size."""

    def __init__(self, rows: Sequence[Collective]):
        self._rows = tuple(rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Collective]:
        return iter(self._rows)

    def bytes(self, axis: str | None = None) -> float:
        """Bytes that one rank sends in a training step, over groups that span `axis` or over all."""
        return sum(c.bytes for c in self._rows if axis is None or axis in c.axes)

    def __str__(self) -> str:
        several = len({c.dtype for c in self._rows if c.dtype.is_floating_point}) > 1
        rows = [
            [
                c.operator,
                ",".join(c.axes),
                c.direction,
                *([short(c.dtype)] if several else []),
                f"× {c.calls}",
                f"{'~' * c.expected}{human(c.bytes_per_call)}",
                f"{'~' * c.expected}{human(c.bytes)}",
                c.module or "(model)",
            ]
            for c in self._rows
        ]
        groups = list(dict.fromkeys(c.axes for c in self._rows))
        totals = [f"  {','.join(g):<5}  {human(sum(c.bytes for c in self._rows if c.axes == g))}" for g in groups]
        head = ["operator", "axes", "direction", *(["dtype"] if several else []), "calls", "a call", "a step", "module"]
        body = table(head, rows, right=range(len(head) - 4, len(head) - 1))
        note = ["~ is what balanced routing sends"] * any(c.expected for c in self._rows)
        return "\n".join([body, "", f"sent by one rank in a step: {human(self.bytes())}", *totals, *note])


def collectives(stages: Stages) -> Collectives:
    """The collectives of the newest program, forward and backward."""
    return Collectives(sent(stages.lowered[-1].program))


def sent(program: Program, mains: Mains | None = None) -> list[Collective]:
    """The collectives of a lowered program.

    Args:
        mains: of its main graphs, pieces; unless said otherwise, all of them.
    """
    rows = []
    sizes: dict[str, Sizes] = {}
    for part in parts(program, mains):
        known = sizes.setdefault(part.block, Sizes(program.mesh))
        for node in part.graph.graph.nodes:
            known.learn(node)
            if communicates(node):
                count, expected = known.sent(node)
                operator = record(node.target)
                assert operator is not None
                dtype = node.all_input_nodes[0].meta["val"].dtype
                told = (operator.name, axes_of(node), part.direction, module_of(node), part.calls, count, expected, dtype)
                rows.append(Collective(*told))
    return rows
