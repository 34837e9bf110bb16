"""Pretrains a Mixture-of-Experts model from nothing, on any mesh, and goes on where it was stopped, on any other.

torchrun --nproc-per-node 8 examples/pretrain_moe.py --mesh "dp=4,tp=2|ep=8" --zero 1 --out run
python examples/pretrain_moe.py --mesh "dp=2,tp=2|ep=4" --steps 20     # all ranks in this process, to try it
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import foldcc


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="dp=2,tp=2|ep=4")
    parser.add_argument("--zero", type=int, default=0, help="1 to 3 divide what ranks would hold twice")
    parser.add_argument("--bfloat16", action="store_true", help="for products; weights and sums stay float32")
    parser.add_argument("--data", type=Path, default=Path(os.__file__).parent, help="a folder of *.py, read as bytes")
    parser.add_argument("--out", type=Path, help="for checkpoints; the last one that is there is gone on from")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32, help="samples of a step, over all ranks")
    parser.add_argument("--accumulate", type=int, default=1, help="calls that a step is made of")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations, and between checkpoints")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of a device, of which MFU is the share that is used")
    return parser.parse_args(arguments)


class Text:
    """Random pieces of all bytes. What a step sees depends on its number alone, so there is no position to store."""

    def __init__(self, folder: Path, length: int):
        whole = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        self.tokens, self.length = torch.frombuffer(bytearray(whole), dtype=torch.uint8), length

    def batch(self, step: int, samples: int) -> Tensor:
        random = torch.Generator().manual_seed(step)
        starts = torch.randint(len(self.tokens) - self.length, (samples, 1), generator=random)
        return self.tokens[starts + torch.arange(self.length)].long()


def main(arguments: list[str]) -> list[float]:
    args, launched = options(arguments), "RANK" in os.environ
    mesh = foldcc.FoldedMesh.parse(args.mesh, "virtual" if not launched else "cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if mesh.device_type == "cuda" else torch.device("cpu")
    rank, ranks, world = (dist.get_rank(), mesh.size("dp"), mesh.world_size) if launched else (0, 1, 1)
    text, place = Text(args.data, args.length), mesh.coordinate(rank, "dp")

    def calls(step: int) -> list[dict[str, Tensor]]:  # this rank's samples of a step
        parts = [x.chunk(ranks)[place].to(device) for x in text.batch(step, args.batch).chunk(args.accumulate)]
        return [{"input_ids": x, "labels": x} for x in parts]

    config = MixtralConfig(
        vocab_size=256, hidden_size=args.hidden, intermediate_size=2 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=8, num_key_value_heads=4, num_local_experts=8, output_router_logits=True,
    )  # fmt: skip
    with torch.device("meta"):  # no rank ever holds the whole model
        model = MixtralForCausalLM(config)
    precision = foldcc.Precision(compute="bfloat16") if args.bfloat16 else None
    folded = foldcc.parallelize(model, mesh, example_inputs=calls(0)[0], zero=args.zero, precision=precision)
    foldcc.init_parameters(folded.to_empty(device=device), seed=0)  # the same on every fold

    optimizer = torch.optim.AdamW(folded.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup, decay, start = max(1, args.steps // 20), math.pi / args.steps, 0
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, 0.55 + 0.45 * math.cos(decay * i)))
    if args.out and (args.out / "latest").exists():
        found = foldcc.load(args.out, folded, optimizer)
        start = found["step"]
        rate.load_state_dict(found["rate"])

    flops, losses = folded.summary().flops_total * args.accumulate, []
    with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), disable=rank > 0) as progress:
        bar = progress.add_task("", total=args.steps, completed=start)
        for step in range(start, args.steps):
            begun, loss, parts = time.perf_counter(), torch.zeros((), device=device), calls(step)
            for i, part in enumerate(parts):  # gradients are reduced once, by the last one
                with folded.no_sync() if i + 1 < len(parts) else nullcontext():
                    mean = folded(**part).loss / len(parts)
                    mean.backward()
                loss += mean.detach()
            foldcc.clip_grad_norm_(folded.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds = time.perf_counter() - begun
            speed = f"{args.batch * args.length / seconds:,.0f} tokens/s  MFU {flops / seconds / args.peak / 1e12 / world:.1%}"
            progress.update(bar, completed=step + 1, description=f"loss {losses[-1]:.4f}  {speed}")
            if (step + 1) % args.every == 0:
                folded.eval()
                with torch.no_grad():
                    found = [folded(**part).loss.item() for part in calls(args.steps)]  # which no step trains on
                folded.train()
                progress.console.print(f"step {step + 1}: evaluation loss {sum(found) / len(found):.4f}")
                if args.out:
                    foldcc.save(args.out, folded, optimizer, step=step + 1, rate=rate.state_dict())
    return losses


if __name__ == "__main__":
    main(sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()
