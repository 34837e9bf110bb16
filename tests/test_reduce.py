"""A large program is proved over smaller sizes: the same graph, wired alike; anything else is no proof."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import fx, nn

import foldcc
from foldcc import ops
from foldcc.errors import FoldError
from foldcc.ir.program import Program
from foldcc.mesh import FoldedMesh
from foldcc.module import FoldedModule
from foldcc.passes import Pass, Stages
from foldcc.verification.prove import too_large
from foldcc.verification.reduce import reduced
from foldcc.verification.same import first_unlike
from foldcc.verification.wiring import wired_alike
from tests.models import FAMILIES, WITH_AUX_LOSS, tiny_model, token_batch

aten = torch.ops.aten
LARGER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 256}


def folded(family: str, mesh: str = "dp=2,tp=2|ep=2,etp=2") -> FoldedModule:
    folded_mesh = FoldedMesh.parse(mesh)
    model = tiny_model(family, aux_loss=family in WITH_AUX_LOSS, **LARGER)
    return foldcc.parallelize(model, folded_mesh, example_inputs=token_batch(4 * folded_mesh.size("dp"), 32))


@pytest.fixture(scope="module")
def mixtral() -> FoldedModule:
    return folded("mixtral")


SOME = ("qwen3",)


@pytest.mark.parametrize("family", [f if f in SOME else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_a_reduced_program_is_proved_and_stands_for_the_full_one(family: str) -> None:
    model = folded(family)
    proof = foldcc.verify(model, reduced=True, rounds=1).raise_if_failed()
    small, full = reduced(model.stages), model.stages
    assert "wired alike" in str(proof) and "smaller sizes" in str(proof)
    assert "those of the module itself" in proof.proved[-1] and "on a copy of the model" in proof.proved[-1]
    assert len(small["outline"].program.calls) <= len(full["outline"].program.calls)
    sizes = small["shard"].program.sizes
    assert sum(sizes[f] < n for f, n in full["shard"].program.sizes.items()) >= 4
    assert foldcc.verify(model, reduced=False, rounds=1).ok


def test_a_large_program_is_reduced_unasked() -> None:
    with torch.device("meta"):
        model = tiny_model("mixtral", hidden_size=1024, intermediate_size=2048, num_hidden_layers=4)
    large = foldcc.parallelize(model, FoldedMesh.parse("dp=2,tp=2|ep=4"), example_inputs=token_batch(4))
    assert too_large(large.stages)
    assert "proved over smaller sizes" in str(foldcc.verify(large, rounds=1).raise_if_failed())


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """A pass of a user's own: every summed gradient times a number."""

    requires = frozenset({"bucketed"})
    provides = frozenset({"scaled"})
    by: float

    def run(self, program: Program) -> Program:
        assert program.backward is not None
        for block in program.backward.children():
            assert isinstance(block, fx.GraphModule)
            for node in block.graph.find_nodes(op="call_function", target=ops.all_reduce.overload):
                with block.graph.inserting_after(node):
                    new = block.graph.call_function(aten.mul.Scalar, (node, self.by))
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
            block.recompile()
        return program


def test_a_pass_of_a_users_own_is_part_of_a_reduced_program(mixtral: FoldedModule) -> None:
    foldcc.verify(mixtral.with_passes(Scale(by=1.0)), reduced=True, rounds=1).raise_if_failed()
    proof = foldcc.verify(mixtral.with_passes(Scale(by=2.0)), reduced=True, rounds=1)
    assert not proof.ok and proof.stage == "scale" and "2 times what it should be" in str(proof)


def edited(model: FoldedModule, change: Callable[[fx.GraphModule], None], direction: str = "graph") -> FoldedModule:
    """The model with a changed main graph in its last stage, which no pass has made."""
    found, last = copy.copy(model), model.stages[-1]
    program = last.program.copied()
    change(getattr(program, direction))
    found._programs = model._programs.rewritten(Stages([*model.stages[:-1], replace(last, program=program)]))
    return found


def test_a_changed_node_of_the_full_program_is_no_proof(mixtral: FoldedModule) -> None:
    def other_axis(main: fx.GraphModule) -> None:
        for block in main.children():
            for node in block.graph.find_nodes(op="call_function", target=ops.reduce_scatter.overload):
                node.args = (*node.args[:3], "dp")
                return

    proof = foldcc.verify(edited(mixtral, other_axis), reduced=True, rounds=1)
    assert not proof.ok and "a node that the passes do not make" in str(proof) and "reduce_scatter" in str(proof)


