"""Time of a training step of a Mixtral on 4 gloo processes: foldcc beside Transformers' own DistributedConfig.

    python benchmarks/step_time.py [--steps 20] [--json benchmarks/results/step_time.json]

Both train the same model (20 M parameters, the same random weights) on the same batch, in the same processes, taking
turns: a step of one, a step of the other, and who goes first alternates. A step is forward, backward and AdamW. What is
compared is the median over the steps of the ratio foldcc / Transformers, so that what else the machine does falls on
both. `cpu_ms` is what all ranks together compute in a step: waiting and other processes do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

RANKS = 4
MESH = "dp=2,tp=2|ep=4"
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def main() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from foldcc.testing import run_distributed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side, after 3 that are not timed")
    parser.add_argument("--batch", type=int, default=4, help="samples of a data-parallel rank")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--json", help="where to write the result")
    parser.add_argument("--profile", action="store_true", help="also show where rank 0 of foldcc spends a step")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        results = run_distributed(_measure, RANKS, folder, vars(options), timeout=600)
    seconds, _, profile = results[0]
    cpu = {name: sum(spent[name] for _, spent, _ in results) for name in seconds}
    result = {
        **_machine(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "mesh": MESH,
        "tokens": 2 * options.batch * options.length,
        "steps": options.steps,
        **{f"{name}_median_ms": 1e3 * statistics.median(times) for name, times in seconds.items()},
        **{f"{name}_cpu_ms": 1e3 * spent / options.steps for name, spent in cpu.items()},
        "ratio": statistics.median(a / b for a, b in zip(seconds["foldcc"], seconds["transformers"], strict=True)),
    }
    for name, value in result.items():
        print(f"{name:<24} {value:,.3f}" if isinstance(value, float) else f"{name:<24} {value}")
    print(profile, end="")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({**result, "seconds": seconds}, file, indent=1)


def _machine() -> dict[str, str | int | None]:
    import transformers

    with open("/proc/cpuinfo") as file:
        models = {line.split(":")[1].strip() for line in file if line.startswith("model name")}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": ", ".join(sorted(models)) or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _measure(folder: str, options: dict[str, Any]) -> tuple[dict[str, list[float]], dict[str, float], str]:
    """Seconds of each step of each side, and seconds of computing in all of them, on this rank."""
    warnings.filterwarnings("ignore")
    inputs = _batch(dist.get_rank() // 2, options["batch"], options["length"])
    steps = {"foldcc": _foldcc(folder, inputs), "transformers": _transformers(folder, inputs)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    for turn in range(options["steps"] + 3):
        losses = {}
        for name in list(steps)[:: 1 if turn % 2 == 0 else -1]:
            dist.barrier()
            start, computed = time.perf_counter(), time.process_time()
            losses[name] = steps[name]()
            dist.barrier()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
                spent[name] += time.process_time() - computed
        if turn == 0:
            _check_same(losses)
    return seconds, spent, _profile(steps["foldcc"]) if options["profile"] else ""


def _check_same(losses: dict[str, Tensor]) -> None:
    """foldcc's loss is the global mean, Transformers' that of the rank's samples: their means over all ranks agree."""
    means = torch.stack(list(losses.values())).detach().double()
    dist.all_reduce(means)
    if not torch.allclose(means[0], means[1], rtol=1e-4):
        raise RuntimeError(f"the two sides compute different losses: {(means / RANKS).tolist()}")


def _batch(data_rank: int, batch: int, length: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(data_rank)
    ids = torch.randint(SIZES["vocab_size"], (batch, length), generator=random)
    return {"input_ids": ids, "labels": ids}


def _training_step(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> Tensor:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _foldcc(folder: str, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    from transformers import MixtralForCausalLM

    import foldcc

    model = MixtralForCausalLM.from_pretrained(folder)
    folded = foldcc.parallelize(model, foldcc.FoldedMesh.parse(MESH, "cpu"), example_inputs=inputs)
    return _training_step(folded, inputs)


def _transformers(folder: str, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    from transformers import DistributedConfig, MixtralForCausalLM

    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "RANK": str(dist.get_rank()), "WORLD_SIZE": str(RANKS)}
    config = DistributedConfig(tp_size=2, fsdp_size=2, ep_size=4, tp_plan="auto")
    return _training_step(MixtralForCausalLM.from_pretrained(folder, distributed_config=config), inputs)


def _profile(step: Callable[[], Tensor]) -> str:
    with torch.profiler.profile() as profile:
        step()
    return profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)


if __name__ == "__main__":
    main()
