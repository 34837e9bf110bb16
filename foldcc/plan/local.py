"""Inserting what one rank computes: a call is given its layout, and its dtype, its place and its gradient follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from foldcc.ir.rewrite import provenance
from foldcc.layout import Layout
from foldcc.mesh import FoldedMesh
from foldcc.ops.groups import active
from foldcc.ops.layout import cross_fold, reshard
from foldcc.plan.interface import flows


@dataclass(frozen=True)
class Inserting:
    """Inserts calls on one rank's tensors into graphs whose values are global.

    Attributes:
        mesh: the one that the axes of calls are of.
        device: of what was inserted before and has a dtype only.
        values: of each value that was read or inserted, what one rank holds: a fake tensor.
    """

    mesh: FoldedMesh
    device: torch.device
    values: dict[fx.Node, Any] = field(default_factory=dict)
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True))

    def before(self, node: fx.Node, target: Any, args: tuple[Any, ...], layout: Layout | None, **kwargs: Any) -> fx.Node:
        """Inserts a call before a node, in whose place of the model it is.

        Args:
            target: an operator, or the record of one of ours.
            layout: of the result; None for what has none, such as a tuple.
        """
        target = getattr(target, "overload", target)
        with node.graph.inserting_before(node):
            new = node.graph.call_function(target, args, kwargs)
        with self.mode, torch.no_grad(), active(self.mesh):
            values, named = fx.map_arg((args, kwargs), self._held)
            # What changes a layout changes neither the dtype nor, as long as it is one node, the global shape.
            held = self._of(layout, values[0]) if target in (cross_fold, reshard) else target(*values, **named)
        self.values[new] = held
        new.meta = provenance(node) | {"layout": layout, "dtype": getattr(held, "dtype", None)}
        new.meta["grad"] = flows(new, {x for x in new.all_input_nodes if x.meta.get("grad")}, held)
        if layout is not None:
            new.meta["dims"] = layout.dims
        return new

    def whole(self, node: fx.Node) -> Any:
        """What all ranks hold together of a value that was inserted, as nodes say it until blocks are settled."""
        held, layout = self.values[node], node.meta["layout"]
        return self._sized(layout.global_shape, held) if isinstance(held, torch.Tensor) else held

    def _held(self, node: fx.Node) -> Any:
        if node not in self.values:
            layout, value, dtype = (node.meta.get(key) for key in ("layout", "val", "dtype"))
            if value is None and dtype is not None:
                value = torch.empty((), dtype=dtype, device=self.device)
            self.values[node] = self._of(layout, value) if isinstance(value, torch.Tensor) else value
        return self.values[node]

    def _of(self, layout: Layout | None, like: torch.Tensor) -> torch.Tensor:
        return self._sized(like.shape if layout is None else layout.shape, like)

    def _sized(self, shape: Sequence[Any], like: torch.Tensor) -> torch.Tensor:
        with self.mode:
            return torch.empty([n if isinstance(n, int) else self._some() for n in shape], dtype=like.dtype, device=like.device)

    def _some(self) -> torch.SymInt:
        """How many rows there are where that is data."""
        assert self.mode.shape_env is not None
        return self.mode.shape_env.create_unbacked_symint()
