"""How long `parallelize` takes for a large model that nobody here could run: Mixtral-8x22B, built on `meta`.

    python benchmarks/compile_time.py [--out benchmarks/results/compile_time.json]

Each line is a process of its own. `export` is torch.export.export on the same model in the same process; `capture` is the
first stage of `parallelize`, `beyond` is the rest, with the joint graph and everything that a first step would do.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time

CASES = [
    ("56 layers, 128 ranks", "dp=64,tp=2|ep=8", 56),
    ("56 layers, 1024 ranks", "dp=512,tp=2|ep=8", 56),
    ("14 layers, 128 ranks", "dp=64,tp=2|ep=8", 14),
]


def measure(mesh: str, layers: int) -> dict[str, float]:
    import torch
    import transformers
    from transformers import MixtralConfig, MixtralForCausalLM

    import foldcc
    from foldcc.capture import transformers as adapter

    transformers.logging.set_verbosity_error()
    config = MixtralConfig(
        vocab_size=32768,
        hidden_size=6144,
        intermediate_size=16384,
        num_hidden_layers=layers,
        num_attention_heads=48,
        num_key_value_heads=8,
        max_position_embeddings=65536,
        num_local_experts=8,
        num_experts_per_tok=2,
        rope_theta=1e6,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    folded_mesh = foldcc.FoldedMesh.parse(mesh)
    ids = torch.zeros(folded_mesh.size("dp"), 4096, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids}

    start = time.perf_counter()
    with adapter.adapted(model, inputs):
        torch.export.export(model, (), {"input_ids": ids, "labels": ids.clone()}, strict=False)
    export = time.perf_counter() - start

    start = time.perf_counter()
    folded = foldcc.parallelize(model, folded_mesh, example_inputs=inputs, verify=False)
    total = time.perf_counter() - start
    capture = folded.stages["capture"].seconds
    return {
        "export": export,
        "parallelize": total,
        "capture": capture,
        "beyond": total - capture,
        "nodes": folded.stages[-1].after,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        **{f"stage {s.name}": s.seconds for s in folded.stages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case[0], int(options.case[1]))))
        return
    found = {}
    for name, mesh, layers in CASES:
        command = [sys.executable, __file__, "--case", mesh, str(layers)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = json.loads(result.stdout.splitlines()[-1])
        row = found[name]
        print(
            f"{name:24} export {row['export']:6.1f} s   parallelize {row['parallelize']:6.1f} s   "
            f"capture {row['capture']:6.1f} s   beyond {row['beyond']:5.1f} s   peak {row['peak_gb']:.2f} GB"
        )
    full, wide, short = (found[name] for name, _, _ in CASES)
    ratios = {
        "parallelize / export": full["parallelize"] / full["export"],
        "1024 ranks / 128 ranks": wide["parallelize"] / full["parallelize"],
        "beyond capture, 56 layers / 14 layers": full["beyond"] / short["beyond"],
    }
    for name, ratio in ratios.items():
        print(f"{name:40} {ratio:.2f}")
    if options.out:
        machine = {"machine": platform.platform(), "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
        with open(options.out, "w") as file:
            json.dump({**machine, "cases": found, "ratios": ratios}, file, indent=1)


if __name__ == "__main__":
    main()
