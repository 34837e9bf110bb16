"""Processes stay warm from one job to the next, and nothing of a job but its modules stays with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import foldcc
from foldcc.ops.groups import active, create_groups, process_group
from foldcc.testing import end_processes, run_distributed

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    """Each test starts without processes."""
    end_processes()
    yield
    end_processes()


def process() -> int:
    return os.getpid()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_serve_the_next_call_of_any_size() -> None:
    four, two, again, six = (run_distributed(process, size) for size in (4, 2, 4, 6))
    assert len(set(four)) == 4 and two == four[:2] and again == four and six[:4] == four
    assert os.getpid() not in six


def test_fresh_processes_serve_one_call() -> None:
    warm = run_distributed(process, 2)
    fresh = run_distributed(process, 2, fresh=True)
    assert not set(warm) & set(fresh) and not any(map(alive, fresh))
    assert run_distributed(process, 2) == warm


def fail(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("no such thing")
    dist.barrier()


def exit_at_once(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def wait(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        (fail, RuntimeError, r"(?s)rank 1 of 2 failed:.*in fail\n.*KeyError: 'no such thing'"),
        (exit_at_once, RuntimeError, "rank 1 of 2 ended without a word|rank 0 of 2 failed:"),
        (wait, TimeoutError, "of 2 ranks, 1 did not finish within 3 s"),
    ],
    ids=["raises", "exits", "hangs"],
)
def test_after_a_failure_the_next_call_starts_afresh(job: object, error: type[Exception], message: str) -> None:
    before = run_distributed(process, 3)
    with pytest.raises(error, match=message):
        run_distributed(job, 2, 1, timeout=3)
    after = run_distributed(process, 3)
    assert not set(before[:2]) & set(after) and not any(map(alive, before[:2]))
    assert before[2] in after  # it had no part in it


def test_a_process_that_died_meanwhile_is_replaced() -> None:
    first, second = run_distributed(process, 2)
    os.kill(first, signal.SIGKILL)
    while alive(first):
        time.sleep(0.1)
    found = run_distributed(process, 2)
    assert second in found and first not in found


def unpicklable() -> object:
    return lambda: None


def test_a_result_that_cannot_travel_is_a_failure() -> None:
    with pytest.raises(RuntimeError, match="(?s)rank . of 2 failed:.*pickle"):
        run_distributed(unpicklable, 2)


def groups_at_start(more: int) -> int:
    """How many process groups there are, before some more are made."""
    found = len(dist.distributed_c10d._world.pg_map)
    for _ in range(more):
        dist.new_group(list(range(dist.get_world_size())))
    return found


def test_no_process_group_outlives_its_job() -> None:
    assert run_distributed(groups_at_start, 2, 5) == run_distributed(groups_at_start, 2, 0) == [1, 1]


def row_sums(x: Tensor, *, split: list[int] | None = None) -> Tensor:
    """Sums over a divided dim, by an operator on DTensors; groups that are made before take the next names."""
    for ranks in split or ():
        dist.new_group([ranks])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    divided = distribute_tensor(x, mesh, [Shard(0), Shard(1)])
    return divided.sum(1).full_tensor()


def row_sums_after_groups(x: Tensor) -> Tensor:
    return row_sums(x, split=[0, 1, 2, 3, 0])


def test_dtensors_of_a_job_use_its_own_groups() -> None:
    x = torch.arange(24.0).view(4, 6)
    for job in (row_sums, row_sums_after_groups, row_sums):
        assert all(torch.equal(found, x.sum(1)) for found in run_distributed(job, 4, x, timeout=30))


def uses_its_own_groups(text: str) -> bool:
    mesh = foldcc.FoldedMesh.parse(text, "cpu")
    create_groups(mesh, ["dp", "tp"])
    with active(mesh):
        return all(process_group(axis) in dist.distributed_c10d._world.pg_map for axis in ("dp", "tp"))


def test_a_folded_model_of_a_job_uses_its_own_groups() -> None:
    for _ in range(2):
        assert run_distributed(uses_its_own_groups, 4, "dp=2,tp=2") == [True] * 4


def random_number() -> float:
    return torch.rand(()).item()


def test_random_numbers_start_alike_in_every_job() -> None:
    assert len({*run_distributed(random_number, 2), *run_distributed(random_number, 2)}) == 1


def test_a_module_that_became_importable_later_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_distributed(process, 2)
    (tmp_path / "written_later.py").write_text("def answer():\n    return 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import written_later  # type: ignore[import-not-found]

    assert run_distributed(written_later.answer, 2) == [42, 42]


SCRIPT = """
import multiprocessing, os
from foldcc.testing import run_distributed

def process():
    global lock
    lock = multiprocessing.Lock()  # the system keeps it, if its process is killed
    print("running")
    return os.getpid()

if __name__ == "__main__":
    pids = run_distributed(process, 2)
    print("returned", *pids, flush=True)
    run_distributed(process, 1, fresh=True)
"""


def test_processes_end_with_the_interpreter_and_print_in_time(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONUNBUFFERED", None)  # a line that is written in two parts may be two processes' line
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert "leaked" not in done.stderr
    first, second, returned, pid, other, third = done.stdout.split()
    assert (first, second, returned, third) == ("running", "running", "returned", "running")
    assert not alive(int(pid)) and not alive(int(other))


def _folded(attention: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])
    folded = foldcc.parallelize(model, foldcc.init_folded_mesh("cpu", attention=attention), example_inputs=(torch.randn(4, 8),))
    folded(torch.randn(4, 8)).sum().backward()
    foldcc.clip_grad_norm_(folded.parameters(), 1.0)


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by Linux")
def test_groups_of_a_folded_model_go_with_it() -> None:
    counts = []
    for _ in range(3):
        run_distributed(_folded, 2, {"dp": 2})
        counts.append(run_distributed(_threads, 2))
    assert counts[1] == counts[2]  # each group has three threads
