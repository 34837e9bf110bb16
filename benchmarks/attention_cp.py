"""One causal attention layer whose sequence is divided over 4 gloo processes: each way that there is, what it takes and sends.

    python benchmarks/attention_cp.py [--lengths 4096 16384] [--steps 3] [--json benchmarks/results/attention_cp.json]

A step is forward and backward of the two projections and the attention between them, in float32, of one sample; the time is
the median over the steps of the slowest rank, after a step that is not timed. The bytes are those that the program says that
one rank sends in a step, gradients of weights aside. `halo` is with a window, and so is `gathered` beside it; all others see
every key before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

RANKS = 4
WAYS = (
    ("gathered", "natural", False),
    ("gathered", "zigzag", False),
    ("ring", "natural", False),
    ("ring", "zigzag", False),
    ("ulysses", "natural", False),
    ("gathered", "natural", True),
    ("halo", "natural", True),
)


class Attention(nn.Module):
    """Queries, keys and values of one projection, and one behind the attention."""

    def __init__(self, heads: int, width: int, window: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.window = heads, window
        self.qkv, self.out = nn.Linear(heads * width, 3 * heads * width), nn.Linear(heads * width, heads * width)

    def forward(self, x: Tensor) -> Tensor:
        from foldcc import ops

        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = ops.attention(q, k, v, None, None, q.shape[-1] ** -0.5, True, self.window)
        return (x + self.out(y.flatten(2))).square().mean()


def main() -> None:
    from foldcc.testing import run_distributed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], help="positions of the whole sequence")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=16, help="of a head")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--json", help="where to write the result")
    options = parser.parse_args()
    rows = run_distributed(_measure, RANKS, vars(options), timeout=1800)[0]
    print(f"{'length':>7} {'way':<9} {'order':<8} {'window':>6} {'seconds':>9} {'MB sent':>8}")
    for row in rows:
        print(
            f"{row['length']:>7} {row['way']:<9} {row['order']:<8} {row['window'] or '':>6} "
            f"{statistics.median(row['seconds']):>9.3f} {row['bytes'] / 1e6:>8.2f}"
        )
    if options.json:
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}",
            "torch": torch.__version__,
            "options": vars(options),
            "rows": rows,
        }
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


def _measure(options: dict[str, Any]) -> list[dict[str, Any]]:
    """What each way takes and sends, at each length."""
    import foldcc

    warnings.filterwarnings("ignore")
    mesh, rows = foldcc.FoldedMesh.parse(f"cp={RANKS}", device_type="cpu"), []
    for length in options["lengths"]:
        x = torch.randn(1, length, options["heads"] * options["width"], generator=torch.Generator().manual_seed(0))
        for way, order, windowed in WAYS:
            window = options["window"] if windowed else 0
            plain = Attention(options["heads"], options["width"], window)
            model = foldcc.parallelize(plain, mesh, example_inputs=(x,), attention=way, order=order, verify=False)
            seconds = []
            for _ in range(options["steps"] + 1):
                dist.barrier()
                start = time.perf_counter()
                model(x).backward()
                dist.barrier()
                seconds.append(time.perf_counter() - start)
            sent = sum(c.bytes for c in model.collectives() if c.operator != "all_reduce")
            told = {"length": length, "way": way, "order": order, "window": window}
            rows.append({**told, "seconds": seconds[1:], "bytes": sent})
    return rows


if __name__ == "__main__":
    main()
