"""No waste on the wire: every byte of a Mixtral's training step, from a closed form, from the report and from a run.

Legend: B batch and S sequence of a rank's group, H hidden, V vocabulary, E experts, K chosen experts per token, INNER
width of an expert, A of all query heads, G of all key and value heads, T tokens of one rank.
"""

from collections import Counter

import pytest
import torch
from models import tiny_model, token_batch

import foldcc
from foldcc.ir.sizes import axes_of, communicates
from foldcc.mesh import FoldedMesh
from foldcc.ops import all_to_all_v, record
from foldcc.runtime import simulate

transformers = pytest.importorskip("transformers")

LAYERS, V, H, INNER, E, K, HEADS, KV, WIDTH = 2, 64, 32, 24, 8, 2, 8, 4, 4
BATCH, S = 8, 16
A, G = HEADS * WIDTH, KV * WIDTH
MESHES = ["dp=2,tp=2|ep=4", "dp=4,tp=2|ep=8", "tp=4|ep=2,etp=2", "dp=2,tp=2|ep=2"]
FLOAT, INT = 4, 8
Row = tuple[str, str, str, float]  # operator, axes, direction, bytes that one rank sends in one call


@pytest.fixture(scope="module", params=MESHES)
def folded(request):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=V, hidden_size=H, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV, num_local_experts=E, num_experts_per_tok=K, output_router_logits=True,
        max_position_embeddings=S,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    ids = torch.randint(0, V, (BATCH, S))
    mesh = FoldedMesh.parse(request.param)
    return model, foldcc.parallelize(model, mesh, example_inputs={"input_ids": ids, "labels": ids}), ids


def closed_form(mesh: FoldedMesh) -> tuple[Counter[Row], dict[str, float]]:
    """The bytes of every collective of a step, and of all gradient reductions together for each set of axes."""
    dp, tp, edp, ep, etp = (mesh.size(a) for a in ("dp", "tp", "edp", "ep", "etp"))
    B = BATCH // dp
    T = B * S // tp
    found: Counter[Row] = Counter()

    def add(calls: int, operator: str, axes: str, direction: str, count: float) -> None:
        if count:
            found[operator, axes, direction, count] += calls

    def reduced(count: float, ranks: int) -> float:
        return 2 * count * (ranks - 1) / ranks

    # Attention, embedding and head: each gather of the sequence is a reduce-scatter on the way back, and the reverse.
    stream = T * H * (tp - 1) * FLOAT
    add(1, "reduce_scatter", "tp", "forward", stream)  # embedding
    add(1, "all_gather", "tp", "backward", stream)
    add(LAYERS + 1, "all_gather", "tp", "forward", stream)  # into attention, into the head
    add(LAYERS + 1, "reduce_scatter", "tp", "backward", stream)
    add(LAYERS, "reduce_scatter", "tp", "forward", stream)  # out of attention
    add(LAYERS, "all_gather", "tp", "backward", stream)
    # What the model returns, logits and router logits, stays divided: nothing is sent for it.
    # The loss over a divided vocabulary: the largest logit, the sum of exponentials, the target's logit.
    add(1, "all_reduce_max", "tp", "forward", reduced(B * S, tp) * FLOAT)
    add(2, "all_reduce", "tp", "forward", reduced(B * S, tp) * FLOAT)
    # Means over the global batch: loss and valid tokens; tokens per expert; the router's auxiliary loss.
    add(1, "all_reduce", "dp", "forward", reduced(1, dp) * FLOAT)
    add(1, "all_reduce", "dp", "forward", reduced(1, dp) * INT)
    both = ",".join(a for a in ("dp", "tp") if mesh.size(a) > 1)
    add(1, "all_reduce", both, "forward", reduced(E, dp * tp) * FLOAT)
    add(1, "all_reduce", both, "forward", reduced(1, dp * tp) * FLOAT)
    # Experts: each row goes to the ranks of its expert once and comes back once, and its gradient does the same.
    ranks = ep * etp
    axes = ",".join(a for a in ("ep", "etp") if mesh.size(a) > 1)
    add(LAYERS, "all_to_all", axes, "forward", E * etp * (ranks - 1) / ranks * INT)
    for direction in ("forward", "backward"):
        add(2 * LAYERS, "all_to_all_v", "ep", direction, K * T * H * (ep - 1) / ep * FLOAT)
        add(LAYERS, "all_gather_v", "etp", direction, K * T * H * (etp - 1) * FLOAT)
        add(LAYERS, "reduce_scatter_v", "etp", direction, K * T * H * (etp - 1) * FLOAT)
    # Gradients: of what tp divides, over dp; of what it does not, over both; of experts, over edp.
    divided = LAYERS * (2 * A * H + 2 * G * H) // tp + 2 * V * H // tp
    whole = LAYERS * (2 * H + E * H) + H
    experts = LAYERS * E * 3 * INNER * H // ranks
    gradients = {"dp": reduced(divided, dp), both: reduced(whole, dp * tp), "edp": reduced(experts, edp)}
    return found, {a: n * FLOAT for a, n in gradients.items() if n}


