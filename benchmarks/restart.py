"""How soon a restarted script trains: to its first step without and with programs on disk, beside importing what it needs.

    python benchmarks/restart.py [--layers 8] [--repeat 5] [--json benchmarks/results/restart.json]

Each is a process of its own, timed from outside. The script makes a Mixtral of the given number of layers, folds it on
`dp=2,tp=2|ep=4` (all ranks in one process) and runs one step of AdamW. Cold: the directory of programs and proofs is empty.
Warm: another run left it. The processes take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

IMPORTS = "import torch\nfrom transformers import MixtralConfig, MixtralForCausalLM"
SCRIPT = (
    IMPORTS
    + """
import foldcc

sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=256)
torch.manual_seed(0)
model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_hidden_layers={layers}))
ids = torch.randint(256, (4, 32))
folded = foldcc.parallelize(
    model, foldcc.FoldedMesh.parse("dp=2,tp=2|ep=4"), example_inputs={{"input_ids": ids, "labels": ids}}
)
optimizer = torch.optim.AdamW(folded.parameters())
folded(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
"""
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", help="where to write the result")
    options = parser.parse_args()
    script = SCRIPT.format(layers=options.layers)
    times: dict[str, list[float]] = {"imports": [], "cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as left:
        seconds(script, left)
        for _ in range(options.repeat):
            times["imports"].append(seconds(IMPORTS, left))
            times["warm"].append(seconds(script, left))
            with tempfile.TemporaryDirectory() as empty:
                times["cold"].append(seconds(script, empty))
    found = {name: statistics.median(each) for name, each in times.items()}
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "layers": options.layers,
        **{f"{name}_seconds": value for name, value in found.items()},
        "warm_ratio": found["warm"] / found["imports"],
        "cold_ratio": found["cold"] / found["imports"],
    }
    for name, value in result.items():
        print(f"{name:<16} {value:,.2f}" if isinstance(value, float) else f"{name:<16} {value}")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def seconds(script: str, kept: str) -> float:
    """From the start of a process to its end, with what is kept on disk in a directory."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"FOLDCC_CACHE": kept}, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
