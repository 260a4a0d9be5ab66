"""Worlds of several ranks on gloo inside a test: ``run_ranks(function, 2, tmp_path, ...)``.

Ranks are processes of a fork server that has loaded torch and Megatron once (about 5 s per run of
pytest; a case then takes about a second). They meet through a ``file://`` store, never a port. A
function is named by its module, takes a :class:`RankContext` first, and returns what can be sent
through a queue: numbers, text, NumPy arrays.
"""

import multiprocessing
import queue
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from scale.config import ParallelConfig
from scale.runtime import World

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "scale.tasks.training", "scale.tasks.pretrain", "pytest"])


@dataclass(frozen=True)
class RankContext:
    """This rank among how many, and where they meet."""

    rank: int
    size: int
    rendezvous: str

    @property
    def world(self) -> World:
        return World(self.rank, self.size, self.rank)

    @contextmanager
    def layout(self, *, tensor_size: int = 1, timeout_seconds: float = 60.0, **settings: Any):
        """Start the process groups for a ``with`` block and yield the Layout."""
        from scale.train import parallel

        config = ParallelConfig(
            tensor_model_parallel_size=tensor_size, timeout_seconds=timeout_seconds, **settings
        )
        layout = parallel.start(
            config, self.world, seed=7, device=torch.device("cpu"), rendezvous=self.rendezvous
        )
        try:
            yield layout
        finally:
            parallel.stop()


def _run(function: Callable[..., Any], context: RankContext, results: Any, args: Any) -> None:
    torch.set_num_threads(1)
    try:
        results.put((context.rank, None, function(context, *args)))
    except BaseException:  # noqa: BLE001 - the parent reports it
        results.put((context.rank, traceback.format_exc(), None))


def run_ranks(
    function: Callable[..., Any], size: int, folder: Path, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Return ``[function(context, *args) of rank 0, of rank 1, ...]``.

    Raises AssertionError with the traceback of every rank that failed, and after ``timeout``
    seconds; the ranks are ended in any case.
    """
    meeting = folder / f"ranks-{time.monotonic_ns()}"
    results = _CONTEXT.Queue()
    processes = []
    for rank in range(size):
        context = RankContext(rank, size, f"file://{meeting}")
        process = _CONTEXT.Process(target=_run, args=(function, context, results, args))
        process.start()
        processes.append(process)
    answers: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(answers) + len(failures) < size and time.monotonic() < deadline:
            try:
                rank, failure, answer = results.get(timeout=0.2)
            except queue.Empty:
                if failures and all(not p.is_alive() for p in processes):
                    break
                continue
            if failure is None:
                answers[rank] = answer
            else:
                failures[rank] = failure
                # The others may wait in a collective for ever: do not wait with them.
                deadline = min(deadline, time.monotonic() + 3.0)
    finally:
        for process in processes:
            process.join(timeout=0.5 if failures else 10.0)
            if process.is_alive():
                process.kill()
                process.join()
        results.close()
    if failures:
        text = "\n".join(f"--- rank {rank}\n{failure}" for rank, failure in failures.items())
        raise AssertionError(text)
    assert len(answers) == size, f"only ranks {sorted(answers)} of {size} answered in {timeout} s"
    return [answers[rank] for rank in range(size)]


def start_process(function: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Start a process of the fork server; whoever asked for it ends it."""
    process = _CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def save_weights(folder: Path, engine: Any) -> None:
    """Write the tensors of an engine as a checkpoint holds them; a collective of all ranks."""
    import torch.distributed as dist

    from scale.train.sharded import sharded_state
    from scale.train.shards import ShardWriter

    shards = ShardWriter(sharded_state(engine, is_loading=False), folder, in_memory=False)
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, shards.write())
    if dist.get_rank() == 0:
        shards.complete(results)
    dist.barrier()
