"""Lower: what only said something about types goes, and what is left is what runs.

y = retype(x, "dp", "I", "R")       becomes       x
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from foldcc import ops
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program

_SILENT = {ops.retype.overload, torch.ops.aten.detach.default, torch.ops.aten.alias.default}


@dataclass(frozen=True, kw_only=True)
class Lower(Pass):
    requires = frozenset({"differentiated"})
    provides = frozenset({"lowered"})

    def run(self, program: Program) -> Program:
        for main in program.mains:
            _lower(main)
        return program


def _lower(main: fx.GraphModule) -> None:
    for block in main.children():
        assert isinstance(block, fx.GraphModule)
        for node in list(block.graph.nodes):
            if node.target in _SILENT:
                node.replace_all_uses_with(node.args[0])
                block.graph.erase_node(node)
        block.recompile()
