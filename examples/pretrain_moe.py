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
import torch.distributed.checkpoint as checkpoint
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import MixtralConfig, MixtralForCausalLM

import foldcc


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="dp=2,tp=2|ep=4")
    parser.add_argument("--zero", type=int, default=0, help="1 to 3 divide what ranks would hold twice")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of products")
    parser.add_argument("--data", type=Path, default=Path(os.__file__).parent, help="a folder of text, read as bytes")
    parser.add_argument("--out", type=Path, help="of checkpoints; the last one that is there is gone on from")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32, help="samples of a step, over all ranks")
    parser.add_argument("--accumulate", type=int, default=1, help="calls that a step is made of")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations, and between checkpoints")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of a device, for the share that is used (MFU)")
    return parser.parse_args(arguments)


class Text:
    """Random pieces of all bytes. What a step sees depends on its number alone, so that there is no position to store."""

    def __init__(self, folder: Path, length: int):
        whole = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        self.tokens, self.length = torch.frombuffer(bytearray(whole), dtype=torch.uint8), length

    def batch(self, step: int, samples: int) -> Tensor:
        random = torch.Generator().manual_seed(step)
        starts = torch.randint(len(self.tokens) - self.length, (samples, 1), generator=random)
        return self.tokens[starts + torch.arange(self.length)].long()


def main(arguments: list[str]) -> list[float]:
    args = options(arguments)
    launched = "RANK" in os.environ
    device = "virtual" if not launched else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = foldcc.FoldedMesh.parse(args.mesh, device)
    first = not launched or dist.get_rank() == 0
    text, ranks = Text(args.data, args.length), mesh.size("dp") if launched else 1
    place = mesh.coordinate(dist.get_rank(), "dp") if launched else 0

    def calls(step: int) -> list[dict[str, Tensor]]:  # this rank's samples of a step
        ids = text.batch(step, args.batch).chunk(args.accumulate)
        mine = [x.chunk(ranks)[place].to("cpu" if device == "virtual" else device) for x in ids]
        return [{"input_ids": x, "labels": x} for x in mine]

    config = MixtralConfig(
        vocab_size=256, hidden_size=args.hidden, intermediate_size=2 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=8, num_key_value_heads=4, num_local_experts=args.experts, output_router_logits=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device("meta"):  # no rank ever holds the whole model
        model = MixtralForCausalLM(config)
    precision = foldcc.Precision(compute="bfloat16") if args.precision == "bfloat16" else None
    folded = foldcc.parallelize(model, mesh, example_inputs=calls(0)[0], zero=args.zero, precision=precision)
    folded.to_empty(device="cpu" if device == "virtual" else device)
    foldcc.init_parameters(folded, seed=0)  # the same on every fold

    optimizer = torch.optim.AdamW(folded.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * i / args.steps))
    )

    def state() -> dict[str, object]:
        return {"model": folded.state_dict(), "optimizer": get_optimizer_state_dict(folded, optimizer)}

    start = max((int(p.name) for p in args.out.glob("[0-9]*") if (p / ".metadata").exists()), default=0) if args.out else 0
    if start:
        stored = state()
        checkpoint.load(stored, checkpoint_id=args.out / str(start))
        folded.load_state_dict(stored["model"])
        set_optimizer_state_dict(folded, optimizer, optim_state_dict=stored["optimizer"])
        schedule.last_epoch = start

    flops, losses = folded.summary().flops_total * args.accumulate, []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not first) as progress:
        bar = progress.add_task("", total=args.steps, completed=start)
        for step in range(start, args.steps):
            begun, total, parts = time.perf_counter(), 0.0, calls(step)
            for i, part in enumerate(parts):  # gradients are reduced once, by the last one
                with folded.no_sync() if i + 1 < len(parts) else nullcontext():
                    loss = folded(**part).loss / len(parts)
                    loss.backward()
                total += loss.item()
            foldcc.clip_grad_norm_(folded.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(total)
            seconds = time.perf_counter() - begun
            used = flops / seconds / (args.peak * 1e12 * (mesh.world_size if launched else 1))
            speed = f"{args.batch * args.length / seconds:,.0f} tokens/s  MFU {used:.1%}"
            progress.update(bar, completed=step + 1, description=f"loss {total:.4f}  {speed}")
            if (step + 1) % args.every == 0 or step + 1 == args.steps:
                folded.eval()
                with torch.no_grad():  # pieces that no step trains on
                    found = [folded(**part).loss.item() for part in calls(-1 - step % 2)]
                folded.train()
                progress.console.print(f"step {step + 1}: evaluation loss {sum(found) / len(found):.4f}")
                if args.out:
                    checkpoint.save(state(), checkpoint_id=args.out / str(step + 1))
    return losses


if __name__ == "__main__":
    main(sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()
