"""A reader in a process of its own, asked for cells round by round through its pipes.

Used by both sides of data.py, so that both are timed by the same lines; standard library only. CPU
time is that of the process with all of its threads and of children it waited for; what comes before
the first request (imports, opening) is in none of the figures.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import ONE_THREAD


def cpu_seconds() -> float:
    """Return the CPU time of this process, its threads and the children it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_mib() -> float:
    """Return the largest resident size of this process so far (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def read_mib() -> float:
    """Return what this process has had read from disk so far (Linux)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("/proc/self/io has no read_bytes")


def serve(
    read: Callable[[int], int], facts: Callable[[], dict[str, float]], forget: Callable[[], None]
) -> None:
    """Answer requests on standard input until it ends.

    Parameters
    ----------
    read
        Reads so many sets and returns how many wanted cells they held.
    facts
        What can be said of the cells that were read last and of the reader; never timed.
    forget
        Drops rows that the reader kept from rounds before; never timed.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        num_sets = int(line)
        forget()
        mib, cpu, wall = read_mib(), cpu_seconds(), time.perf_counter()
        num_cells = read(num_sets) if num_sets else 0
        answer = {
            "cells": num_cells,
            "wall": time.perf_counter() - wall,
            "cpu": cpu_seconds() - cpu,
            "peak_mib": peak_mib(),
            "read_mib": read_mib() - mib,
        }
        if not num_sets:
            answer |= facts()
        print(json.dumps(answer), file=answers, flush=True)


def fork_readers(main: Callable[[list[str]], None]) -> None:
    """Run ``main`` for each reader on the command line, in forks that share the imports.

    Standard input and output of each fork are the pipes of its reader.
    """
    specifications = json.loads(sys.argv[1])
    for own in specifications:
        if os.fork():
            continue
        os.environ.update(own["environment"])
        os.dup2(own["requests"], 0)
        os.dup2(own["answers"], 1)
        _close_pipes(specifications)
        main(own["arguments"])
        return
    _close_pipes(specifications)
    failed = [os.wait()[1] != 0 for _ in specifications]
    sys.exit(any(failed))


def _close_pipes(specifications: list[dict[str, Any]]) -> None:
    for one in specifications:
        os.close(one["requests"])
        os.close(one["answers"])


class Worker:
    """The other end of a reader."""

    def __init__(self, name: str, requests: int, answers: int) -> None:
        self._name = name
        self._requests, self._answers = os.fdopen(requests, "w"), os.fdopen(answers)
        self._is_ready = False

    def _answer(self) -> str:
        if line := self._answers.readline():
            return line
        sys.exit(f"the reader {self._name} ended; its last words are above")

    def wait_until_ready(self) -> None:
        """Wait for the imports, and for what the reader opens."""
        if not self._is_ready:
            self._answer()
            self._is_ready = True

    def ask(self, num_sets: int) -> dict[str, float]:
        """Return cells, wall and CPU seconds of so many sets; 0 = the facts."""
        print(num_sets, file=self._requests, flush=True)
        answer: dict[str, float] = json.loads(self._answer())
        return answer

    def close(self) -> None:
        """End the process."""
        self._requests.close()
        self._answers.close()


def start_readers(
    python: str, script: Path, readers: dict[str, tuple[list[str], dict[str, str]]]
) -> dict[str, Worker]:
    """Start readers of a script: name -> its arguments and environment."""
    workers, specifications = {}, []
    for name, (arguments, environment) in readers.items():
        (requests, ask), (answer, answers) = os.pipe(), os.pipe()
        workers[name] = Worker(name, ask, answer)
        ends = {"requests": requests, "answers": answers}
        specifications.append({"arguments": arguments, "environment": environment, **ends})
    subprocess.Popen(
        [python, str(script), json.dumps(specifications)],
        pass_fds=[end for s in specifications for end in (s["requests"], s["answers"])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **ONE_THREAD},
    )
    _close_pipes(specifications)
    return workers
