"""What a stage prints is the whole program: it parses, prints again and runs as it did."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import foldcc
from foldcc.ir.parse import parse_program, parse_stage
from foldcc.ir.pipeline import Stage
from foldcc.ir.program import Program
from foldcc.ir.walk import parts
from foldcc.passes import check_types, run_passes
from foldcc.passes.shard import ShardPass
from foldcc.runtime.executable import Executable
from foldcc.testing.text import derived
from tests.models import WITH_AUX_LOSS, tiny_model, token_batch

BATCH = token_batch(4, 8)
MODELS = {"mixtral": {"num_hidden_layers": 1}, "deepseek_v3": {"num_hidden_layers": 2}, "llama": {"num_hidden_layers": 2}}
MESHES = ["dp=2,tp=2|ep=2,etp=2", "tp=4|ep=2"]
PAIRS = [("mixtral", MESHES[0]), ("deepseek_v3", MESHES[1]), ("llama", MESHES[0])]
PAIRS += [pytest.param(f, m, marks=pytest.mark.slow) for f in MODELS for m in MESHES if (f, m) not in PAIRS]


@cache
def folded(family: str, mesh: str, kernels: str = "aten") -> foldcc.FoldedModule:
    model = tiny_model(family, aux_loss=family in WITH_AUX_LOSS, **MODELS[family])
    return foldcc.parallelize(model, mesh, example_inputs=BATCH, kernels=kernels)


def again(stage: Stage) -> Stage:
    """A stage from its text."""
    found = parse_stage(str(stage))
    derived(found.program)
    return found


def told(node: fx.Node) -> dict[str, Any]:
    """What passes and types read of a node, of what a text says or of what follows from it."""
    kept = {k: node.meta[k] for k in ("layout", "types", "result", "kept", "buckets") if node.meta.get(k) is not None}
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        kept["val"] = (value.dtype, [str(n) if str(n).isdigit() else "by data" for n in value.shape])
    return kept


@pytest.mark.parametrize(("family", "mesh"), PAIRS)
def test_every_stage_is_the_program_that_it_prints(family: str, mesh: str) -> None:
    for stage in folded(family, mesh).stages:
        found = again(stage)
        assert str(found) == str(stage)
        for old, new in zip(parts(stage.program), parts(found.program), strict=True):
            for a, b in zip(old.graph.graph.nodes, new.graph.graph.nodes, strict=True):
                assert (a.name, a.op, a.target) == (b.name, b.op, b.target) and told(a) == {
                    k: x for k, x in told(b).items() if k in told(a)
                }, a.name
                value = a.meta.get("val")
                if stage.name in ("shard", "localize") and isinstance(value, Tensor) and value.is_floating_point():
                    assert a.meta["grad"] == b.meta["grad"], (stage.name, a.name)
                if "returns" in a.meta:
                    layouts = [[layout for _, layout in side] for side in _sides(a)]
                    assert layouts == [[layout for _, layout in side] for side in _sides(b)]


def _sides(output: fx.Node) -> Any:
    return output.meta["returns"] if "joint" in output.meta else (output.meta["returns"],)


def run(module: foldcc.FoldedModule, program: Program) -> list[Tensor]:
    """Outputs and gradients of one step."""
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    held |= {f"['{name}']": x for name, x in BATCH.items()}
    values = [held[s.names[0]].detach().requires_grad_(s.grad) for s in program.slots]
    executable = Executable(program)
    outputs = executable(values, lambda given: executable)
    wanted = [x for x, there in zip(outputs, program.wanted or (), strict=True) if there]
    torch.autograd.backward(wanted, [torch.ones_like(x) for x in wanted])
    return [*outputs, *(v.grad for v in values if v.grad is not None)]


@pytest.mark.parametrize(("family", "mesh"), PAIRS)
def test_what_is_read_runs_bit_for_bit(family: str, mesh: str) -> None:
    module = folded(family, mesh)
    found, wanted = (run(module, s.program) for s in (again(module.stages[-1]), module.stages[-1]))
    assert len(found) == len(wanted) > 10 and all(map(torch.equal, found, wanted))


def test_what_the_backward_pass_computes_again_is_read_too() -> None:
    module = folded("mixtral", MESHES[0], "triton")
    for stage in module.stages.lowered:
        assert str(again(stage)) == str(stage)
    with pytest.raises(foldcc.FoldError, match="Kernels stand in this stage"):
        again(module.stages["emit"])


@pytest.mark.parametrize("stage", ["annotate", "dispatch", "differentiate"])
def test_passes_go_on_from_what_is_read(stage: str) -> None:
    module = folded("mixtral", MESHES[0])
    passes = [replace(p, kept={}) if isinstance(p, ShardPass) else p for p in module.stages.passes(after=stage)]
    last = run_passes(derived(parse_program(str(module.stages[stage]))), passes, check=check_types)[-1]
    texts = [[line for line in str(s).splitlines()[1:] if "#" not in line] for s in (last, module.stages[-1])]
    assert texts[0] == texts[1]


S = "program toy · dp=2,tp=2\nfactors batch=4 hidden=8\nholds "
BODY = "main\n  %x : f32[4x8] = input x\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a poem", "Line 1 of the program is not the first line of a stage.\n  line    a poem"),
        ("", "Line 1 of the program is not the first line"),
        ("program toy · stage x", "Line 1 .* names no mesh.\n.*\n  valid   program name"),
        ("program toy · dp=2\nfactors batch=many", "Line 2 .* has no size for the factor batch"),
        ("program toy · dp=2\nwanted all", "Line 2 .* does not say which outputs are given gradients"),
        (f"{S}captured", "no main graph"),
        (f"{S}captured\n{BODY}  and then?", "Line 6 .* says nothing of a program.\n  line    and then"),
        (f"{S}captured\n{BODY}  %y = [2, 3]", "Line 6 .* computes nothing"),
        (f"{S}captured\n{BODY}  %y", "Line 6 .* is no value"),
        (f"{S}captured\n{BODY}", "Line 4 .* begins a graph that returns nothing"),
        (f"{S}captured\n{BODY}  %y = aten.neg(%z)", "Line 6 .* reads %z, which no line above it computes.\n.*\n  valid   %x"),
        (f"{S}captured\n{BODY}  %x = aten.neg(%x)", "Line 6 .* computes %x a second time"),
        (f"{S}captured\n{BODY}  %y = aten.nix(%x)", "Line 6 .* calls aten.nix, which is no operator"),
        (f"{S}captured\n{BODY}  %y = nix(%x)", "Line 6 .* calls nix, which is no operator"),
        (f"{S}captured\n{BODY}  %y = aten.neg(%x, 2)", "Line 6 .* no overload takes these arguments.\n.*\n  valid   aten::neg"),
        (f"{S}captured\n{BODY}  %y = aten.mm(%x, %x)", r"is refused by its operator: .*\n.*\n  valid .*%x f32\[4, 8\]"),
        (f"{S}captured\n{BODY}  %y : f32[8] = aten.neg(%x)", r"has the type f32\[8\] for what is f32\[4, 8\]"),
        (f"{S}captured\n{BODY}  %y : g32[8] = aten.neg(%x)", "has no dtype called g32"),
        (f"{S}captured\n{BODY}  %y : 8 = aten.neg(%x)", "Line 6 .* is no value"),
        (f"{S}captured\n{BODY}  %y = aten.sum(%x, [0, 1)", "Line 6 .* opens a bracket that is not closed"),
        (f"{S}captured\n{BODY}  %y = aten.neg(%x %x)", "Line 6 .* goes on with ' %x\\)'"),
        (f"{S}captured\n{BODY}  %y = aten.neg(])", "Line 6 .* goes on with"),
        (f"{S}captured\nmain\n  %x : f32[4] = input ", "Line 5 .* names no input"),
        (f"{S}annotated, captured\nmain\n  %x : f32[batch@ep] R(xp) = input x", "Line 5 .* names the axis xp"),
        (f"{S}annotated, captured\nmain\n  %x : f32[] V|P(tp) = input x", r"Line 5 .* has '\[\] V\|P\(tp\)' for a layout"),
        (f"{S}annotated, sharded\nmain\n  %x : f32[batch] = input x\n  %y = reshard(%x)", "no layout for reshard"),
        (f"{S}annotated, outlined, sharded\nb\n  %x : f32[batch] = argument\n  %y = aten.neg(%x)\n  return [%y]\nmain\n"
         "  %x : f32[batch] = input x\n  %y = b(%x)", "Line 6 .* says no layout of what it computes"),
        (f"{S}annotated, joint, outlined, sharded\nb\n  %x : f32[batch] = argument\n  return [[%x], []]\nmain\n"
         "  %x : f32[batch] = input x\n  %y = b(%x)\n  return [%x]", r"Line 6 .* returns 0 gradients of 1 arguments"),
    ],
)  # fmt: skip
def test_what_is_no_program_is_an_error_that_names_the_line(text: str, says: str) -> None:
    with pytest.raises(foldcc.FoldError, match=says):
        parse_program(text)
