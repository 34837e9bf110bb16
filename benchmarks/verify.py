"""How long `foldcc.verify` takes for models as large as they are published, on meshes of up to 2,048 ranks, on one CPU.

    python benchmarks/verify.py [--out benchmarks/results/verify.json]

Each line is a process of its own, which folds and proves one layer first; models are built on `meta`. `compile` is
`parallelize(verify=False)`, `proved` is the same with the proof that `parallelize` makes by default, and `verify` is the
proof on all ranks in two rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

CASES = [
    ("DeepSeek-V3, 61 layers, 256 ranks", "deepseek", "dp=32,tp=8|ep=64", 61),
    ("DeepSeek-V3, 61 layers, 2048 ranks", "deepseek", "dp=256,tp=8|ep=64", 61),
    ("DeepSeek-V3, 16 layers, 256 ranks", "deepseek", "dp=32,tp=8|ep=64", 16),
    ("Mixtral-8x22B, 56 layers, 128 ranks", "mixtral", "dp=64,tp=2|ep=8", 56),
]


def configured(model: str, layers: int) -> Any:
    import transformers

    if model == "deepseek":
        return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(num_hidden_layers=layers))
    config = transformers.MixtralConfig(
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
    return transformers.MixtralForCausalLM(config)


def measure(name: str, mesh: str, layers: int) -> dict[str, Any]:
    import torch
    import transformers

    import foldcc

    transformers.logging.set_verbosity_error()
    with torch.device("meta"):
        one_layer, model = configured(name, 1), configured(name, layers)
    folded_mesh = foldcc.FoldedMesh.parse(mesh)
    ids = torch.zeros(folded_mesh.size("dp"), 4096, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids}
    with tempfile.TemporaryDirectory() as fresh:
        os.environ["FOLDCC_CACHE"] = fresh
        foldcc.parallelize(one_layer, folded_mesh, example_inputs=inputs, verify=True)
        start = time.perf_counter()
        foldcc.parallelize(model, folded_mesh, example_inputs=inputs, verify=False)
        compiled = time.perf_counter()
        folded = foldcc.parallelize(model, folded_mesh, example_inputs=inputs, verify=True)
        proved = time.perf_counter()
        proof = foldcc.verify(folded)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "compile": compiled - start,
        "proved": proved - compiled,
        "verify": time.perf_counter() - proved,
        "default_proof": str(folded.proof),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "ok": proof.ok,
        "bound": proof.bound,
        "proof": str(proof),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case[0], options.case[1], int(options.case[2]))))
        return
    found = {}
    for name, model, mesh, layers in CASES:
        command = [sys.executable, __file__, "--case", model, mesh, str(layers)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = row = json.loads(result.stdout.splitlines()[-1])
        verdict = f"proved, a difference missed with < {row['bound']:.0e}" if row["ok"] else "NOT proved"
        print(
            f"{name:36} compile {row['compile']:6.1f} s   proved {row['proved'] / row['compile']:4.2f} times that   "
            f"verify {row['verify']:6.1f} s   "
            f"peak {row['peak_gb']:.2f} GB   {verdict}",
            flush=True,
        )
    if options.out:
        told = {"machine": platform.platform(), "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
        with open(options.out, "w") as file:
            json.dump({**told, "cases": found}, file, indent=1)


if __name__ == "__main__":
    main()