def test_every_collective_sends_what_the_closed_form_says(folded):
    _, module, _ = folded
    expected, gradients = closed_form(module.mesh)
    found: Counter[Row] = Counter()
    reduced: Counter[str] = Counter()
    for c in module.collectives():
        axes = ",".join(c.axes)
        if (c.operator, c.direction) == ("all_reduce", "backward"):
            reduced[axes] += c.bytes
        else:
            found[c.operator, axes, c.direction, c.bytes_per_call] += c.calls
    assert found == expected
    assert reduced == pytest.approx(gradients)


def test_a_run_sends_what_the_report_says(folded, monkeypatch):
    model, module, ids = folded
    mesh = module.mesh
    sent: Counter[tuple[str, str]] = Counter()  # bytes of all ranks together
    uneven: Counter[str] = Counter()

    def counting(mesh, node, values, run=simulate._call):
        results = run(mesh, node, values)
        if communicates(node):
            axes = axes_of(node)
            x = values[node.args[0]]
            for rank in range(mesh.world_size):
                if node.target is all_to_all_v.overload:
                    rows = values[node.args[1]][rank].clone()
                    rows[mesh.index(rank, axes)] = 0
                    uneven[",".join(axes)] += int(rows.sum()) * x[rank][0:1].numel() * x[rank].element_size()
                elif not node.target._schema.name.endswith("_v"):
                    group = len(mesh.group_of(rank, axes))
                    count = record(node.target).sent(x[rank].numel(), results[rank].numel(), group)
                    sent[record(node.target).name, ",".join(axes)] += count * x[rank].element_size()
        return results

    monkeypatch.setattr(simulate, "_call", counting)
    out = module(input_ids=ids, labels=ids)
    out.loss.backward()
    reported: Counter[tuple[str, str]] = Counter()
    for c in module.collectives():
        if not c.expected:
            reported[c.operator, ",".join(c.axes)] += c.bytes * mesh.world_size
    assert sent == pytest.approx(reported)
    assert uneven["ep"] == 4 * _leaving(model, mesh, ids) * H * FLOAT


def _leaving(model, mesh: FoldedMesh, ids: torch.Tensor) -> int:
    """Pairs (token, expert) of all layers whose expert is on another rank of ep, from a run of the original model."""
    with torch.no_grad():
        logits = model(input_ids=ids).router_logits
    dp, tp = mesh.size("dp"), mesh.size("tp")
    found = 0
    for layer in logits:
        chosen = layer.topk(K).indices.view(dp, BATCH // dp, tp, S // tp, K)
        for rank in range(mesh.world_size):
            mine = chosen[mesh.coordinate(rank, "dp"), :, mesh.coordinate(rank, "tp")]
            found += int((mine // (E // mesh.size("ep")) != mesh.coordinate(rank, "ep")).sum())
    return found


def test_tensor_parallel_bytes_of_eight_layers_are_the_closed_form():
    """The stream goes into and out of attention once a layer, once into the head and out of the embedding; and back."""
    dp, tp, layers, sequence, hidden = 8, 4, 8, 16, 32
    model = tiny_model("qwen3_moe", num_hidden_layers=layers, num_key_value_heads=4, hidden_size=hidden, vocab_size=512)
    mesh = FoldedMesh.parse(f"dp={dp},tp={tp}|ep=8")
    folded = foldcc.parallelize(model, mesh, example_inputs=token_batch(2 * dp, sequence))
    tokens = 2 * sequence  # of a rank's samples
    stream = tokens // tp * hidden * (tp - 1) * FLOAT
    loss = 3 * 2 * tokens * (tp - 1) / tp * FLOAT  # the largest logit, the sum of exponentials, the target's logit
    assert sum(c.bytes for c in folded.collectives() if c.axes == ("tp",)) == (4 * layers + 4) * stream + loss
