"""Annotate: name the factors. Every dimension of every value becomes a product of factors that the whole program shares.

%q : f32[4, 16, 64]        becomes        %q : f32[batch, seq, (kv_heads group head_dim)]
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import fx

from foldcc.factors import Dims, Factors
from foldcc.ir.node import operands
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program
from foldcc.rules.aten import rule_of
from foldcc.rules.notation import Pattern
from foldcc.rules.observed import observed_rule


class UnknownOperator(UserWarning):
    """An operator without a rule, and the axes on which its operands are replicated. Slow, never wrong."""


@dataclass(frozen=True, kw_only=True)
class Annotate(Pass):
    requires = frozenset({"outlined"})
    provides = frozenset({"annotated"})

    def run(self, program: Program) -> Program:
        inference = _Inference()
        for node in program.placeholders:
            inference.fresh(node)
        for block in program.blocks.values():
            for node in block.graph.nodes:
                inference.visit(node)
        for node in program.graph.graph.nodes:
            inference.connect(program, node)
        factors = inference.factors
        _name_inputs(program, inference)
        for node, dims in inference.dims.items():
            node.meta["dims"] = tuple(factors.symbols(dim) for dim in dims)
        return replace(program, sizes=factors.sizes)


class _Inference:
    """Union-find over the rules of all blocks, then over what the main graph passes to them."""

    def __init__(self) -> None:
        self.factors = Factors()
        self.dims: dict[fx.Node, Dims] = {}

    def fresh(self, node: fx.Node) -> None:
        self.dims[node] = tuple((self.factors.new(int(n)),) for n in node.meta["val"].shape)

    def visit(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.target is operator.getitem or node.op == "output":
            return
        if node.op == "placeholder":
            self.fresh(node)
            return
        results = [node]
        if isinstance(value, (tuple, list)):
            results = [u for u in node.users if u.target is operator.getitem]
        for r in results:
            if isinstance(r.meta["val"], torch.Tensor):
                self.fresh(r)
        rule = rule_of(node)
        if rule is None and operands(node):
            node.meta["unknown"] = True
            rule = observed_rule(node)
        node.meta["rule"] = rule
        if rule is None:
            return
        letters = {x: self.factors.new(n, rule.wishes.get(x, "")) for x, n in rule.sizes.items()}
        pairs: list[tuple[fx.Node | None, Pattern | None]] = list(zip(operands(node), rule.operands, strict=False))
        if isinstance(value, (tuple, list)):
            pairs += [(r, rule.results[r.args[1]]) for r in results]
        else:
            pairs.append((node, rule.results[0]))
        for member, pattern in pairs:
            if member is not None and pattern is not None:
                for dim, product in zip(self.dims[member], pattern, strict=True):
                    if not self.factors.unify(dim, [letters[x] for x in product]):
                        # The sizes do not nest, so the two have no factor in common that could be sharded.
                        node.meta["rule"] = None

    def connect(self, program: Program, node: fx.Node) -> None:
        if node.op != "call_module":
            return
        block: fx.GraphModule = getattr(program.graph, str(node.target))
        formals = list(block.graph.find_nodes(op="placeholder"))
        (output,) = block.graph.find_nodes(op="output")
        for user in node.users:
            self.fresh(user)
        returned = output.args[0]
        pairs = [*zip(formals, node.args, strict=True), *((returned[u.args[1]], u) for u in node.users)]
        for inner, outer in pairs:
            for a, b in zip(self.dims[inner], self.dims[outer], strict=True):
                self.factors.unify(a, b)


def _name_inputs(program: Program, inference: _Inference) -> None:
    """The samples of an input are called batch, and the other one of its first two dimensions is called seq.

    Where it is said which dimension is samples, they are the same samples in every input.
    """
    factors = inference.factors
    samples = None
    for node in program.placeholders:
        if program.slot(node.name).kind == "input":
            dims, batch = inference.dims[node], program.batch_dim(node)
            for d, dim in enumerate(dims):
                name = "batch" if d == batch else "seq" if d == (0 if batch == 1 else 1) else None
                if name is not None:
                    factors.unify(dim, (factors.new(factors.size(dim), name),))
            if batch is not None and program.batch_dims:
                samples = samples or dims[batch]
                factors.unify(samples, dims[batch])
