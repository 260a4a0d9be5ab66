"""Tasks done here or by worker processes: the same functions either way.

Processes, because HDF5 holds one lock per process. They are spawned, not forked (threads of the
libraries would not survive a fork), end when their parent ends however it ended, and leave
signals of the terminal to it. A task is a function of what all tasks of a stage share and of a job
of its own; its result may depend on nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, TypeVar

from scale.runtime import keep_freed_memory

_Shared = TypeVar("_Shared")
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

Report = Callable[[int], None]
"""Called by a task with the number of cells that it has done since it last did."""
Task = Callable[[_Shared, _Job, Report], _Result]


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    stage: int = -1
    """Number of the stage whose shared part it has."""
    job: int | None = None


class Workers:
    """A pool of up to ``num_workers`` processes; with one, tasks are done in this process."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._workers: list[_Worker] = []
        self._num_stages = 0
        if num_workers == 1:
            keep_freed_memory()

    def run(
        self,
        task: Task[_Shared, _Job, _Result],
        shared: _Shared,
        jobs: Sequence[_Job],
        report: Report,
    ) -> Iterator[tuple[int, _Result]]:
        """Do all jobs and yield the number of each with its result, as they are done.

        Parameters
        ----------
        task
            A function of a module.
        shared
            Its first argument, sent to each process once.
        jobs
            Its second arguments.
        report
            Called here with the cells that tasks have done.

        Raises
        ------
        ChildProcessError
            If a process dies. Errors of a task are raised here as they are.
        """
        if self.num_workers == 1 or len(jobs) <= 1:
            for number, job in enumerate(jobs):
                yield number, task(shared, job, report)
            return
        self._num_stages += 1
        content = pickle.dumps((task, shared))
        while len(self._workers) < min(self.num_workers, len(jobs)):
            self._workers.append(_start_worker())
        waiting = iter(range(len(jobs)))
        for worker in self._workers:
            self._assign(worker, next(waiting, None), jobs, content)
        while busy := {w.connection: w for w in self._workers if w.job is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]  # only connections are waited for
                kind, value = _receive(worker)
                if kind == "cells":
                    report(value)
                elif kind == "error":
                    raise value
                else:
                    assert worker.job is not None
                    number = worker.job
                    self._assign(worker, next(waiting, None), jobs, content)
                    yield number, value

    def _assign(
        self, worker: _Worker, number: int | None, jobs: Sequence[Any], content: bytes
    ) -> None:
        worker.job = number
        if number is None:
            return
        is_new = worker.stage != self._num_stages
        worker.stage = self._num_stages
        try:
            worker.connection.send((content if is_new else None, jobs[number]))
        except BrokenPipeError:
            _receive(worker)

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _start_worker() -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _receive(worker: _Worker) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = worker.connection.recv()
    except (EOFError, ConnectionResetError) as error:
        worker.process.join()
        status = worker.process.exitcode or 0
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        if -status == signal.SIGKILL:
            hint = "perhaps for want of memory: give fewer num_workers or less memory_bytes"
        else:
            hint = "what it wrote says why; a script that is run needs `if __name__ == '__main__'`"
        raise ChildProcessError(f"a worker process was ended {how}; {hint}") from error
    return message


# --- in a worker --------------------------------------------------------------------------------


def _work(connection: Connection) -> None:
    """Do jobs until the parent closes the connection, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):
        _answer(connection)


def _answer(connection: Connection) -> None:
    task: Any = None
    shared: Any = None

    def report(cells: int) -> None:
        connection.send(("cells", cells))

    while True:
        content, job = connection.recv()
        try:
            if content is not None:
                task, shared = pickle.loads(content)
            answer = ("done", task(shared, job, report))
        except Exception as error:  # noqa: BLE001  it is raised again in the parent
            error.add_note(traceback.format_exc())
            answer = ("error", error)
        connection.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
