"""`python -m foldcc demo`: train a small Mixtral on eight processes, folded, next to the same model in one process.

Each process is a rank of `pp=2,cp=2,tp=2|ep=4` on gloo; the text is the standard library's own source, as bytes. It prints
which rank plays which part in attention and in the experts, the stages of compilation, the collectives of a step, and both
losses, step by step. Every stage's program is written to a folder as text.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import foldcc
from foldcc.errors import FoldError, divides
from foldcc.inspect.ranks import rank_table
from foldcc.mesh import FoldedMesh
from foldcc.testing import run_distributed

LEARNING_RATE, CLIP = 1e-3, 1.0
TIMEOUT = 3600.0  # seconds for everything, on a slow machine too


def main(arguments: Sequence[str]) -> None:
    """The command line; what cannot be folded is told on standard error, with exit code 2."""
    try:
        run(options(arguments))
    except FoldError as error:
        print(f"python -m foldcc: {error}", file=sys.stderr)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    """Shows the mesh, then starts a process for each of its ranks.

    Raises:
        FoldError: the mesh, the batch and the model do not fit together.
    """
    mesh = FoldedMesh.parse(args.mesh)
    parts = mesh.data_parallel * args.micro_batches
    over = " * ".join((*mesh.samples, "micro_batches"))
    divides("samples of a batch", args.batch, over, parts, mesh=mesh, valid=f"--batch: multiples of {parts}")
    quiet()
    count = sum(p.numel() for p in model().parameters())
    console = Console()
    console.print(f"Mixtral with {count / 1e6:.1f} M parameters on {mesh.world_size} processes, {mesh}", highlight=False)
    console.print("Where each rank stands in attention (left) and in the experts (right):\n")
    console.print(rank_table(mesh), highlight=False)
    console.print()
    refused = run_distributed(rank_main, mesh.world_size, args, timeout=TIMEOUT)[0]
    if refused is not None:
        raise refused


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m foldcc demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mesh", default="pp=2,cp=2,tp=2|ep=4", help="the folded mesh; a process for each rank")
    parser.add_argument("--micro-batches", type=int, default=2, help="into which each batch is cut")
    parser.add_argument("--schedule", default="1f1b", help="in which order pipeline stages work on them")
    parser.add_argument("--steps", type=int, default=12, help="training steps")
    parser.add_argument("--batch", type=int, default=8, help="samples of the whole batch")
    parser.add_argument("--length", type=int, default=64, help="bytes of a sample")
    parser.add_argument("--out", default="foldcc-demo", help="folder for the text of each stage")
    return parser.parse_args(arguments)


def model() -> torch.nn.Module:
    """An unmodified Mixtral with random weights, about 20 million parameters."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=320,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        output_router_logits=True,
        use_cache=False,
    )
    return MixtralForCausalLM(config)


def text(samples: int, length: int) -> torch.Tensor:
    """Bytes of the standard library's sources, [samples, length]."""
    data = b""
    for file in cycle(sorted(Path(os.__file__).parent.glob("*.py"))):
        data += file.read_bytes()
        if len(data) >= samples * length:
            break
    return torch.frombuffer(bytearray(data[: samples * length]), dtype=torch.uint8).long().view(samples, length)


def batches(args: argparse.Namespace) -> torch.Tensor:
    """One batch for each step, [steps, batch, length]."""
    return text(args.steps * args.batch, args.length).view(args.steps, args.batch, args.length)


def train(step_model: Any, data: torch.Tensor, clip: Callable[..., Any], report: Callable[[int], None]) -> list[float]:
    """AdamW steps, each reported before it starts; the loss of each.

    Args:
        data: [steps, parts, samples, length]; gradients of the parts of a step are accumulated.
    """
    optimizer = torch.optim.AdamW(step_model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step, parts in enumerate(data, 1):
        report(step)
        total = 0.0
        for ids in parts:
            loss = step_model(input_ids=ids, labels=ids).loss / len(parts)
            loss.backward()
            total += loss.item()
        clip(step_model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def rank_main(args: argparse.Namespace) -> FoldError | None:
    """What each process does. Only the first one prints; it also trains the model alone.

    Returns:
        Why the model cannot be folded, the same on all ranks; None if all went well.
    """
    quiet()
    rank = dist.get_rank()
    mesh = FoldedMesh.parse(args.mesh, device_type="cpu")
    data = batches(args)
    shares = data.unflatten(1, (mesh.data_parallel, -1))
    mine = shares[:, mesh.index(rank, mesh.samples)]
    micro_batches = torch.cat(shares.chunk(args.micro_batches, 2), 1).unflatten(1, (args.micro_batches, -1)).flatten(2, 3)
    console = Console(quiet=rank != 0, highlight=False)
    try:
        folded = compile_shown(console, mesh, {"input_ids": mine[0], "labels": mine[0]}, args)
    except FoldError as error:
        return error
    if rank == 0:
        show(console, folded, args)
    alone = reference(console, micro_batches) if rank == 0 else []
    dist.barrier()
    start = time.perf_counter()
    with console.status("training") as status:
        together = train(
            folded,
            mine[:, None],
            foldcc.clip_grad_norm_,
            lambda step: status.update(f"training, folded: step {step} of {len(data)}"),
        )
    seconds = time.perf_counter() - start
    if rank == 0:
        console.print(side_by_side(alone, together))
        console.print(f"{len(data)} folded steps on {mesh.world_size} processes: {seconds:.1f} s")
    return None


def compile_shown(
    console: Console, mesh: FoldedMesh, example: dict[str, torch.Tensor], args: argparse.Namespace
) -> foldcc.FoldedModule:
    """`parallelize`, with the stage that is at work on the screen."""
    start = time.perf_counter()
    with console.status("compiling") as status:
        folded = foldcc.parallelize(
            model(),
            mesh,
            example_inputs=example,
            micro_batches=args.micro_batches,
            schedule=args.schedule,
            progress=lambda stage: status.update(f"compiling: {stage}"),
        )
    console.print(f"Compiled in {time.perf_counter() - start:.1f} s, by every process.\n")
    return folded


def show(console: Console, folded: foldcc.FoldedModule, args: argparse.Namespace) -> None:
    """Prints what was compiled, and writes each stage to a file of a folder."""
    folder = Path(args.out)
    for told in (folded.stages, folded.collectives(), folded.summary()):
        console.print(f"{told}\n", markup=False, soft_wrap=True)  # a table is left to the terminal to wrap
    folder.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(folded.stages):
        (folder / f"{number}_{stage.name}.txt").write_text(f"{stage}\n")
    console.print(f"The program after each stage: {folder.resolve()}/\n", markup=False, soft_wrap=True)


def reference(console: Console, data: torch.Tensor) -> list[float]:
    """The losses of the same model on the same micro-batches, in one process."""
    with console.status("training") as status:
        return train(
            model(),
            data,
            torch.nn.utils.clip_grad_norm_,
            lambda step: status.update(f"training, in one process: step {step} of {len(data)}"),
        )


def side_by_side(alone: list[float], together: list[float]) -> Table:
    table = Table(title="loss")
    for name in ("step", "one process", "folded", "difference"):
        table.add_column(name, justify="right")
    for step, (a, b) in enumerate(zip(alone, together, strict=True), 1):
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{b - a:+.1e}")
    return table


def quiet() -> None:
    """Leaves the screen to the demo."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
