"""Travel: in which dtype values travel between ranks, where that is not the one in which they are read.

    y = cast(all_gather(x))        becomes    y = all_gather(cast(x))                    x f32, y bf16
    y = all_gather(cast(x))        becomes    y = cast(all_gather(x))                    x bf16, y f32
    dw = all_reduce(x)             becomes    dw = cast(all_reduce(cast(x)))             dw bf16, gradients are added in f32

What moves and adds nothing is the same in any order with a cast, and goes the way on which it is narrower. The gradients of
parameters are added in the dtype that the plan's precision says, those in float64 in float64. Other sums, of activations and of
their gradients, go the narrower way too, if there is a precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from foldcc import ops
from foldcc.ir.joint import Joint, sums
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program
from foldcc.ir.rewrite import emit
from foldcc.ops import record

cast = torch.ops.aten._to_copy.default


@dataclass(frozen=True, kw_only=True)
class Travel(Pass):
    requires = frozenset({"joint"})
    provides = frozenset({"travelling"})

    def run(self, program: Program) -> Program:
        precision = program.plan.precision
        for block in program.blocks.values():
            joint = Joint.of(block)
            pairs = [(f, g) for f, g in zip(joint.formals, joint.gradients, strict=bool(joint.tangents)) if f.meta["parameter"]]
            reductions = dict.fromkeys(x for _, gradient in pairs for x in sums(gradient))
            for node in reversed(list(block.graph.nodes)):
                _narrowed_before(node)
            for node in list(block.graph.nodes):
                if node in reductions and precision is not None:
                    _run_in(node, torch.float64 if _dtype(node) == torch.float64 else precision.reduce)
                else:
                    _widened_behind(node, sums=precision is not None)
            block.graph.eliminate_dead_code()
            block.recompile()
        return program


def _narrowed_before(node: fx.Node) -> None:
    """What moves, and is only read in a narrower dtype, is cast first."""
    to = {_dtype(user) if _is_cast(user) else None for user in node.users}
    if _moves(node) and len(to) == 1 and _narrower(dtype := to.pop(), _dtype(node)):
        users = list(node.users)
        _give(node, emit(node, cast, node.args[0], dtype=dtype))
        for user in users:
            user.replace_all_uses_with(node)
            node.graph.erase_node(user)


def _widened_behind(node: fx.Node, *, sums: bool) -> None:
    """What moves, or adds, what was in a narrower dtype, is cast behind that."""
    known = record(node.target)
    if known is not None and (known.moves or (sums and known.adds)):
        source = node.args[0].args[0] if _is_cast(node.args[0]) else node
        if _narrower(_dtype(source), _dtype(node)):
            _run_in(node, _dtype(source))


def _moves(node: fx.Node) -> bool:
    """Whether a value is made of another's elements that went between ranks; what had filled them up is cut off again."""
    if node.target is torch.ops.aten.slice.Tensor:
        return node.args[0].target is ops.all_gather.overload
    known = record(node.target)
    return known is not None and known.moves


def _run_in(node: fx.Node, dtype: torch.dtype) -> None:
    """A collective runs in a dtype; what it is given and what it leaves is cast, where that is in another one."""
    x, own = node.args[0], _dtype(node)
    if own != dtype:
        there = _is_cast(x) and _dtype(x.args[0]) == dtype
        _give(node, x.args[0] if there else emit(node, cast, x, dtype=dtype))
        back = emit(node.next, cast, node, about=node, dtype=own)
        node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)


def _give(node: fx.Node, x: fx.Node) -> None:
    """Another operand, in another dtype."""
    node.args = (x, *node.args[1:])
    with node.meta["val"].fake_mode:
        node.meta["val"] = node.meta["val"].to(_dtype(x))


def _is_cast(node: fx.Node) -> bool:
    """Whether a value is another one in another dtype, where that is."""
    return node.target is cast and node.kwargs.keys() == {"dtype"}


def _narrower(one: torch.dtype | None, other: torch.dtype) -> bool:
    return one is not None and one != other and one.is_floating_point and torch.promote_types(one, other) == other


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)
