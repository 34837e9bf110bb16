"""A Mixture-of-Experts trains on four processes as it does in one: the loss of every step, on several folds, with zero=3.

    python benchmarks/moe_training.py [--size 50m] [--steps 200] [--json benchmarks/results/moe_training.json]

Each fold trains the same Mixtral (the same random weights) on the same text with AdamW, beside one process: for fp32 and for
narrow, which has its parameters in bfloat16, the unmodified model; for bf16 the model under the same `Precision()`, with
parameters in float32 and products in bfloat16. What is told is how far the two losses are apart, relative to each other: the
root of the mean square over all steps, the median, what nine steps of ten stay below, and the most.

Training that rounds to 8 digits parts from itself, whoever runs it. So each dtype has a control: the process once more, with
the samples of each step in another order, which changes nothing but the order in which sums are rounded. A fold that follows
as well as the control does follows as well as can be.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

RANKS = 4
FOLDS = ("dp=4|ep=2", "dp=2,tp=2|ep=2,etp=2", "tp=4|ep=4")
DTYPES = ("fp32", "bf16", "narrow")
# hidden width, width of an expert, layers
SIZES = {"50m": (384, 832, 6), "12m": (256, 448, 4), "3m": (128, 256, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="50m", help="parameters, about")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="samples of a step, of all ranks")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sample")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--folds", nargs="+", default=list(FOLDS), help=f"meshes of {RANKS} ranks")
    parser.add_argument("--orders", type=int, default=2, help="controls: how many other orders of samples")
    parser.add_argument("--json", help="where to write the result")
    options = parser.parse_args()
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in _model(options.size).parameters()),
        "options": vars(options),
        "runs": [],
    }
    print(f"{found['parameters'] / 1e6:.1f} M parameters, {options.steps} steps of {options.batch} x {options.length} tokens")
    for dtype in options.dtypes:
        start = time.perf_counter()
        alone = _alone(vars(options), dtype, order=0)
        print(f"{dtype}, in one process: {alone[0]:.4f} to {alone[-1]:.4f} in {time.perf_counter() - start:.0f} s", flush=True)
        runs = {f"order {i}": partial(_alone, vars(options), dtype, i) for i in range(1, options.orders + 1)}
        runs |= {fold: partial(_on_processes, vars(options), dtype, fold) for fold in options.folds}
        for name, run in runs.items():
            start = time.perf_counter()
            losses = run()
            print(f"  {name:<28} {_apart(losses, alone)}; {time.perf_counter() - start:.0f} s", flush=True)
            found["runs"].append({"dtype": dtype, "run": name, "losses": losses, "alone": alone})
            if options.json:
                with open(options.json, "w") as file:
                    json.dump(found, file)


def _apart(losses: list[float], alone: list[float]) -> str:
    apart = sorted(abs(a - b) / b for a, b in zip(losses, alone, strict=True))
    rms = math.hypot(*apart) / len(apart) ** 0.5
    told = {"rms": rms, "half": apart[len(apart) // 2], "9 of 10": apart[len(apart) * 9 // 10], "most": apart[-1]}
    return f"to {losses[-1]:.4f}, apart: " + ", ".join(f"{name} {x:.1e}" for name, x in told.items())


def _model(size: str, dtype: str = "fp32") -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    hidden, width, layers = SIZES[size]
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2}
    config = {"vocab_size": 256, "max_position_embeddings": 512, "output_router_logits": True, **heads}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, **config))
    return model.bfloat16() if dtype == "narrow" else model


def _batches(options: dict[str, Any]) -> Tensor:
    """[steps, samples, length]: bytes of the standard library's sources."""
    from foldcc.tools.demo import text

    return text(options["steps"] * options["batch"], options["length"]).unflatten(0, (options["steps"], -1))


def _train(model: nn.Module, batches: Tensor) -> list[float]:
    from foldcc import clip_grad_norm_

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _alone(options: dict[str, Any], dtype: str, order: int) -> list[float]:
    import foldcc

    model, batches = _model(options["size"], dtype), _batches(options)
    if order:
        random = torch.Generator().manual_seed(order)
        batches = torch.stack([ids[torch.randperm(len(ids), generator=random)] for ids in batches])
    if dtype == "bf16":
        example = {"input_ids": batches[0], "labels": batches[0]}
        model = foldcc.parallelize(model, "dp=1", example_inputs=example, precision=foldcc.Precision())
    return _train(model, batches)


def _on_processes(options: dict[str, Any], dtype: str, fold: str) -> list[float]:
    from foldcc.testing import run_distributed

    losses: list[float] = run_distributed(_folded, RANKS, options, dtype, fold, timeout=3600)[0]
    return losses


def _folded(options: dict[str, Any], dtype: str, fold: str) -> list[float]:
    import foldcc

    warnings.filterwarnings("ignore")
    mesh = foldcc.FoldedMesh.parse(fold, device_type="cpu")
    own = _batches(options).chunk(mesh.data_parallel, 1)[mesh.index(dist.get_rank(), mesh.samples)]
    precision = foldcc.Precision() if dtype == "bf16" else None
    example = {"input_ids": own[0], "labels": own[0]}
    folded = foldcc.parallelize(_model(options["size"], dtype), mesh, example_inputs=example, zero=3, precision=precision)
    return _train(folded, own)


if __name__ == "__main__":
    main()
