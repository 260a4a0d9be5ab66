"""A reader in a process of its own, asked for cells round by round through its pipes.

Used by both sides of data.py, so that both are timed by the same lines; standard library only. CPU
time is that of the process with all of its threads and of children it waited for; what comes before
the first request (imports, opening, compiling) is in none of the figures.
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


class Worker:
    """The other end: starts a reader and asks it."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **one, **environment},
        )
        self._is_ready = False

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        _, errors = self._process.communicate()
        sys.exit(f"a reader ended: {' '.join(self._process.args[:3])}\n{errors[-3000:]}")

    def wait_until_ready(self) -> None:
        """Wait for the imports."""
        if not self._is_ready:
            self._answer()
            self._is_ready = True

    def ask(self, num_sets: int) -> dict[str, float]:
        """Return cells, wall and CPU seconds of so many sets; 0 = the facts."""
        assert self._process.stdin is not None
        print(num_sets, file=self._process.stdin, flush=True)
        answer: dict[str, float] = json.loads(self._answer())
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
