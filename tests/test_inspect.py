"""What is printed is true: layouts against local shapes, summaries against closed forms."""

import math
from collections import Counter

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import foldcc
from foldcc.errors import FoldError
from foldcc.ir.sizes import human
from foldcc.ir.syntax import parse
from foldcc.layout import Layout, Shard
from foldcc.mesh import FoldedMesh
from foldcc.runtime.placement import cut

transformers = pytest.importorskip("transformers")

LAYERS, V, H, INNER, E, K, HEADS, KV, D, BATCH, S = 2, 64, 32, 24, 8, 2, 8, 4, 4, 8, 16
SIZES = {sympy.Symbol(n, integer=True, positive=True): 16 for n in ("batch", "seq", "heads", "group", "w1", "tokens2")}
RANKS = {"pp": 2, "dp": 2, "cp": 2, "tp": 2}


@st.composite
def layouts(draw):
    factors = draw(st.permutations(list(SIZES)))
    cuts = sorted(draw(st.lists(st.integers(0, len(factors)), min_size=1, max_size=4)))
    dims = tuple(tuple(factors[a:b]) for a, b in zip([0, *cuts], cuts, strict=False))
    runs = [Shard(d, a, b) for d, dim in enumerate(dims) for a in range(len(dim)) for b in range(a + 1, len(dim) + 1)]
    runs += [Shard(d, a, len(dim), filled=True) for d, dim in enumerate(dims) for a in range(len(dim))]
    states = {axis: draw(st.sampled_from([*"RIPV", *runs])) for axis in RANKS}
    return Layout(dims, SIZES, states, RANKS)


@given(layout=layouts())
def test_a_layout_is_what_it_prints(layout):
    again = Layout.parse(str(layout), SIZES, RANKS)
    assert again == layout and again.shape == layout.shape and list(again.states) == list(layout.states)


def test_what_is_no_layout_is_refused():
    with pytest.raises(ValueError, match="no layout"):
        Layout.parse("batch@dp", SIZES, RANKS)


@pytest.fixture(scope="module", params=["dp=2,tp=2|ep=4", "tp=4|ep=2,etp=2"])
def folded(request):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=V, hidden_size=H, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV, num_local_experts=E, num_experts_per_tok=K, max_position_embeddings=S,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    return fold(model, request.param)


def fold(model, mesh):
    ids = torch.randint(0, V, (BATCH, S))
    return foldcc.parallelize(model, FoldedMesh.parse(mesh), example_inputs={"input_ids": ids, "labels": ids})


def test_every_stage_prints_and_parses_and_keeps_its_own_graphs(folded):
    operations = {s.name: [line.operation.split("(")[0] for line in parse(str(s))] for s in folded.stages}
    assert "experts" in operations["shard"] and "reshard" in operations["shard"]
    assert "experts" not in operations["dispatch"] and "all_to_all_v" in operations["dispatch"]
    assert "reshard" in operations["dispatch"] and "reshard" not in operations["localize"]
    assert "retype" in operations["localize"] and "retype" not in operations["lower"]
    assert "reshard" not in operations["annotate"] and "block1" not in operations["capture"]


def test_provenance_reaches_the_backward_pass(folded):
    backward = str(folded.stages["lower"]).split("block1 backward")[1]
    assert "model.layers.0.self_attn.o_proj" in backward and "modeling_mixtral.py:" in backward
    assert "× 2" in backward.splitlines()[0]
    modules = {c.module for c in folded.collectives() if c.direction == "backward"}
    assert "model.layers.0.mlp.experts" in modules and "model.layers.0.input_layernorm" in modules


def test_a_difference_shows_what_a_pass_did(folded):
    lines = folded.stages.diff("shard", "dispatch").splitlines()
    assert lines[:2] == ["--- shard", "+++ dispatch"]
    assert any(line.startswith("-") and "= experts(" in line for line in lines)
    assert any(line.startswith("+") and "= all_to_all_v(" in line for line in lines)
    assert any("# free: same ranks, same order" in line for line in lines)
    assert folded.stages.diff("shard", "shard") == ""
    with pytest.raises(FoldError, match="no stage 'sahrd'"):
        folded.stages["sahrd"]


def test_tables_have_a_line_for_each_row(folded):
    assert len(str(folded.stages).splitlines()) == 2 + len(folded.stages)
    table = folded.collectives()
    rows, totals = str(table).split("\n\n")
    assert len(rows.splitlines()) == 2 + len(table)
    groups = Counter()
    for c in table:
        groups[c.axes] += c.bytes
    assert table.bytes() == pytest.approx(sum(groups.values()))
    assert all(",".join(axes) in totals for axes in groups)
    assert table.bytes("tp") == pytest.approx(sum(n for axes, n in groups.items() if "tp" in axes))


