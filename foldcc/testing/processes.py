"""Running a function on real processes that are connected by gloo, and stay warm for the next one."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

# What every process needs is imported once, by the server that the processes are forked from. What is not installed is
# left out.
_PRELOADED = ["foldcc.api", "torch.distributed.tensor.debug", "torch.distributed.checkpoint", "transformers.modeling_utils"]
_GRACE = 5.0  # seconds for a process to end by itself


class _Worker(NamedTuple):
    process: Any
    end: Connection

    def stop(self) -> None:
        self.process.kill()
        self.end.close()
        self.process.join()


_idle: list[_Worker] = []
os.register_at_fork(after_in_child=_idle.clear)  # they are the parent's


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, fresh: bool = False
) -> list[Any]:
    """Calls `fn(*args)` in each of `world_size` processes, with torch.distributed initialised on gloo.

    Processes stay for later calls, of any world size, and end with the interpreter or with `end_processes()`. Each call
    gets process groups of its own, random numbers from seed 0, and this process's import path. Everything else lasts: what
    a module keeps, environment variables, defaults such as the dtype, and a module's code although its file has changed.
    A process in which `fn` raised, or that had to be stopped, is not used again, and neither are those of the same call.

    Args:
        fn: a function at the top level of a module, which the processes import.
        args: anything that can be pickled, and so is `fn`'s result; tensors travel by value.
        timeout: seconds for everything, starting the processes included.
        fresh: new processes that serve this call only, for an `fn` that changes what lasts.

    Each process has one thread.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RuntimeError: a rank failed; the message holds its traceback. The other ranks are ended at once.
        TimeoutError: some ranks were still running after `timeout`.
    """
    deadline = time.monotonic() + timeout
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = pickle.dumps((fn, args))
    workers: list[_Worker] = []
    kept = False
    try:
        for rank in range(world_size):
            workers.append(_start() if fresh else _take() or _start())
            workers[rank].end.send((sys.path, job, rank, world_size, store.port, timeout))
        ends = [worker.end for worker in workers]
        results = [pickle.loads(result) for result in _collect(ends, deadline, timeout)]
        for end in ends:
            end.send(None)
        _collect(ends, deadline, timeout)
        kept = True
    finally:
        if not kept:
            for worker in workers:
                worker.stop()
    if fresh:
        _end(workers)
    else:
        _idle.extend(reversed(workers))  # the next call takes them from the end, and what is warmest first
    return results


@atexit.register
def end_processes() -> None:
    """Ends the processes that wait for the next `run_distributed`."""
    _end(_idle)
    _idle.clear()


def _end(workers: list[_Worker]) -> None:
    """Hangs up, so that the processes end by themselves and clean up after themselves."""
    for worker in workers:
        worker.end.close()
    for worker in workers:
        worker.process.join(_GRACE)
        worker.stop()


def _take() -> _Worker | None:
    """A process that waits for something to do; one that died meanwhile is cleared away."""
    while _idle:
        worker = _idle.pop()
        if worker.process.is_alive():
            return worker
        worker.stop()
    return None


def _start() -> _Worker:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _collect(ends: list[Connection], deadline: float, timeout: float) -> list[Any]:
    """Waits for the word of every rank."""
    found: dict[Any, Any] = {}
    while waiting := [end for end in ends if end not in found]:
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            ranks = ", ".join(str(ends.index(end)) for end in waiting)
            raise TimeoutError(f"of {len(ends)} ranks, {ranks} did not finish within {timeout:g} s")
        for end in (end for end in waiting if end in ready):
            rank = f"rank {ends.index(end)} of {len(ends)}"
            try:
                failed, found[end] = end.recv()
            except (EOFError, ConnectionError):
                raise RuntimeError(f"{rank} ended without a word") from None
            if failed:
                raise RuntimeError(f"{rank} failed:\n{found[end]}")
    return [found[end] for end in ends]


def _serve(end: Connection) -> None:
    """What a process does: one job after the other, until the caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the caller's, which stops its processes
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that resolves to nothing is common in containers
    try:
        while True:
            job = end.recv()
            try:
                result = _run(*job)
            except BaseException:  # whatever it is, the caller raises it; a CheckpointException is no Exception
                end.send((True, traceback.format_exc()))
                end.recv()  # until it ends this process: one that left would make others fail, and who was first?
            end.send((False, result))
            end.recv()  # until all ranks are through: one that left would close connections that others still read
            _forget()
            end.send((False, None))
    except (EOFError, ConnectionError):
        return


def _run(path: list[str], job: bytes, rank: int, world_size: int, port: int, timeout: float) -> bytes:
    sys.path[:] = path
    torch.manual_seed(0)
    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    fn, args = pickle.loads(job)
    try:
        return pickle.dumps(fn(*args))
    finally:
        sys.stdout.flush()  # what is printed stands before what the caller prints next


def _forget() -> None:
    """Leaves the job's process groups, and clears what torch keeps of them under names that the next job uses again."""
    if dist.is_initialized():
        dist.destroy_process_group()
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()  # it holds the meshes of DTensors
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled code holds names of groups
    gc.collect()  # a folded model is in a circle, and each of its process groups has threads