def _drop_add(main: fx.GraphModule) -> None:
    node = next(n for n in main.graph.nodes if n.target is aten.add.Tensor)
    node.replace_all_uses_with(node.args[0])


def _count_twice(main: fx.GraphModule) -> None:
    (output,) = main.graph.find_nodes(op="output")
    gradient = next(g for g in output.args[0] if g is not None)
    with main.graph.inserting_before(output):
        twice = main.graph.call_function(aten.add.Tensor, (gradient, gradient))
    output.replace_input_with(gradient, twice)


def _swap_layers(main: fx.GraphModule) -> None:
    """The gradients of two layers' weights change places."""
    (output,) = main.graph.find_nodes(op="output")
    gradients = list(output.args[0])
    alike = [i for i, g in enumerate(gradients) if g is not None]
    first, second = alike[2], alike[-3]
    gradients[first], gradients[second] = gradients[second], gradients[first]
    output.args = (tuple(gradients),)


@pytest.mark.parametrize("change", [_count_twice, _swap_layers])
def test_main_graphs_that_are_wired_otherwise_are_no_proof(mixtral: FoldedModule, change: Callable[..., None]) -> None:
    assert wired_alike(mixtral.stages, "ahead")
    wrong = edited(mixtral, change, "backward")
    assert not wired_alike(wrong.stages, "ahead")
    assert "main backward" in str(foldcc.verify(wrong, reduced=True, rounds=1))


def test_a_gradient_that_is_added_once_too_few_is_no_proof() -> None:
    tied = foldcc.parallelize(
        tiny_model("mixtral", tie_word_embeddings=True, num_hidden_layers=3),
        FoldedMesh.parse("dp=2,tp=2|ep=4"),
        example_inputs=token_batch(4),
    )
    assert wired_alike(tied.stages, "ahead")
    assert not wired_alike(edited(tied, _drop_add, "backward").stages, "ahead")


def test_a_layer_that_is_left_out_is_no_proof(mixtral: FoldedModule) -> None:
    def skip(main: fx.GraphModule) -> None:
        calls = [n for n in main.graph.nodes if n.op == "call_module" and n.target == "block1"]
        hidden = next(u for u in calls[1].users if u.args[1] == 0)
        before = next(u for u in calls[0].users if u.args[1] == 0)
        for result in list(hidden.users):
            if result.args[1] == 0:
                result.replace_all_uses_with(next(u for u in before.users if u.args[1] == 0))

    assert not wired_alike(edited(mixtral, skip).stages, "ahead")


def test_the_same_blocks_are_alike(mixtral: FoldedModule) -> None:
    assert first_unlike(mixtral.stages, reduced(mixtral.stages), "ahead") is None


def test_an_image_of_few_pixels_does_not_become_one_pixel() -> None:
    """The gradient of what is added to it would be summed over other dimensions than in the full program."""
    strided = [nn.Sequential(nn.Conv2d(3 if i == 0 else 8, 8, 3, 2, 1), nn.BatchNorm2d(8)) for i in range(3)]
    large = foldcc.parallelize(nn.Sequential(*strided), "dp=4", example_inputs=(torch.randn(8, 3, 32, 32),))
    small = reduced(large.stages)
    assert first_unlike(large.stages, small, large.stages[-1].name) is None
    assert first_unlike(large.stages, small, "precision") is None  # before there is anything that is divided
    assert sum(small["shard"].program.sizes.values()) < sum(large.stages["shard"].program.sizes.values())


def test_sizes_that_cannot_be_reduced_are_an_error() -> None:
    class Turned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(96, 96)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.inner(x) @ torch.eye(96)).sum()

    mesh = FoldedMesh.parse("dp=2")
    model = foldcc.parallelize(Turned(), mesh, example_inputs=(torch.randn(4, 96),))
    with pytest.raises(FoldError, match="cannot be made smaller"):
        foldcc.verify(model, reduced=True)
    assert foldcc.verify(model, reduced=False).ok


def test_a_mesh_that_is_too_large_is_an_error(mixtral: FoldedModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldcc.verification.prove._MOST", 1000)
    with pytest.raises(FoldError, match="too large to verify: [0-9]+ operators on each of 4 ranks"):
        foldcc.verify(mixtral, reduced=True)
