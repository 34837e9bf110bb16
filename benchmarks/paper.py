"""The best layouts of the paper's table (arXiv 2504.14960), at full size and on all ranks, held against closed forms.

    python benchmarks/paper.py [NAME ...] [--out benchmarks/results/paper.json]

Nothing is allocated: models are built on `meta`, in bfloat16, compiled for all ranks and proved, with their schedule. What each
place of `pp` holds, keeps and sends in a step of 256 samples of 4,096 tokens is read off the program, and has to be what the
numbers of the configuration give (`closed_forms`). Each line is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

SAMPLES, LENGTH = 256, 4096
GB, WIDTH = 1e9, 2  # of bfloat16, in bytes


@dataclass(frozen=True)
class Shape:
    """A decoder with experts in every layer, with a shared one as Qwen2-MoE has it, or without as Mixtral.

    Attributes:
        width: of an expert; shared: of the shared one.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    width: int
    experts: int
    chosen: int
    shared: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def model(self) -> Any:
        import transformers as t

        both = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_experts_per_tok": self.chosen,
        }
        if not self.shared:
            sizes = {"intermediate_size": self.width, "num_local_experts": self.experts}
            return t.MixtralForCausalLM(t.MixtralConfig(**both, **sizes))
        sizes = {"moe_intermediate_size": self.width, "num_experts": self.experts, "decoder_sparse_step": 1}
        return t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**both, **sizes, shared_expert_intermediate_size=self.shared))


MIXTRAL = Shape(32_768, 6144, 56, 48, 8, 16_384, 8, 2)
CASES = {
    "Mixtral-8x22B": (MIXTRAL, "pp=8,dp=8,tp=2|ep=8"),
    "Qwen2-57B-A14B": (Shape(151_936, 3584, 28, 28, 4, 2560, 64, 8, shared=20_480), "pp=4,dp=8,tp=2|ep=4"),
    "Mixtral-8x22B-G8T8": (replace(MIXTRAL, width=2048, experts=64, chosen=8), "pp=8,dp=4,tp=4|ep=8"),
    "Llama3-8x70B": (Shape(128_256, 8192, 80, 64, 8, 28_672, 8, 2), "pp=16,dp=2,tp=8|ep=8"),
}


