"""Differentiate: the joint graph of each distinct block.

    y = block(x, w)        becomes        y, (dx, dw) = block(x, w, dy)

AOTAutograd traces each block once. Every collective has its transpose registered, so gradient synchronisation appears in
the joint graph by itself: where a parameter enters as I and is used as R, the transpose of that step is its reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses import FakeTensorMode
from torch.fx import traceback as fx_traceback
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from foldcc.errors import FoldError
from foldcc.ir.joint import read_sizes
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program
from foldcc.layout import Layout
from foldcc.ops.captured import captured_records
from foldcc.ops.groups import active

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Differentiate(Pass):
    """Attributes:
    in_pieces: what one kernel computes in pieces is traced in pieces.
    """

    requires = frozenset({"localized"})
    provides = frozenset({"joint"})
    in_place = False
    in_pieces: bool = False

    def run(self, program: Program) -> Program:
        instead = {r.local: r.in_pieces for r in captured_records() if r.in_pieces is not None} if self.in_pieces else {}
        with active(program.mesh):
            joints = {name: _named(block, _trace(block, instead)) for name, block in program.blocks.items()}
        graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in program.graph.graph.nodes:
            new[node] = graph.node_copy(node, lambda n: new[n])
        root = torch.nn.Module()
        for name, joint in joints.items():
            setattr(root, name, joint)
        return replace(program, graph=_LazyGraphModule(root, graph))


def _trace(block: fx.GraphModule, instead: Mapping[Any, Callable[..., Any]]) -> fx.GraphModule:
    """The joint graph of a block; the forward graph alone when no result has a gradient.

    Args:
        instead: what is traced in place of some operators.
    """
    (output,) = block.graph.find_nodes(op="output")
    both = any(n.meta["grad"] for n in output.args[0])
    for node in block.graph.nodes:
        # What tracing keeps of a node's meta, for the operators that it becomes and for their transposes.
        node.meta["custom"] = {k: node.meta[k] for k in ("nn_module_stack", "source") if k in node.meta} | {"origin": node.name}
        node.meta["custom"]["used_up"] = _used_up(node)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode, fx_traceback.preserve_node_meta():
        inputs = tuple(
            torch.empty(
                n.meta["layout"].shape,
                dtype=n.meta["val"].dtype,
                device=n.meta["val"].device,
                requires_grad=both and n.meta["grad"],
            )
            for n in block.graph.find_nodes(op="placeholder")
        )
        joint: Any = aot_export_joint_simple(_without_views(block, instead), inputs, trace_joint=both)
    for node in joint.graph.find_nodes(op="call_function", target=torch.ops.higher_order.with_effects):
        name = next(str(a) for a in node.args if isinstance(a, torch._ops.OpOverload))
        raise FoldError(
            f"{name} has an effect besides its result, such as an error for some values, which no program keeps.",
            at=node.meta.get("custom", {}).get("source"),
            valid="an operator without one, such as torch.linalg.inv_ex for torch.linalg.inv",
        )
    _drop_clones(joint, len(output.args[0]))
    for node in joint.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default  # what another block computed may have other strides than what was traced
    for node in block.graph.nodes:
        del node.meta["custom"]
    for node in joint.graph.nodes:
        node.meta |= node.meta.pop("custom", {})
    return joint


def _used_up(node: fx.Node) -> frozenset[str]:
    """The axes that a collective divides, or joins again, along a factor that may have size 1 on a rank."""
    layouts = [n.meta["layout"] for n in (node, *node.all_input_nodes[:1]) if isinstance(n.meta.get("layout"), Layout)]
    return frozenset(axis for layout in layouts for axis, s in layout.states.items() if layout.used_up(s))


def _without_views(block: fx.GraphModule, instead: Mapping[Any, Callable[..., Any]]) -> Callable[..., Any]:
    """The block with copies as results: AOTAutograd refuses views, such as what `linear` makes of three dimensions."""

    class Run(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            return super().call_function(instead.get(target, target), args, kwargs)

    run = Run(block).run
    return lambda *values: tuple(x.clone() for x in run(*values))


def _drop_clones(joint: fx.GraphModule, results: int) -> None:
    (output,) = joint.graph.find_nodes(op="output")
    leaves = list(output.args[0])
    for i, leaf in enumerate(leaves[:results]):
        if leaf.target is aten.clone.default and leaf.args[0].op != "placeholder":
            leaves[i] = leaf.args[0]
    output.args = (tuple(leaves),)


def _named(block: fx.GraphModule, joint: fx.GraphModule) -> fx.GraphModule:
    """A joint graph whose arguments and results are called, and laid out, as those of its block, and gradients accordingly."""
    (output,) = block.graph.find_nodes(op="output")
    formals = list(block.graph.find_nodes(op="placeholder"))
    given = [(i, n) for i, n in enumerate(output.args[0]) if n.meta["grad"]]
    tangents = [(f"grad_{n.name}", {"result": i, "layout": n.meta["layout"].transposed}) for i, n in given]
    called = [(n.name, {k: n.meta[k] for k in ("layout", "parameter")}) for n in formals] + tangents
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node, (name, meta) in zip(joint.graph.find_nodes(op="placeholder"), called, strict=True):
        while any(name == n.target for n in new.values()):  # a formal may be called like a result of this block
            name += "_"
        new[node] = graph.placeholder(name)
        new[node].meta = {"val": node.meta["val"], **meta}
    for node in joint.graph.nodes:
        if node.op not in ("placeholder", "output"):
            new[node] = graph.node_copy(node, lambda n: new[n])
    leaves = fx.map_arg(joint.graph.output_node().args[0], new.__getitem__)
    count = len(output.args[0])
    results, gradients = tuple(leaves[:count]), tuple(leaves[count:]) or (None,) * len(formals)
    left = tuple((n.name, n.meta["layout"]) for n in output.args[0])
    asked = tuple((f"grad_{n.name}", n.meta["layout"].transposed) for n in formals)
    for value, (_, layout) in zip((*results, *gradients), (*left, *asked), strict=True):
        if value is not None:
            value.meta["layout"] = layout
    graph.output((results, gradients)).meta = {"joint": True, "returns": (left, asked)}
    named = _LazyGraphModule(torch.nn.Module(), graph)
    read_sizes(named)
    return named
