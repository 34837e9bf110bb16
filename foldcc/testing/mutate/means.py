"""Sums for means: the division by a count is left out. A count that is not joined over ranks is a collective left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from foldcc.mesh import FoldedMesh
from foldcc.testing.mutate.collectives import Mistakes
from foldcc.testing.mutate.edits import before, instead

aten = torch.ops.aten
_SUMS = {aten.mean.dim: aten.sum.dim_IntList, aten.mean.default: aten.sum.default}
_DIVISIONS = {aten.div.Tensor, aten.div.Scalar}


def summed(node: fx.Node, mesh: FoldedMesh) -> Mistakes:
    if node.target in _SUMS:
        target = _SUMS[node.target]
        yield "a mean becomes a sum", lambda node: instead(node, before(node, target, *node.args))
    elif node.target in _DIVISIONS and _is_count(node.args[1]):
        yield "the division by a count is left out", lambda node: instead(node, before(node, aten.clone.default, node.args[0]))


def _is_count(x: Any) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, fx.Node) and x.meta["val"].dim() == 0)
