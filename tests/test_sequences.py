"""How cp divides attention: the way is a choice that a plan holds, and each way computes what one process does."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import foldcc
from foldcc import FoldError, ops
from foldcc.ir.program import Program
from foldcc.layout import PARTIAL
from foldcc.ops import ring
from foldcc.ops.operator import Operator
from foldcc.passes import Pass
from foldcc.testing import in_float64, run_distributed
from foldcc.testing.equivalence import relative_error
from foldcc.types.check import check_types
from tests.models import FAMILIES, FusedAttention, tiny_model, token_batch
from tests.test_context import compare, gradients

BATCH = token_batch(4)


def padded(length: int = 16) -> dict[str, Tensor]:
    batch = token_batch(4, length)
    mask = torch.ones_like(batch["input_ids"])
    mask[1, -5:] = mask[2, :3] = 0
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


def ways(model: foldcc.FoldedModule) -> list[str]:
    return [op.ways["cp"] for block in model.plan.blocks.values() for op in block.values() if op.ways]


def folded(family: str, mesh: str, way: str | None, **changes: Any) -> foldcc.FoldedModule:
    plain = tiny_model(family, num_hidden_layers=1, **changes)
    return foldcc.parallelize(plain, mesh, example_inputs=BATCH, attention=way, verify=False)


def sent(model: foldcc.FoldedModule, *operators: Operator) -> int:
    """Bytes that a rank sends in a step by some operators, outside of parameters' gradients."""
    names = {known.name for known in operators}
    return sum(c.bytes for c in model.collectives() if c.operator in names)


@pytest.mark.parametrize(
    ("way", "family", "mesh", "zero", "changes"),
    [
        pytest.param("ulysses", "llama", "cp=4", 3, {}, marks=pytest.mark.slow),  # more ranks than key/value heads
        ("ulysses", "gpt_oss", "cp=2,tp=2|ep=4", 1, {}),  # over two axes, with sinks and a window
        ("ring", "gpt_oss", "cp=3|ep=3", 3, {"num_local_experts": 12, "sliding_window": 10}),
        pytest.param("ring", "deepseek_v3", "cp=2,tp=2|ep=4", 1, {}, marks=pytest.mark.slow),  # values are not as wide as keys
        ("halo", "gpt_oss", "dp=2,cp=3|ep=6", 1, {"num_local_experts": 12, "sliding_window": 10}),  # of two ranks before
    ],
)
def test_each_way_has_the_gradients_of_one_process(
    way: str, family: str, mesh: str, zero: int, changes: dict[str, Any]
) -> None:
    length = 24 if "cp=3" in mesh else 16
    model = compare(family, mesh, padded(length), zero=zero, attention=way, num_hidden_layers=1, **changes)
    assert set(ways(model)) == {way}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp=2,cp=2,tp=2|ep=8", "cp=4,tp=2|ep=8", "dp=2,cp=3|ep=6"])
