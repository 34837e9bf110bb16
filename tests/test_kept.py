"""What a model keeps for its backward pass: no more than before, and nothing that a kernel can compute again."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor, fx

import foldcc
from foldcc.ir.node import name_of
from foldcc.ir.parse import parse_stage
from foldcc.ir.program import Program
from foldcc.ir.syntax import parse
from foldcc.mesh import FoldedMesh
from foldcc.module import FoldedModule
from foldcc.testing.mutate.mutant import rewrite
from foldcc.testing.text import derived
from tests.models import tiny_model, token_batch

VOCABULARY = 128
MESH = "dp=2,tp=2|ep=4"


@cache
def folded(kernels: str) -> FoldedModule:
    model = tiny_model("mixtral", vocab_size=VOCABULARY, num_hidden_layers=1).bfloat16()
    return foldcc.parallelize(model, FoldedMesh.parse(MESH), example_inputs=token_batch(4, 8), kernels=kernels)


@pytest.mark.parametrize("stage", ["differentiate", "experts", "recompute", "split"])
def test_the_joint_graph_is_a_stage_that_is_printed_read_typed_and_proved(stage: str) -> None:
    found = folded("triton").stages[stage]
    again = parse_stage(str(found))
    derived(again.program)
    assert str(again) == str(found)
    lines = parse(str(found))
    typed = [line for line in lines if line.block.startswith("block") and line.operation != "argument" and line.dtype]
    assert len(typed) > 100 and all(line.types is not None or line.layout is not None for line in typed)
    assert foldcc.verify(folded("triton"), stage=stage, rounds=1).stage == stage


def test_kernels_are_not_read() -> None:
    with pytest.raises(foldcc.FoldError, match="Kernels stand in this stage"):
        parse_stage(str(folded("triton").stages["emit"]))


def test_a_mistake_in_a_joint_graph_is_found_where_it_is() -> None:
    def doubled(program: Program) -> None:
        for block in program.blocks.values():
            for node in block.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
                with block.graph.inserting_after(node):
                    twice = block.graph.call_function(torch.ops.aten.mul.Scalar, (node, 2))
                twice.meta = dict(node.meta)
                node.replace_all_uses_with(twice, delete_user_cb=lambda user, twice=twice: user is not twice)

    broken = rewrite(folded("triton"), after="recompute", edit=doubled)
    assert foldcc.verify(broken, stage="experts", rounds=1).ok and not foldcc.verify(broken, stage="recompute", rounds=1).ok


def saved(model: FoldedModule) -> list[fx.Node]:
    """What the blocks keep, parameters aside."""
    found = []
    for block in model.stages["split"].program.graph.children():
        (output,) = block.graph.find_nodes(op="output")  # type: ignore[union-attr, operator]
        found += [n for n in output.args[0][1] if isinstance(n.meta["val"], Tensor) and not n.meta.get("parameter")]
    return found


def size(nodes: list[fx.Node]) -> int:
    """Bytes, of tensors that are not views of each other."""
    values = [n.meta["val"] for n in nodes]
    return sum(math.prod(s if isinstance(s, int) else 32 for s in v.shape) * v.element_size() for v in values)


def test_less_is_kept_where_kernels_compute_again() -> None:
    assert size(saved(folded("triton"))) < size(saved(folded("aten")))


def test_logits_are_kept_once() -> None:
    shape = str([16, VOCABULARY // 2])
    held, before = ([n for n in saved(folded(k)) if str(list(n.meta["val"].shape)) == shape] for k in ("triton", "aten"))
    assert [n.meta["val"].dtype for n in held] == [torch.bfloat16]
    assert torch.float32 in [n.meta["val"].dtype for n in before]


def test_experts_keep_no_activation_and_no_product_is_taken_twice() -> None:
    model = folded("triton")
    wide = [n for n in saved(model) if n.meta["val"].dim() == 2 and n.meta["val"].dtype == torch.bfloat16]
    assert wide and not any(name_of(n.target) in ("aten.silu", "aten.mul", "foldcc.gather_rows") for n in wide)
    backward = model.stages["split"].program.backward
    assert backward is not None
    again = {n for b in backward.children() for n in b.graph.nodes if n.meta.get("again")}  # type: ignore[union-attr]
    assert {"aten.silu", "aten.mul"} <= {name_of(n.target) for n in again if hasattr(n.target, "_schema")}
    assert not any(hasattr(n.target, "_schema") and name_of(n.target) in ("aten.topk", "aten.mm") for n in again)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loss_in_pieces_is_cross_entropy(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(12, 20, generator=random, dtype=torch.float64)).to(dtype).requires_grad_()
    target = torch.randint(20, (12,), generator=random).index_fill_(0, torch.tensor([3, 7]), -100)
    weights = torch.randn(12, generator=random, dtype=torch.float64).to(dtype)
    limit = 1e-12 if dtype == torch.float64 else 1e-2
    loss = foldcc.ops.captured_record(foldcc.ops.token_loss)
    found, wanted = loss.in_pieces(logits, target, -100), loss.local(logits, target, -100)
    assert found.dtype == wanted.dtype and (found - wanted).norm() <= limit * wanted.norm()
    grads = [torch.autograd.grad((x * weights).sum(), logits)[0] for x in (found, wanted)]
    assert (grads[0] - grads[1]).norm() <= limit * grads[1].norm() and not grads[0][[3, 7]].any()
