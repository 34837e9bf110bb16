"""How fast the emitted kernels are on one GPU, against what the GPU can do and against other implementations.

    python benchmarks/kernels.py [--out benchmarks/results/kernels.json] [--parts peak kernels moe step]

peak      a bfloat16 product of two 8192 x 8192 matrices, and a copy of 1 GiB: what the other parts are compared with
kernels   each kernel of a training step of a one-layer model, called with the arguments of that step
moe       a router and experts: forward, and forward and backward, of the standard shapes
step      a training step, AdamW included, of models with a few layers

Contenders take turns in one process, and who goes first alternates; times are medians, ratios are medians of the ratios of
turns. What is not installed or does not fit into memory is left out, with a note. FLOPs of experts are 6 T H I K forward
and 18 T H I K forward and backward.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import foldcc
from foldcc.errors import FoldError
from foldcc.tables import table
from foldcc.tools import moe_layer
from foldcc.tools.moe_layer import Moe, Shifted, folded_experts, gated, random_weights
from foldcc.tools.standard_models import standard_model
from foldcc.tools.timing import on_device

SHAPES = {**moe_layer.SHAPES, "Mixtral-8x22B": (6144, 16_384, 8, 2), "gpt-oss-120b": (2880, 2880, 128, 4)}  # H, I, E, K
TOKENS = (8192, 32_768)
STEPS = {"Qwen3-30B-A3B": 4, "Mixtral-8x7B": 2}  # layers
CONTENDERS = ("Transformers, compiled", "Liger", "ScatterMoE", "SonicMoE", "MegaBlocks")  # beside foldcc and torch._grouped_mm
PARTS = ("peak", "kernels", "moe", "step")
DEVICE, DTYPE = "cuda", torch.bfloat16

Contenders = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to measure; peak is always measured")
    parser.add_argument("--models", nargs="+", choices=SHAPES, help="of the moe part; all by default")
    parser.add_argument("--without", nargs="+", choices=CONTENDERS, default=(), help="contenders of the moe part to leave out")
    parser.add_argument("--turns", type=int, default=20, help="timed turns of each contender, after 3 that are not timed")
    parser.add_argument("--out", help="where to write the result")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        error = FoldError("There is no CUDA device here, and emitted kernels are timed on one.", torch=torch.__version__)
        print(f"benchmarks/kernels.py: {error}", file=sys.stderr)
        sys.exit(2)
    torch.manual_seed(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    result: dict[str, Any] = {**machine(), "peak": peak(options.turns), "notes": []}
    shown(" ".join(f"{name}={x:.0f}" if isinstance(x, float) else f"{name}={x}" for name, x in flat(result)))
    if "kernels" in options.parts:
        result["kernels"] = {name: kernels(name, result["peak"], options.turns) for name in STEPS}
    if "moe" in options.parts:
        names = options.models or SHAPES
        places = [(name, tokens, result, options.turns, options.without) for name in names for tokens in TOKENS]
        result["moe"] = [row for place in places for row in moe(*place)]
    if "step" in options.parts:
        result["step"] = [row for name, layers in STEPS.items() for row in step(name, layers, result, options.turns)]
    for note in dict.fromkeys(result["notes"]):
        print(f"note: {note}")
    if options.out:
        with open(options.out, "w") as file:
            json.dump(result, file, indent=1)
    dist.destroy_process_group()


# --- the machine ---


def machine() -> dict[str, Any]:
    others = {
        name: version(name) for name in ("triton", "transformers", "liger-kernel", "scattermoe", "sonic-moe", "megablocks")
    }
    versions = {"foldcc": foldcc.__version__, "torch": torch.__version__, "cuda": torch.version.cuda, **others}
    return {"date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(), "versions": versions}


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def peak(turns: int) -> dict[str, float]:
    """What this GPU does at best, measured in this run: `tflops`, and `gbs` of reading and writing."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
    x, y = (torch.empty(2**30, device=DEVICE, dtype=torch.uint8) for _ in range(2))
    times = medians({"product": lambda: torch.mm(a, b), "copy": lambda: y.copy_(x)}, turns)
    return {"tflops": 2 * 8192**3 / times["product"] / 1e12, "gbs": 2 * x.numel() / times["copy"] / 1e9}