def closed_forms(shape: Shape, mesh: Any, layers: list[int], micro_batches: int, length: int) -> list[dict[str, Any]]:
    """Bytes of a rank of each place of `pp`: parameters, what is kept of all micro-batches at most, and what is sent by axes.

    One sample of a micro-batch is on each data-parallel rank; all but collectives and choices of experts is recomputed.

    Args:
        layers: on each place.
    """
    pp, dp, tp, ep, edp = (mesh.size(axis) for axis in ("pp", "dp", "tp", "ep", "edp"))
    h, whole, rows, own = shape.hidden, length * shape.hidden * WIDTH, length // tp * shape.chosen, length // tp
    part, angles = own * h * WIDTH, 2 * length * shape.head_dim * WIDTH  # of the activations; cosines and sines
    kv = shape.kv_heads * shape.head_dim
    biases = h + 2 * kv if shape.shared else 0
    divided = (2 * h * h + 2 * h * kv + biases + 3 * h * shape.shared) // tp
    alike = 2 * h + h * shape.experts + (h if shape.shared else 0)
    experts = 3 * h * shape.width * shape.experts // ep
    # The inputs of attention and of the experts, the former whole too; rows as they come to experts and as they come back.
    kept = 2 * part + whole + 2 * rows * h * WIDTH
    weight = WIDTH if shape.shared else 4  # Mixtral divides them by their sum, in float32
    kept += rows * (weight + 8 + 8 + 8) + 8 * (2 * ep + shape.experts // ep)  # and choices, the order here and there; counts
    kept += whole + part if shape.shared else 0  # what the shared expert is given and returns

    def reduced(count: float, ranks: int) -> float:
        return 2 * (ranks - 1) / ranks * count

    found = []
    for place in range(pp):
        first, last = place == 0, place == pp - 1
        vocabulary = (first + last) * shape.vocab * h // tp
        n = layers[place]
        sent: Counter[str] = Counter()
        sent["tp"] = (tp - 1) / tp * whole * (n * (8 if shape.shared else 4) + 2 * (first + last))
        sent["tp"] += last * 3 * reduced(4 * length, tp)  # of the loss: the largest logit, the sum, the label's
        sent["ep"] = n * (ep - 1) / ep * (4 * rows * h * WIDTH + 8 * shape.experts)
        sent["dp"] = last * reduced(4 + 8, dp)  # the loss, and the number of labels
        sent["pp"] = (not last) * (part + angles) + (not first) * part
        sent = Counter({axis: micro_batches * count for axis, count in sent.items()})
        sent["dp"] += reduced(WIDTH * (n * divided + vocabulary), dp)
        sent["dp,tp"] = reduced(WIDTH * (n * alike + last * h), dp * tp)
        sent["edp"] = reduced(WIDTH * n * experts, edp)
        of_head = part + whole + 8 * (length + 1) + 2 * 4 * length if last else 0
        each = n * kept + angles + 8 * (first + last) + of_head  # 8: where the rank's vocabulary begins
        parameters = WIDTH * (n * (divided + alike + experts) + vocabulary + last * h)
        found.append({"parameters": parameters, "kept": min(micro_batches, pp - place) * each, "sent": dict(+sent)})
    return found


def measure(shape: Shape, mesh: str, samples: int, length: int, *, verify: bool = True) -> dict[str, Any]:
    """What the program says, after it was held against the closed forms."""
    import torch
    import transformers

    import foldcc

    transformers.logging.set_verbosity_error()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = shape.model()
    torch.set_default_dtype(before)
    folded_mesh = foldcc.FoldedMesh.parse(mesh)
    pp, micro_batches = folded_mesh.size("pp"), samples // folded_mesh.size("dp")
    ids = torch.zeros(samples, length, dtype=torch.long, device="meta")
    start = time.perf_counter()
    folded = foldcc.parallelize(
        model,
        folded_mesh,
        example_inputs={"input_ids": ids, "labels": ids},
        micro_batches=micro_batches,
        schedule="1f1b",
        recompute="blocks",
        verify=verify,
    )
    seconds = time.perf_counter() - start
    summary = folded.summary()
    norms = [folded.plan.stages[f"model.layers.{i}.input_layernorm.weight"] for i in range(shape.layers)]
    layers = [norms.count((place,)) for place in range(pp)]
    places = []
    forms = closed_forms(shape, folded_mesh, layers, micro_batches, length)
    for place, told in zip(summary.pipeline.places, forms, strict=True):
        held, sent = place.memory, Counter[str]()
        for c in place.sent:
            sent[",".join(c.axes)] += c.bytes
        assert (held.parameters, held.gradients, held.moments) == (told["parameters"],) * 2 + (2 * told["parameters"],)
        assert held.kept == told["kept"], (place.stages, held.kept, told["kept"])
        close = {axis: abs(sent[axis] - told["sent"].get(axis, 0)) <= 1e-9 * sent[axis] for axis in {*sent, *told["sent"]}}
        assert all(close.values()), (place.stages, sent, told["sent"])
        places.append({**{k: getattr(held, k) for k in ("parameters", "moments", "kept", "step", "peak")}, "sent": dict(sent)})
    bubble = (pp - 1) / (micro_batches + pp - 1)
    assert abs(summary.pipeline.waits - bubble) < 0.01 * bubble, (summary.pipeline.waits, bubble)
    return {
        "ranks": folded_mesh.world_size,
        "micro_batches": micro_batches,
        "layers": layers,
        "waits": summary.pipeline.waits,
        "seconds": seconds,
        "proof": str(folded.proof) if verify else "",
        "places": places,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of models; all unless said otherwise")
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*CASES[options.case], SAMPLES, LENGTH)))
        return
    held, axes = ("parameters", "moments", "kept", "step", "peak"), ("tp", "ep", "dp", "edp", "pp")
    print(f"| model | ranks | layout | waits | {' | '.join(held)} | {' | '.join(f'sent, {a}' for a in axes)} |")
    print(f"|{'---|' * (4 + len(held) + len(axes))}")
    found = {}
    for name in options.names or CASES:
        result = subprocess.run([sys.executable, __file__, "--case", name], check=True, capture_output=True, text=True)
        row = found[name] = {"mesh": CASES[name][1], **json.loads(result.stdout.splitlines()[-1])}
        fullest = max(row["places"], key=lambda place: place["peak"])
        cells = [f"{fullest[c] / GB:.2f}" for c in held]
        cells += [f"{fullest['sent'].get(axis, 0) / GB:.2f}" for axis in axes]
        layout = row["mesh"].replace("|", "\\|")
        print(f"| {name} | {row['ranks']} | `{layout}` | {row['waits']:.1%} | {' | '.join(cells)} |", flush=True)
    if options.out:
        machine = {"machine": platform.platform(), "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
        with open(options.out, "w") as file:
            json.dump({**machine, "samples": SAMPLES, "length": LENGTH, "cases": found}, file, indent=1)


if __name__ == "__main__":
    main()
