"""Every kernel of the standard models, compiled for a GPU that need not be there.

    python benchmarks/aot.py [--target sm_90] [--out benchmarks/results/aot.json]

Each model is a process of its own: `python -m foldcc kernels --model ... --json ...`, two layers, forward and backward, on one
rank. Seconds are of the whole process: folding the model, emitting its kernels and compiling them, each once.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from foldcc.codegen.tiles import SHARED
from foldcc.tables import table
from foldcc.tools.machine_code import SPILLED
from foldcc.tools.standard_models import MODELS

HEAD = ["model", "kernels", "functions", "seconds", "most registers", "most spilled", "most shared", "grouped products use"]


def compiled(model: str, target: str) -> tuple[list[dict[str, Any]], float]:
    """What `python -m foldcc kernels` finds for a model, and how long it takes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.json"
        command = [sys.executable, "-m", "foldcc", "kernels", "--target", target, "--model", model, "--json", str(out)]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text()), time.perf_counter() - start


def summary(model: str, found: list[dict[str, Any]], seconds: float) -> list[str]:
    products = [set(x["instructions"]) for x in found if x["function"].startswith("grouped_")]
    most = [max(x[name] for x in found) for name in ("registers", "spilled", "shared")]
    kernels = len({x["kernel"] for x in found})
    shared = ", ".join(sorted(set.intersection(*products))) if products else ""
    return [model, str(kernels), str(len(found)), f"{seconds:.0f}", *map(str, most), shared]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="sm_90", choices=SHARED)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--out", type=Path, help="write everything that was found to this JSON file")
    options = parser.parse_args()
    results = {model: compiled(model, options.target) for model in options.models}
    rows = [summary(model, *result) for model, result in results.items()]
    total = sum(seconds for _, seconds in results.values())
    print(table(HEAD, rows, right=range(1, 7)))
    every = [x for found, _ in results.values() for x in found]
    worst = [x for x in every if x["error"] or x["spilled"] > SPILLED or x["shared"] > SHARED[options.target]]
    print(
        f"{len(every)} functions in {total:.0f} s; {len(worst)} do not compile, do not fit, or spill more than {SPILLED} bytes"
    )
    if options.out:
        versions = {name: metadata.version(name) for name in ("torch", "triton", "transformers")}
        told = {"machine": platform.platform(), "date": time.strftime("%Y-%m-%d"), "target": options.target, **versions}
        kernels = {model: {"seconds": seconds, "functions": found} for model, (found, seconds) in results.items()}
        options.out.write_text(json.dumps({**told, "models": kernels}, indent=1) + "\n")
    return int(bool(worst))


if __name__ == "__main__":
    sys.exit(main())