# --- timing ---


def turns_of(contenders: Contenders, turns: int) -> dict[str, list[float]]:
    """Seconds of each turn of each contender."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(turns + 3):
        for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
            torch.cuda.synchronize()
            start.record()
            contenders[name]()
            end.record()
            end.synchronize()
            if turn >= 3:
                seconds[name].append(start.elapsed_time(end) / 1e3)
    return seconds


def medians(contenders: Contenders, turns: int) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in turns_of(contenders, turns).items()}


def compared(contenders: Contenders, turns: int, notes: list[str]) -> Iterator[tuple[str, float, float]]:
    """Name, median seconds, and the time of foldcc as a part of it, of each contender that runs."""
    for name in list(contenders):
        try:
            contenders[name]()
            torch.cuda.synchronize()
        except Exception as error:  # another project's, or memory that does not suffice
            del contenders[name]
            notes.append(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    seconds = turns_of(contenders, turns)
    ours = seconds.get("foldcc")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(ours, times, strict=True)) if ours else float("nan")
        yield name, statistics.median(times), ratio


# --- each kernel ---


def kernels(name: str, best: dict[str, float], turns: int) -> list[dict[str, Any]]:
    """Each kernel of a training step of one layer, timed where the step calls it, behind a wait that hides its launch."""
    ids = torch.randint(1000, (1, TOKENS[0]), device=DEVICE)
    batch = {"input_ids": ids, "labels": ids}
    model = Loss(standard_model(name, 1, DEVICE))
    plain = foldcc.parallelize(model, mesh(), example_inputs=batch, kernels="triton", verify=False)
    seconds: dict[str, float] = {}
    timed = ModuleType("timed")
    for kernel in plain.kernels.values():
        launcher = getattr(foldcc.load_kernels(kernel.path), kernel.name)
        setattr(timed, kernel.name, timing(launcher, kernel.name, seconds, turns))
    foldcc.parallelize(model, mesh(), example_inputs=batch, kernels=timed, verify=False)(**batch).backward()
    rows = []
    for kernel in plain.kernels.values():
        if kernel.name in seconds:
            spent = seconds[kernel.name]
            moved, flops = (float(x.subs(dict.fromkeys(x.free_symbols, TOKENS[0]))) for x in (kernel.moved, kernel.flops))
            product = kernel.kind.startswith("grouped")
            share = flops / spent / best["tflops"] / 1e12 if product else moved / spent / best["gbs"] / 1e9
            rates = {"gbs": moved / spent / 1e9, "tflops": flops / spent / 1e12, "share_of_peak": share}
            rows.append({"kernel": kernel.name, "kind": kernel.kind, "microseconds": 1e6 * spent, **rates})
    shown(f"\nkernels of one layer of {name}, {TOKENS[0]} tokens; grouped products as a share of peak TFLOP/s, others of GB/s")
    shown(rows)
    return rows


class Loss(nn.Module):
    """A model that returns its loss alone, so that its program has the one backward pass that runs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, labels=labels).loss


def timing(launcher: Callable[..., Any], name: str, seconds: dict[str, float], turns: int) -> Callable[..., Any]:
    """A launcher that is timed when it is first called."""

    @functools.wraps(launcher)
    def timed(*arguments: Any) -> Any:
        if name not in seconds:
            seconds[name] = on_device(lambda: launcher(*arguments), turns)
        return launcher(*arguments)

    return timed


# --- a router and its experts ---