def test_flops_are_those_of_the_model_and_no_more(folded):
    summary = folded.summary()
    tokens, A, G = BATCH * S, HEADS * D, KV * D
    dense = LAYERS * (2 * A * H + 2 * G * H + E * H) + V * H
    attention = LAYERS * 2 * S * A
    rotary = 2 * S * (H // HEADS // 2)  # positions times frequencies, which has no gradient
    products = 6 * tokens * (dense + attention + LAYERS * K * 3 * INNER * H)
    assert summary.flops_total in (products, products + rotary)
    assert 1.0 <= summary.flops_ratio <= 1.01
    assert f"{summary.flops_ratio:.4f}" in str(summary)


class Convolved(nn.Module):
    """Every way in which PyTorch multiplies that a small model can hold."""

    def __init__(self, groups=1):
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V)
        self.conv = nn.Conv1d(H, H, 3, padding=1, groups=groups)
        self.back = nn.ConvTranspose1d(H, H, 2)

    def forward(self, input_ids, labels):
        x = self.up(self.embed(input_ids))
        x = self.back(self.conv(x.transpose(1, 2))).transpose(1, 2)[:, :S]
        x = torch.softmax(x @ x.transpose(1, 2), -1) @ x
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_flops_are_those_that_pytorch_counts():
    model = Convolved()
    summary = fold(model, "dp=2").summary()
    ids = torch.randint(0, V, (BATCH, S))
    with FlopCounterMode(display=False) as counted:
        model(ids, ids).backward()
    assert summary.flops_total == counted.get_total_flops() == 2 * summary.flops_per_rank


def test_flops_of_a_convolution_of_groups_are_those_of_its_taps():
    grouped, whole = fold(Convolved(groups=H), "dp=2").summary(), fold(Convolved(), "dp=2").summary()
    surplus = 3 * 2 * BATCH * S * H * 3 * (H - 1)
    assert whole.flops_total - grouped.flops_total == surplus
    assert 2 * (whole.flops_per_rank - grouped.flops_per_rank) == surplus


def test_parameters_of_a_rank_are_those_that_it_holds(folded):
    summary, mesh = folded.summary(), folded.mesh
    tp, experts = mesh.size("tp"), mesh.size("ep") * mesh.size("etp")
    dense = (LAYERS * (2 * HEADS * D * H + 2 * KV * D * H) + 2 * V * H) // tp
    assert summary.parameters_per_rank == dense + LAYERS * (E * 3 * INNER * H // experts + 2 * H + E * H) + H
    assert summary.parameters_total == sum(p.numel() for p in folded.parameters())
    layouts = folded.program.layouts()
    held = [(folded.get_parameter(s.names[0]), layouts[s.name]) for s in folded.program.slots if s.kind == "parameter"]
    for rank in range(mesh.world_size):
        assert sum(cut(p, layout, mesh, rank).numel() for p, layout in held) == summary.parameters_per_rank
        assert all(math.prod(layout.shape) == cut(p, layout, mesh, rank).numel() for p, layout in held)


def test_heads_that_are_fewer_than_ranks_are_listed_as_replicated():
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=S,
    )  # fmt: skip
    summary = fold(transformers.LlamaForCausalLM(config), "tp=4").summary()
    assert {r.module.rsplit(".", 1)[1] for r in summary.replicated} <= {"k_proj", "v_proj"}
    assert summary.flops_ratio == pytest.approx(1 + sum(r.share for r in summary.replicated), abs=0.01)


def test_what_a_console_shows_of_a_program_is_one_line(folded):
    for shown in (folded.stages, folded.stages["dispatch"], folded.program):
        assert len(repr(shown)) < 300 and "\n" not in repr(shown)


def test_what_a_console_shows_of_a_folded_module_is_its_mesh_and_what_it_holds(folded):
    shown, summary = repr(folded), folded.summary()
    assert len(shown.splitlines()) <= 8 and str(folded.mesh) in shown and "MixtralForCausalLM" in shown
    assert f"{summary.parameters_total:,} in" in shown and human(4 * summary.parameters_per_rank) in shown


def test_a_line_that_returns_is_wrapped_and_one_block_can_be_printed(folded):
    stage = folded.stages["bucket"]
    returning = str(stage).split("  return ")[1:]
    assert max(len(line) for text in returning for line in text.split("\n\n")[0].splitlines()) <= 120
    for name in folded.program.blocks:
        text = stage.block(name)
        assert text.startswith(f"{name} forward") and all(part in str(stage) for part in text.split("\n\n"))
    with pytest.raises(FoldError, match="no block 'nix'.*\n.*main"):
        stage.block("nix")


def test_a_mesh_may_be_given_as_text():
    ids = torch.randint(0, V, (BATCH, S))
    model = torch.nn.Sequential(torch.nn.Embedding(V, H), torch.nn.Linear(H, V))
    folded = foldcc.parallelize(model, "dp=2,tp=2|ep=4", example_inputs=(ids,))
    assert folded.mesh == FoldedMesh.parse("dp=2,tp=2|ep=4")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fsdp": True}, "no option 'fsdp'.\n.*zero=3 divides parameters"),
        ({"capacity_factor": 1.0}, "no option 'capacity_factor'.\n.*set_capacity"),
        ({"nix": 1}, "no option 'nix'.\n  valid   example_inputs, capture, kernels"),
    ],
)
def test_options_of_other_tools_say_what_there_is_instead(options, says):
    with pytest.raises(FoldError, match=says):
        foldcc.parallelize(torch.nn.Linear(2, 2), "dp=2", **options)


def test_axes_of_other_tools_say_what_there_is_instead():
    with pytest.raises(FoldError, match="unknown axis 'fsdp'.\n  instead dp"):
        foldcc.init_folded_mesh("virtual", attention={"fsdp": 2})


def test_help_lists_the_commands(capsys):
    from foldcc.__main__ import COMMANDS, main

    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in COMMANDS)
    with pytest.raises(SystemExit):
        main(["nix"])
    assert "invalid choice: 'nix'" in capsys.readouterr().err