@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("way", ["ring", "ulysses", "halo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_way_of_every_family_on_folds_that_mix_axes(family: str, way: str, zero: int, mesh: str) -> None:
    if way == "halo" and family != "gpt_oss":
        pytest.skip("no window")
    heads = 6 if "cp=3" in mesh else 8
    changes = {"num_attention_heads": heads, "num_key_value_heads": heads if family == "deepseek_v3" else heads // 2}
    changes |= {"num_hidden_layers": 1} if way == "halo" else {}
    if family not in ("llama", "qwen3"):
        named = {"mixtral": "num_local_experts", "gpt_oss": "num_local_experts", "deepseek_v3": "n_routed_experts"}
        changes[named.get(family, "num_experts")] = 24
    compare(family, mesh, token_batch(4, 24), zero=zero, attention=way, **changes)


@pytest.mark.parametrize("way", ["ring", "ulysses"])
def test_queries_that_look_both_ways_and_more_of_them_than_heads_divide(way: str) -> None:
    x = torch.randn(2, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = FusedAttention(causal=False).double()
    model = foldcc.parallelize(copy.deepcopy(plain), "cp=2", example_inputs=(x,), attention=way, verify=True)
    for m in (plain, model):
        m(x).backward()
    for name, p in plain.named_parameters():
        assert relative_error(model.get_parameter(name).grad, p.grad) < 1e-10, name


def test_types_are_checked_of_what_a_ring_has_in_parts() -> None:
    program = folded("llama", "cp=2", "ring").stages["localize"].program
    check_types(program)
    (part, *_) = (
        n for _, n in program.nodes() if n.target is operator.getitem and n.args[0].target is ring.attend_block.overload
    )
    part.meta["layout"] = part.meta["layout"].with_state("cp", PARTIAL)
    with pytest.raises(FoldError, match="cp"):
        check_types(program)


def test_the_cheapest_way_of_each_layer_is_taken() -> None:
    assert ways(folded("llama", "cp=4", None, num_key_value_heads=4)) == ["ulysses"]  # as many keys as queries
    plain = tiny_model("gpt_oss")
    model = foldcc.parallelize(plain, "cp=2", example_inputs=token_batch(4, 64), verify=False)
    # With a window, and without: who gathers keys computes all pairs, and who divides heads those that are seen.
    assert ways(model) == ["halo", "ulysses"]


def test_a_plan_says_the_way_and_makes_it_again() -> None:
    model = folded("llama", "cp=2", "ring")
    text = str(model.plan)
    assert "cp=2 · attention=ring" in text and " by cp=ring" in text
    assert foldcc.Plan.parse(text) == model.plan
    plain = tiny_model("llama", num_hidden_layers=1)
    again = foldcc.parallelize(plain, "cp=2", example_inputs=BATCH, plan=text, verify=False)
    assert again.plan == model.plan
    line = next(line for line in text.splitlines() if " by cp=ring" in line)
    one = foldcc.parallelize(plain, "cp=2", example_inputs=BATCH, plan=f"plan cp=2\nblock0\n{line}", verify=False)
    assert ways(one) == ["ring"] and one.plan.attention == ""


@pytest.mark.parametrize(
    ("family", "mesh", "way", "message", "valid"),
    [
        ("llama", "cp=2", "nonsense", "attention='nonsense' is no way to divide a sequence.", "gathered, ring, halo, ulysses"),
        ("llama", "tp=2", "ring", "attention='ring' says how cp divides the sequence, and cp=1.", "a mesh with cp"),
        (
            "llama",
            "cp=8",
            "ulysses",
            "'ulysses' cannot be on cp=8: kv_heads=2 group=2 cannot be cut in 8 equal parts.",
            "gathered, ring",
        ),
        ("llama", "cp=2", "halo", "'halo' cannot be on cp=2: no window bounds how far queries see.", "gathered, ring, ulysses"),
        ("llama", "cp=4,tp=2", "ulysses", "of which the axes before leave 1 to a rank, do not divide over tp=2.", "tp: 1"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(family: str, mesh: str, way: str, message: str, valid: str) -> None:
    with pytest.raises(FoldError) as error:
        folded(family, mesh, way)
    assert message in str(error.value) and valid in str(error.value)


def test_a_ring_has_no_way_for_masks_that_dropout_draws_nor_for_other_queries() -> None:
    plain = tiny_model("llama", num_hidden_layers=1, attention_dropout=0.5)
    with pytest.raises(FoldError, match="dropout draws a mask for all keys"):
        foldcc.parallelize(plain, "cp=2", example_inputs=BATCH, attention="ring", verify=False)


def test_a_plan_and_an_option_that_say_different_ways() -> None:
    with pytest.raises(FoldError, match="one of both"):
        foldcc.parallelize(
            tiny_model("llama", num_hidden_layers=1), "cp=2", attention="ulysses", plan="plan cp=2 · attention=gathered"
        )


class Largest(TorchDispatchMode):
    """The most pairs of positions that one tensor holds for a sample and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (ops.attend_block.overload, ops.attend_block_backward.overload):  # made of others, which are looked at
            with self:
                return ops.record(func).eager(*args)
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple) else (found,):
            if isinstance(x, Tensor) and x.dim() >= 2:
                self.pairs = max(self.pairs, int(x.shape[-1]) * int(x.shape[-2]) if min(x.shape[-2:]) >= 64 else 0)
        return found


def asked_for_at_once(graph: torch.fx.Graph) -> int:
    """The most blocks of keys, of values, or of their gradients, that have come from other ranks and are still to be read."""
    nodes, most = list(graph.nodes), 0
    read = {x: i for i, n in enumerate(nodes) for x in n.all_input_nodes}
    here: set[torch.fx.Node] = set()
    for i, node in enumerate(nodes):
        here |= {node} if node.target is ops.shift.overload else set()
        most = max(most, len(here))
        here = {x for x in here if read[x] > i}
    return most


def test_no_rank_of_a_ring_holds_more_than_the_pairs_of_a_block_or_all_keys() -> None:
    """Widths are below 64, so that only scores and masks have two dimensions of that size."""
    found, bytes_ = {}, {}
    for way, order, length in (("gathered", "natural", 256), ("ring", "natural", 256), ("ring", "zigzag", 512)):
        batch = token_batch(1, length, vocabulary=32)
        plain = tiny_model("llama", num_hidden_layers=1, vocab_size=32, num_key_value_heads=4, max_position_embeddings=length)
        model = foldcc.parallelize(plain, "cp=4", example_inputs=batch, attention=way, order=order, verify=False)
        with Largest() as seen:
            model(**batch).loss.backward()
        program = model.stages[-1].program
        saved = [n.meta["val"] for b in program.graph.children() for n in b.graph.output_node().args[0][1]]
        shapes = [x.shape for x in saved if isinstance(x, Tensor)]
        kept = any(len(s) == 4 and length in s for s in shapes)
        bytes_[way, order] = sum(x.numel() for x in saved if isinstance(x, Tensor)) / length
        most = max(asked_for_at_once(b.graph) for main in program.mains for b in main.children())
        found[way, order] = seen.pairs, kept, most
    assert found == {
        ("gathered", "natural"): (64 * 256, True, 0),
        ("ring", "natural"): (64 * 64, False, 4),  # of 6 that come forward, and 12 backward
        ("ring", "zigzag"): (64 * 64, False, 8),  # of 12, and 24, half as long
    }
    assert bytes_["ring", "zigzag"] < 1.1 * bytes_["ring", "natural"] < bytes_["gathered", "natural"]


def test_the_scores_of_a_block_grow_with_its_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(length: int) -> list[Tensor]:
        torch.manual_seed(0)
        q, k, v, values = (torch.randn(1, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
        total, largest = (torch.rand(1, 4, length, 1, dtype=torch.float64) for _ in range(2))
        pairs, how = (q, k, v, torch.rand(1, length) > 0.3), (torch.tensor(3), 0.3, True, 7, 20.0)
        ahead = ops.attend_block(*pairs, values, total, largest, *how)
        return [*ahead, *ops.attend_block_backward(values, total, *pairs, largest, *how)]

    most = []
    for length in (1024, 2048):
        with Largest() as seen:
            ran(length)
        most.append(seen.pairs)
    assert most == [2 * ring._QUERIES * 1024, 2 * ring._QUERIES * 2048]  # of the two heads that share keys
    at_once = ran(13)
    monkeypatch.setattr(ring, "_QUERIES", 5)
    for part, whole in zip(ran(13), at_once, strict=True):
        assert part.dtype == whole.dtype and relative_error(part, whole) < 1e-12


def test_what_a_halo_sends_does_not_depend_on_the_length() -> None:
    plain = tiny_model("gpt_oss", num_hidden_layers=1, sliding_window=6)
    bytes_ = []
    for length in (32, 64):
        model = foldcc.parallelize(
            copy.deepcopy(plain), "cp=4|ep=2", example_inputs=token_batch(4, length), attention="halo", verify=False
        )
        bytes_.append(sent(model, ops.halo, ops.halo_sum))
    per_position = 4 * 2 * 8 * 4  # samples, key/value heads, their width, bytes
    assert bytes_ == [2 * 2 * 5 * per_position] * 2  # keys and values, and their gradients, of the 5 positions before


@cache
def windowed(way: str) -> foldcc.FoldedModule:
    return folded("gpt_oss", "cp=4|ep=2", way, sliding_window=6)


@dataclass(frozen=True, kw_only=True)
class Broken(Pass):
    """Changes the graphs of all blocks, forward and backward."""

    requires = frozenset({"bucketed"})
    provides = frozenset({"broken"})
    change: Callable[[torch.fx.Graph], None]

    def run(self, program: Program) -> Program:
        for main in program.mains:
            for block in main.children():
                self.change(block.graph)
                block.recompile()
        return program


def _first_keys(graph: torch.fx.Graph) -> None:
    """Every block of the backward pass reads the keys that the first one read."""
    nodes = list(graph.find_nodes(op="call_function", target=torch.ops.foldcc.attend_block_backward.default))
    for node in nodes[1:]:
        node.update_arg(3, nodes[0].args[3])


def _no_window(graph: torch.fx.Graph) -> None:
    for name in ("attend_block", "attend_block_backward"):
        for node in graph.find_nodes(op="call_function", target=getattr(torch.ops.foldcc, name).default):
            node.update_arg(len(node.args) - 2, 0)


def _one_further(graph: torch.fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=ops.halo.overload):
        with graph.inserting_before(node):
            node.update_arg(0, graph.call_function(torch.ops.aten.roll.default, (node.args[0], [1], [node.args[1]])))


def _not_rescaled(graph: torch.fx.Graph) -> None:
    """A block takes no notice of the largest score before it."""
    nodes = list(graph.find_nodes(op="call_function", target=torch.ops.foldcc.attend_block.default))
    for node in nodes[1:]:
        node.update_arg(6, nodes[0].args[6])


@pytest.mark.parametrize("way", ["ring", *(pytest.param(way, marks=pytest.mark.slow) for way in ("halo", "ulysses"))])
def test_the_program_is_the_same_graph_at_smaller_sizes(way: str) -> None:
    assert foldcc.verify(windowed(way), reduced=True, rounds=1).ok


@pytest.mark.parametrize(
    ("way", "mistake"), [("ring", _first_keys), ("ring", _no_window), ("ring", _not_rescaled), ("halo", _one_further)]
)
def test_a_mistake_on_the_way_is_found(way: str, mistake: Callable[[torch.fx.Graph], None]) -> None:
    proof = foldcc.verify(windowed(way).with_passes(Broken(change=mistake)))
    assert not proof.ok and proof.stage == "broken"


def on_processes(wanted: dict[str, Tensor]) -> None:
    batch = padded()
    for way in ("ring", "halo", "ulysses"):
        mesh = foldcc.FoldedMesh.parse("cp=4|ep=4", device_type="cpu")
        plain = tiny_model("gpt_oss", num_hidden_layers=1, sliding_window=7)
        model = foldcc.parallelize(plain, mesh, example_inputs=batch, attention=way, verify=False)
        for _ in range(2):
            model.zero_grad()
            model(**batch).loss.backward()
        for name, p in model.named_parameters():
            if name in wanted:
                assert relative_error(p.grad.full_tensor().double(), wanted[name]) < 1e-5, (way, name)


def test_on_processes() -> None:
    with in_float64():
        plain = tiny_model("gpt_oss", num_hidden_layers=1, sliding_window=7).double()
        plain.config._experts_implementation = "eager"
        run_distributed(on_processes, 4, gradients(plain, **padded()))