def torch_experts(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Experts in PyTorch's own operators: sort, gather, two grouped products, and back."""
    order = ids.flatten().argsort(stable=True)
    counts = torch.zeros(up.shape[0], dtype=torch.int32, device=x.device)
    ends = counts.index_add(0, ids.flatten(), torch.ones_like(order, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
    rows = x[order // ids.shape[1]]
    hidden = gated(torch._grouped_mm(rows, up.transpose(1, 2), offs=ends))
    back = torch._grouped_mm(hidden, down.transpose(1, 2), offs=ends)[order.argsort()]
    return (back.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)


def moe(name: str, tokens: int, result: dict[str, Any], turns: int, without: Collection[str] = ()) -> list[dict[str, Any]]:
    hidden, width, experts, chosen = SHAPES[name]
    x = torch.randn(1, tokens, hidden, device=DEVICE, dtype=DTYPE)
    grad = torch.randn_like(x)
    layers = moe_layers(hidden, width, experts, chosen, x, result["notes"], without)
    check_same(layers, x)
    rows = []
    for passes, factor in (("forward", 6), ("forward and backward", 18)):
        flops = factor * tokens * hidden * width * chosen
        calls = {n: once(layer, x, grad if factor == 18 else None) for n, layer in layers.items()}
        for contender, spent, ratio in compared(calls, turns, result["notes"]):
            rate = flops / spent / 1e12
            share = {"tflops": rate, "share_of_peak": rate / result["peak"]["tflops"], "foldcc_takes": ratio}
            what = {"model": name, "tokens": tokens, "passes": passes, "contender": contender}
            rows.append({**what, "milliseconds": 1e3 * spent, **share})
    shown(f"\nexperts of {name}, {tokens} tokens")
    shown(rows)
    layers.clear()
    torch.cuda.empty_cache()
    return rows


def check_same(layers: dict[str, nn.Module], x: Tensor) -> None:
    """The contenders with the same weights compute the same."""
    wanted = layers["torch._grouped_mm"](x=x).float()
    for name in ("foldcc", "Transformers, compiled"):
        error = (layers[name](x=x).float() - wanted).norm() / wanted.norm() if name in layers else 0
        if not error <= 1e-2:
            raise RuntimeError(f"{name} and torch._grouped_mm differ by {error:.1e} of the result")


def once(layer: nn.Module, x: Tensor, grad: Tensor | None) -> Callable[[], None]:
    """One call as in training: forward keeps what backward needs."""

    def call() -> None:
        y = layer(x=x)
        if grad is not None:
            y.backward(grad)
            layer.zero_grad(set_to_none=True)

    return call


def moe_layers(
    hidden: int, width: int, experts: int, chosen: int, x: Tensor, notes: list[str], without: Collection[str]
) -> dict[str, nn.Module]:
    """The contenders. They share one set of weights, except for foldcc, which copies it, and libraries with their own."""

    gate, up, down = random_weights(hidden, width, experts, DEVICE, DTYPE)

    def layer(run: Callable[..., Tensor]) -> nn.Module:
        return Shifted(Moe(gate, up, down, chosen, run), hidden)

    def transformers_block() -> nn.Module:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        sizes = {"hidden_size": hidden, "moe_intermediate_size": width, "num_experts": experts, "num_experts_per_tok": chosen}
        with torch.device("meta"):
            block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**sizes, norm_topk_prob=True, experts_implementation="grouped_mm"))
        block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj = gate, up, down
        return torch.compile(Shifted(block, hidden))  # type: ignore[return-value]

    def liger() -> nn.Module:
        function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
        return layer(lambda t, ids, weights, up, down: function.apply(t, up, down, ids, weights))

    def scattermoe() -> nn.Module:
        mlp = importlib.import_module("scattermoe.mlp").GLUMLP(hidden, width, experts, chosen).to(DEVICE, DTYPE)
        found = layer(lambda t, ids, weights, up, down: mlp(t, weights, ids))
        found.mlp = mlp  # its weights are parameters of the layer
        return found

    def sonicmoe() -> nn.Module:
        library, enums = importlib.import_module("sonicmoe"), importlib.import_module("sonicmoe.enums")
        options = {"activation_function": enums.ActivationType.SWIGLU, "add_bias": False, "std": 0.02}
        sizes = {"num_experts": experts, "num_experts_per_tok": chosen, "hidden_size": hidden, "intermediate_size": width}
        return Shifted(library.MoE(**sizes, **options).to(DEVICE, DTYPE), hidden)

    def megablocks() -> nn.Module:
        arguments, dmoe = (importlib.import_module(f"megablocks.layers.{part}") for part in ("arguments", "dmoe"))
        sizes = {"hidden_size": hidden, "ffn_hidden_size": width, "moe_num_experts": experts, "moe_top_k": chosen}
        kind = {"mlp_type": "glu", "mlp_impl": "grouped", "activation_fn": F.silu, "bias": False, "return_bias": False}
        given = arguments.Arguments(**sizes, **kind, fp16=False, bf16=True, moe_loss_weight=0.0, device=torch.device(DEVICE))
        return Shifted(dmoe.dMoE(given).to(DEVICE, DTYPE), hidden)

    def ours() -> nn.Module:
        return foldcc.parallelize(layer(folded_experts), mesh(), example_inputs={"x": x}, kernels="triton", verify=False)

    builders = {
        "foldcc": ours,
        "torch._grouped_mm": lambda: layer(torch_experts),
        "Transformers, compiled": transformers_block,
        "Liger": liger,
        "ScatterMoE": scattermoe,
        "SonicMoE": sonicmoe,
        "MegaBlocks": megablocks,
    }
    found = {}
    for name, build in builders.items():
        if name in without:
            notes.append(f"{name} is left out, as was asked")
            continue
        try:
            found[name] = build()
        except ImportError as error:
            notes.append(f"{name} is left out: {error}")
        except torch.OutOfMemoryError:
            notes.append(f"{name} is left out: memory does not suffice for {experts} experts of {hidden} x {width}")
    return found


# --- a training step ---


def step(name: str, layers: int, result: dict[str, Any], turns: int) -> list[dict[str, Any]]:
    """Forward, backward and AdamW. The Transformers model is the same one, eager and compiled."""
    ids = torch.randint(1000, (2, TOKENS[0] // 2), device=DEVICE)
    batch = {"input_ids": ids, "labels": ids}
    model = standard_model(name, layers, DEVICE).train()
    folded = foldcc.parallelize(model, mesh(), example_inputs=batch, kernels="triton", verify=False)
    optimizers = {id(m): torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for m in (model, folded)}

    def training(call: Callable[..., Any], held: nn.Module) -> Callable[[], None]:
        def once() -> None:
            call(**batch).loss.backward()
            optimizers[id(held)].step()
            optimizers[id(held)].zero_grad(set_to_none=True)

        return once

    compiled = torch.compile(model)
    sides = {"foldcc": (folded, folded), "Transformers": (model, model), "Transformers, compiled": (compiled, model)}
    rows = []
    for contender, spent, ratio in compared({n: training(*s) for n, s in sides.items()}, turns, result["notes"]):
        what = {"model": name, "layers": layers, "tokens": ids.numel(), "contender": contender}
        rows.append({**what, "milliseconds": 1e3 * spent, "foldcc_takes": ratio})
    shown(f"\na training step of {layers} layers of {name}, {ids.numel()} tokens")
    shown(rows)
    torch.cuda.empty_cache()
    return rows


def mesh() -> foldcc.FoldedMesh:
    return foldcc.init_folded_mesh(DEVICE, attention={})


# --- what is printed ---


def shown(what: str | list[dict[str, Any]]) -> None:
    if isinstance(what, list) and what:
        rows = [[f"{x:,.2f}" if isinstance(x, float) else str(x) for x in row.values()] for row in what]
        numbers = [i for i, x in enumerate(what[0].values()) if not isinstance(x, str)]
        what = table(list(what[0]), rows, right=numbers)
    print(what or "nothing to show", flush=True)


def flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, x in values.items():
        if isinstance(x, dict):
            yield from flat(x)
        elif x not in (None, []):
            yield name, x


if __name__ == "__main__":
    main()
