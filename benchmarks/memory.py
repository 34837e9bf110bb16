"""What a rank of a large model needs, by closed form: models as they are published, on layouts that fit 80 GB.

    python benchmarks/memory.py [--out benchmarks/results/memory.json]

Nothing is allocated: models are built on `meta`, in bfloat16, and folded; a sample of 4,096 tokens is on each data-parallel
rank. Parameters, gradients and moments are counted from the shapes of the model as well, and have to agree. `kept` and
`a step` are read off the program (`foldcc/inspect/memory.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from typing import Any

GB = 1e9
CASES = [
    ("Mixtral-8x22B", "dp=64,tp=2|ep=8"),
    ("Qwen3-235B-A22B", "dp=64,tp=4|ep=32"),
    ("DeepSeek-V3", "dp=128,tp=8|ep=64"),
]
LENGTH = 4096
ZERO, RECOMPUTE = 3, "blocks"


def configured(name: str) -> Any:
    import transformers as t

    if name == "Mixtral-8x22B":
        return t.MixtralForCausalLM(
            t.MixtralConfig(
                vocab_size=32768,
                hidden_size=6144,
                intermediate_size=16384,
                num_hidden_layers=56,
                num_attention_heads=48,
                num_key_value_heads=8,
                max_position_embeddings=65536,
                num_local_experts=8,
                num_experts_per_tok=2,
                rope_theta=1e6,
            )
        )
    if name == "Qwen3-235B-A22B":
        return t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(
                vocab_size=151936,
                hidden_size=4096,
                intermediate_size=12288,
                num_hidden_layers=94,
                num_attention_heads=64,
                num_key_value_heads=4,
                head_dim=128,
                moe_intermediate_size=1536,
                num_experts=128,
                num_experts_per_tok=8,
                max_position_embeddings=40960,
            )
        )
    return t.DeepseekV3ForCausalLM(t.DeepseekV3Config())


def measure(name: str, mesh: str) -> dict[str, Any]:
    import torch
    import transformers

    import foldcc
    from foldcc.layout import VARYING

    transformers.logging.set_verbosity_error()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = configured(name)
    folded_mesh = foldcc.FoldedMesh.parse(mesh)
    ids = torch.zeros(folded_mesh.size("dp"), LENGTH, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids}
    start = time.perf_counter()
    folded = foldcc.parallelize(model, folded_mesh, example_inputs=inputs, verify=False, zero=ZERO, recompute=RECOMPUTE)
    seconds = time.perf_counter() - start
    found = folded.summary().memory
    layouts = folded.program.layouts()
    held = 0.0
    for slot in folded.program.slots:
        if slot.kind == "parameter":
            p, layout = folded.get_parameter(slot.names[0]), layouts[slot.name]
            held += p.numel() * p.element_size() / math.prod(layout.ranks[a] for a in layout.axes(VARYING))
    assert held == found.parameters == found.gradients == found.moments / 2, (held, found)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "ranks": folded_mesh.world_size,
        "whole": whole,
        "seconds": seconds,
        **{k: getattr(found, k) for k in ("parameters", "gradients", "moments", "kept", "step", "peak", "communication")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*options.case)))
        return
    found = {}
    columns = ("parameters", "moments", "gradients", "kept", "step", "peak")
    print(f"| model | ranks | layout | model, GB | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 4)}")
    for name, mesh in CASES:
        command = [sys.executable, __file__, "--case", name, mesh]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        row = found[name] = {"mesh": mesh, **json.loads(result.stdout.splitlines()[-1])}
        cells = " | ".join(f"{row[c] / GB:.2f}" for c in columns)
        layout = mesh.replace("|", "\\|")
        print(f"| {name} | {row['ranks']} | `{layout}` | {row['whole'] / GB:,.0f} | {cells} |", flush=True)
    if options.out:
        machine = {"machine": platform.platform(), "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
        with open(options.out, "w") as file:
            json.dump({**machine, "zero": ZERO, "recompute": RECOMPUTE, "length": LENGTH, "cases": found}, file, indent=1)


if __name__ == "__main__":
    main()
