"""What loading a checkpoint of safetensors reads and holds: a Mixtral on meta, filled on 4 processes.

    python benchmarks/loading.py [--gigabytes 2] [--json benchmarks/results/loading.json]

The checkpoint is as Transformers stores it, each expert a tensor of its own, random numbers in bfloat16. Each process compiles
the model on `dp=2,tp=2|ep=4`, allocates what it holds, and loads. Bytes that are read are those of a process's system calls
(`rchar`), and memory is its largest resident set while it loads, beyond what it was before, without what it holds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

RANKS = 4
TEXT = "dp=2,tp=2|ep=4"


def main() -> None:
    from foldcc.testing import run_distributed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the checkpoint, about")
    parser.add_argument("--folder", help="where the checkpoint is written for the time; the system's, unless it is said")
    parser.add_argument("--json", help="where to write the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write(Path(folder), options.gigabytes)
        ranks = run_distributed(measure, RANKS, folder, options.gigabytes, timeout=900)
    held, read = sum(r["held"] for r in ranks), sum(r["read"] for r in ranks)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "checkpoint_mb": size / 1e6,
        "held_mb": held / 1e6,
        "read_mb": read / 1e6,
        "read_ratio": read / held,
        "largest_tensor_mb": max(r["largest"] for r in ranks) / 1e6,
        "memory_beyond_share_mb": max(r["beyond"] for r in ranks) / 1e6,
        "seconds": max(r["seconds"] for r in ranks),
    }
    for name, value in result.items():
        print(f"{name:<24} {value:,.3f}" if isinstance(value, float) else f"{name:<24} {value}")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def model_of(gigabytes: float) -> nn.Module:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=max(64, int(520 * gigabytes) // 64 * 64),
        num_hidden_layers=20,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=32,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        return transformers.MixtralForCausalLM(config).to(torch.bfloat16)


def write(folder: Path, gigabytes: float) -> int:
    """Writes a checkpoint of random numbers, tensor by tensor. Returns its bytes."""
    from foldcc.capture.pretrained import as_stored, store_configuration
    from foldcc.checkpoints import files
    from foldcc.checkpoints.pieces import leaf

    model = model_of(gigabytes)
    unread = {n: leaf(p.shape, p.dtype, n, lambda at: torch.empty(0)) for n, p in model.named_parameters()}
    stored = as_stored(model, unread)
    parts = files.split(stored, 500_000_000)
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        writer = files.Writer(folder / name, part)
        for key, x in part.items():
            writer.write(key, torch.randn(x.shape, dtype=x.dtype))
        writer.close()
    size = sum(x.numel() * x.element_size() for x in stored.values())
    (folder / files.INDEX).write_text(files.index_of({n: list(p) for n, p in zip(names, parts, strict=True)}, size))
    store_configuration(model, folder, torch.bfloat16)
    return size


def measure(folder: str, gigabytes: float) -> dict[str, Any]:
    import safetensors.torch  # noqa: F401  its files are not the checkpoint's

    import foldcc

    mesh, ids = foldcc.FoldedMesh.parse(TEXT, "cpu"), torch.zeros(2, 16, dtype=torch.int64)
    model = foldcc.parallelize(model_of(gigabytes), mesh, example_inputs={"input_ids": ids, "labels": ids}, verify=False)
    model.to_empty(device="cpu")
    held = [p.detach().to_local() for p in model.parameters()]  # type: ignore[operator]
    for x in held:
        x.zero_()  # pages that nobody has written are not resident
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set is counted anew
    before, start = (_of("io", "rchar"), _of("status", "VmRSS")), time.perf_counter()
    foldcc.load_pretrained(model, folder)
    return {
        "seconds": time.perf_counter() - start,
        "read": _of("io", "rchar") - before[0],
        "beyond": _of("status", "VmHWM") - before[1],
        "held": sum(x.nbytes for x in held),
        "largest": max(x.nbytes for x in held),
    }


def _of(file: str, key: str) -> int:
    """A number that the system counts for this process, in bytes."""
    line = next(line for line in Path(f"/proc/self/{file}").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * (1024 if line.endswith("kB") else 1)


if __name__ == "__main__":
    main()
