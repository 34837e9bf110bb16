"""What a stage prints is the whole program: it parses, prints again and runs as it did."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx

import foldcc
from foldcc.ir.parse import parse_program, parse_stage
from foldcc.ir.pipeline import Stage
from foldcc.ir.program import Program
from foldcc.ir.syntax import parse
from foldcc.ir.text import short
from foldcc.ir.walk import parts
from foldcc.ops.groups import active
from foldcc.passes import check_types, run_passes
from foldcc.passes.lower import Lower
from foldcc.runtime import simulate
from foldcc.runtime.accumulation import Accumulation
from foldcc.runtime.executable import Executable
from foldcc.runtime.placement import cut
from foldcc.testing import assert_rewrites, program
from foldcc.testing.text import derived
from tests.models import WITH_AUX_LOSS, tiny_model, token_batch

BATCH = token_batch(6)
MODELS: dict[str, dict[str, int]] = {
    "mixtral": {"num_hidden_layers": 1},
    "gpt_oss": {"num_hidden_layers": 1},
    "deepseek_v3": {"num_hidden_layers": 1, "first_k_dense_replace": 0},
    "llama": {},
}
NARROW = ("llama", "gpt_oss")  # with a precision
MESHES = ["dp=2,tp=2|ep=4", "tp=4|ep=2,etp=2", "dp=3,tp=2|ep=2"]
QUICK = (("gpt_oss", MESHES[1]), ("deepseek_v3", MESHES[2]), ("llama", MESHES[0]))
PAIRS: list[Any] = [pytest.param(f, m, marks=() if (f, m) in QUICK else pytest.mark.slow) for f in MODELS for m in MESHES]


@cache
def folded(family: str, mesh: str) -> foldcc.FoldedModule:
    model = tiny_model(family, aux_loss=family in WITH_AUX_LOSS, **MODELS[family])
    precision = foldcc.Precision() if family in NARROW else None
    return foldcc.parallelize(model, mesh, example_inputs=BATCH, precision=precision)


def again(stage: Stage) -> Stage:
    """A stage from its text."""
    found = parse_stage(str(stage))
    derived(found.program)
    return found


def told(node: fx.Node) -> dict[str, Any]:
    """What passes and types read of a node, of what a text says or of what follows from it."""
    kept = {k: node.meta[k] for k in ("layout", "types", "result") if node.meta.get(k) is not None}
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
    outputs = executable(values, lambda given: (executable, Accumulation(executable.program.mesh, {}, may_keep=False)))
    wanted = [x for x, there in zip(outputs, program.wanted or (), strict=True) if there]
    torch.autograd.backward(wanted, [torch.ones_like(x) for x in wanted])
    return [*outputs, *(v.grad for v in values if v.grad is not None)]


@pytest.mark.parametrize(("family", "mesh"), PAIRS)
def test_what_is_read_runs_bit_for_bit(family: str, mesh: str) -> None:
    module = folded(family, mesh)
    found, wanted = (run(module, s.program) for s in (again(module.stages[-1]), module.stages[-1]))
    assert len(found) == len(wanted) > 10 and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(("family", "mesh"), PAIRS)
def test_every_printed_type_is_what_a_rank_holds(family: str, mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("localize", "split", "lower", "simplify", "bucket"):
        with monkeypatch.context() as patch:
            check_types_against_ranks(folded(family, mesh), stage, patch)


def check_types_against_ranks(module: foldcc.FoldedModule, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_on_ranks(module, stage, monkeypatch)
    lines = {(line.block, line.name): line for line in parse(str(module.stages[stage]))}
    rows: dict[Any, int] = {}  # data-dependent sizes, which must agree with one another
    for key, results in seen.items():
        line = lines[key]
        for rank, x in enumerate(results):
            assert line.dtype == short(x.dtype), (key, line.dtype, x.dtype)
            said = line.layout.shape if line.layout is not None else line.sizes
            assert len(said) == x.dim(), (key, said, x.shape)
            for told, actual in zip(said, x.shape, strict=True):
                if isinstance(told, sympy.Symbol) or (isinstance(told, str) and told.isidentifier()):
                    told = rows.setdefault((key[0], rank, str(told)), actual)
                assert told == actual or isinstance(told, str), (key, said, x.shape)
        assert stage == "localize" or (line.layout or line.types) is not None, key
    assert len(seen) > 100


def seen_on_ranks(module: foldcc.FoldedModule, stage: str, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    """Every value of a stage on every rank, from a run on the virtual mesh, forward and backward: {(block, name): values}."""
    program = module.stages[stage].program
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    held |= {f"['{name}']": x for name, x in BATCH.items()}
    values = []
    for slot, node in zip(program.slots, program.placeholders, strict=True):
        whole = held[slot.names[0]].detach()
        values.append([cut(whole, node.meta["layout"], module.mesh, r) for r in range(module.mesh.world_size)])
    both = program.backward is not None
    block_of = {n: f"{p.name} {p.direction}" if both else p.name for p in parts(program) for n in p.graph.graph.nodes}
    seen: dict[tuple[str, str], Any] = {}

    def recording(mesh: Any, node: fx.Node, given: Any, call: Any = simulate._call) -> Any:
        results = call(mesh, node, given)
        if all(isinstance(x, torch.Tensor) for x in results) and node in block_of:
            seen.setdefault((block_of[node], node.name), results)
        return results

    monkeypatch.setattr(simulate, "_call", recording)
    with active(module.mesh):
        results = simulate.simulate(module.mesh, program.graph, values)
        if both:
            saved = [list(values) for values in zip(*(r[1] for r in results), strict=True)]
            tangents = [
                [torch.ones(n.meta["val"].shape, dtype=n.meta["val"].dtype)] * module.mesh.world_size
                for n in program.objectives
            ]
            simulate.simulate(module.mesh, program.backward, [*saved, *tangents])
    return seen


@pytest.mark.parametrize("stage", ["annotate", "dispatch", "differentiate"])
def test_passes_go_on_from_what_is_read(stage: str) -> None:
    module = folded("mixtral", MESHES[0])
    passes = module.stages.passes(after=stage)
    last = run_passes(derived(parse_program(str(module.stages[stage]))), passes, check=check_types)[-1]
    texts = [[line for line in str(s).splitlines()[1:] if "#" not in line] for s in (last, module.stages[-1])]
    assert texts[0] == texts[1]


def test_a_program_that_stores_parameters_divided_goes_on_from_its_text() -> None:
    stages = foldcc.parallelize(
        tiny_model("llama", num_hidden_layers=2),
        "dp=2,tp=2",
        example_inputs=token_batch(4),
        zero=3,
        ahead=2,
        precision=foldcc.Precision(),
    ).stages
    for stage in ("capture", "dispatch", "differentiate", "bucket"):
        again = parse_stage(str(stages[stage]))
        assert (again.program.plan.zero, again.program.plan.ahead) == (3, 2)
        assert again.program.plan.precision == foldcc.Precision()
        last = run_passes(derived(again.program), stages.passes(after=stage), check=check_types)[-1]
        texts = [[line for line in str(s).splitlines()[1:] if "#" not in line] for s in (last, stages[-1])]
        assert texts[0] == texts[1], stage


S = "program toy · dp=2,tp=2\nfactors batch=4 hidden=8\nholds "
BODY = "main\n  %x : f32[4x8] = input x\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a poem", "Line 1 of the program is not the first line of a stage.\n  line    a poem"),
        ("", "Line 1 of the program is not the first line"),
        ("program toy · stage x", "Line 1 .* names no mesh.\n.*\n  valid   program name"),
        ("program toy · dp=2\nfactors batch=many", "Line 2 .* has no size for the factor batch"),
        ("program toy · dp=2\nahead far", "Line 2 .* is no number of blocks"),
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


def test_a_text_in_short_is_a_whole_program() -> None:
    text = "%y = aten.mm(aten.relu(%x : f32[4x8]), %w : f32[8x8])\nreturn [%y]"
    found = program(text, stage="outline", mesh="dp=2")
    (block,) = found.blocks.values()
    assert [n.name for n in block.graph.find_nodes(op="placeholder")] == ["x", "w"]
    assert [str(n.target) for n in block.graph.nodes if n.op == "call_function"] == ["aten.relu.default", "aten.mm.default"]
    assert [s.name for s in found.slots] == ["x", "w"] and found.wanted == (True,)
    whole = str(Stage("outline", 0, 0, 0, found))
    assert str(again(parse_stage(whole))) == whole


@pytest.mark.parametrize(
    ("text", "stage", "says"),
    [
        ("return []", "nix", "There is no stage 'nix', so that the text has to say what holds.\n  valid   capture, precision"),
        ("one\nreturn []\ntwo\nreturn []", "outline", "A text of several blocks says in a main graph who calls them"),
        (
            "%y : f32[8] P(dp) = aten.exp(%x : f32[8])\n%z = aten.neg(%y)\nreturn [%z]",
            "bucket",
            "Line 1 .* says P on dp of what is R",
        ),
        ("%y = aten.exp(%x : f32[8])\nreturn [%y]", "differentiate", "Line 2 .* returns no gradients beside its results"),
        ("%y = aten.exp(%x : f32[8] P(dp))\nreturn [%y]", "bucket", "is not linear in terms of a sum over dp"),
    ],
)
def test_a_text_in_short_that_is_no_program_is_an_error(text: str, stage: str, says: str) -> None:
    with pytest.raises(foldcc.FoldError, match=says):
        program(text, stage=stage)


def test_what_a_pass_leaves_otherwise_is_shown_as_a_difference() -> None:
    text = "%x : f32[8] = argument\n%y = aten.neg(aten.alias(%x))\nreturn [%y]"
    with pytest.raises(AssertionError) as shown:
        assert_rewrites(Lower(), text, text)
    lines = str(shown.value).splitlines()
    assert lines[:2] == ["--- after", "+++ what lower leaves"]
    assert [line[0] for line in lines if "alias" in line] == ["-"] and [line[0] for line in lines if "neg(%0)" in line] == ["+"]
