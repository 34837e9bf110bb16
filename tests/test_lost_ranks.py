"""A rank that does not come, or that ends with an exception, is named by those that wait for it."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_model, token_batch
from torch import Tensor, nn

import foldcc
from foldcc.testing import run_distributed


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))).square().mean()


def impatient() -> set[timedelta]:
    """From now on, ranks wait for a second. Returns how long they would have waited."""
    groups = list(dist.distributed_c10d._world.pg_map)
    before = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    return before


def said(text: str, case: str, options: dict[str, Any]) -> str:
    """What a rank that waits in vain for the last one says."""
    mesh, store = foldcc.FoldedMesh.parse(text, "cpu"), dist.distributed_c10d._get_default_store()
    stages = mesh.size("pp") > 1
    plain, inputs = (tiny_model("llama"), token_batch(2)) if stages else (Layer(), {"x": torch.ones(4, 8)})
    model = foldcc.parallelize(plain, mesh, example_inputs=inputs, **options)

    def loss() -> Tensor:
        found: Tensor = model(**inputs).loss if stages else model(**inputs)
        return found

    loss().backward()
    backward = loss().backward if case == "backward" else None
    assert timedelta(seconds=100) in impatient()
    if dist.get_rank() == dist.get_world_size() - 1:
        if case == "raises":
            try:
                raise KeyError("no such sample")
            except KeyError:
                sys.excepthook(*sys.exc_info())
        store.wait(["all is said"])
        return ""
    try:
        backward() if backward is not None else loss()
    except foldcc.FoldError as error:
        return str(error)
    finally:
        store.set("all is said", "")
    return "nothing"


UNCHECKED = {"check_ranks": False}
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "exchange": ("tp=2", "hangs", {}, ("Rank 1 did not arrive at the exchange that begins a call.", "Timed out")),
    "collective": ("tp=2", "hangs", UNCHECKED, ("Rank 1 did not arrive at ", " over tp.", "at      second", "ranks   0, 1")),
    "stages": ("pp=2", "backward", UNCHECKED, ("Rank 1 did not arrive at what stage 0 receives from stage 1 over pp.",)),
    "raises": ("tp=2", "raises", {}, ("Rank 1 raised, and the exchange that begins a call", "KeyError: 'no such sample'")),
}


@pytest.mark.parametrize("case", CASES)
def test_who_does_not_come_is_named_and_what_waits(case: str) -> None:
    text, what, options, wanted = CASES[case]
    found, _ = run_distributed(said, 2, text, what, options, timeout=100)
    for line in wanted:
        assert line in found, found
