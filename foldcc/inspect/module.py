"""A folded module in a few lines: what it is of, on which mesh, and what it holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from torch import nn
from torch.distributed.tensor import DTensor

from foldcc.hooks import told, watched
from foldcc.ir.sizes import human
from foldcc.layout import Layout
from foldcc.mesh import FoldedMesh


def described(
    name: str,
    tree: nn.Module,
    mesh: FoldedMesh,
    layouts: dict[str, Layout],
    stages: Mapping[str, tuple[int, ...]],
    programs: int,
) -> str:
    """As a console shows it.

    Args:
        name: of the model's class.
        layouts: of the parameters that have one, by name.
        stages: that hold a parameter, by name, where there are several pipeline stages.
        programs: how many are kept.
    """
    parameters = dict(tree.named_parameters())
    whole = sum(p.numel() * p.element_size() for p in parameters.values())
    held: Counter[int] = Counter()  # by place of pp
    for n, p in parameters.items():
        count = p.to_local().numel() if isinstance(p, DTensor) else p.numel()
        if n in layouts and not isinstance(p, DTensor):
            count = math.prod(int(size) for size in layouts[n].shape)
        held.update(dict.fromkeys({s % mesh.size("pp") for s in stages.get(n, (0,))}, count * p.element_size()))
    lines = [
        f"{name} on {mesh}",
        f"parameters {sum(p.numel() for p in parameters.values()):,} in {len(parameters)} tensors, {human(whole)}",
        f"a rank     {human(max(held.values(), default=0))}" + ("" if layouts else ", before anything is compiled"),
        f"programs   {programs} compiled",
    ]
    if watches := watched(tree):
        lines.append(f"hooks     {told(watches)}")
    return "\n  ".join(["FoldedModule(", *lines]) + "\n)"
