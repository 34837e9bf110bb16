"""A training step with parameters stored divided: foldcc with zero=3 beside PyTorch's fully_shard, a Llama on 4 processes.

    python benchmarks/zero.py [--steps 20] [--json benchmarks/results/zero.json]

All train the same model (the same random weights) on the same samples, in the same processes, taking turns: a step of one, a
step of the other, and who goes first alternates. A step is forward, backward and AdamW; `fully_shard` wraps each layer and the
model, as its documentation has it. A third one is foldcc with ahead=0, which waits for each collective at once. The time is the
median over the steps of the ratio foldcc / fully_shard. Memory is the most bytes that live at once in a step, beside parameters
and moments, of what PyTorch allocates on rank 0.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

RANKS = 4
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def main() -> None:
    from foldcc.testing import run_distributed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side, after 3 that are not timed")
    parser.add_argument("--batch", type=int, default=2, help="samples of a rank")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--json", help="where to write the result")
    options = parser.parse_args()
    seconds, most = run_distributed(_measure, RANKS, vars(options), timeout=900)[0]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        **{f"{name}_median_ms": 1e3 * statistics.median(times) for name, times in seconds.items()},
        **{f"{name}_peak_mb": bytes_ / 1e6 for name, bytes_ in most.items()},
        "time_ratio": statistics.median(a / b for a, b in zip(seconds["foldcc"], seconds["fully_shard"], strict=True)),
        "memory_ratio": most["foldcc"] / most["fully_shard"],
        "ahead_time_ratio": statistics.median(a / b for a, b in zip(seconds["foldcc"], seconds["ahead=0"], strict=True)),
        "ahead_memory_ratio": most["foldcc"] / most["ahead=0"],
    }
    for name, value in result.items():
        print(f"{name:<24} {value:,.3f}" if isinstance(value, float) else f"{name:<24} {value}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({**result, "options": vars(options), "seconds": seconds}, file, indent=1)


def _measure(options: dict[str, Any]) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each step of each side, and the most bytes of one step."""
    warnings.filterwarnings("ignore")
    random = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(SIZES["vocab_size"], (options["batch"], options["length"]), generator=random)
    inputs = {"input_ids": ids, "labels": ids}
    models = {"foldcc": _foldcc(inputs, ahead=1), "fully_shard": _fully_shard(), "ahead=0": _foldcc(inputs, ahead=0)}
    steps = {name: _training_step(model, inputs) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options["steps"] + 3):
        losses = {}
        for name in list(steps)[:: 1 if turn % 2 == 0 else -1]:
            dist.barrier()
            start = time.perf_counter()
            losses[name] = steps[name]()
            dist.barrier()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
        if turn in (0, 2):
            _check_same(losses)
    # Threads of gloo let go of what was sent when they get to it.
    return seconds, {name: min(_allocated(step) for _ in range(3)) for name, step in steps.items()}


def _check_same(losses: dict[str, Tensor]) -> None:
    """foldcc's losses are global means, that of fully_shard is of the rank's samples: their means over all ranks agree."""
    means = torch.stack(list(losses.values())).detach().double()
    dist.all_reduce(means)
    if not torch.allclose(means, means[0], rtol=1e-4):
        raise RuntimeError(f"the sides compute different losses: {(means / RANKS).tolist()}")


def _model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def _foldcc(inputs: dict[str, Tensor], *, ahead: int) -> nn.Module:
    import foldcc

    mesh = foldcc.init_folded_mesh("cpu", attention={"dp": RANKS})
    return foldcc.parallelize(_model(), mesh, example_inputs=inputs, zero=3, ahead=ahead)


def _fully_shard() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = _model(), init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _training_step(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> Tensor:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _allocated(step: Callable[[], Tensor]) -> int:
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as measured:
        step()
    events = [e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


if __name__ == "__main__":
    main()
