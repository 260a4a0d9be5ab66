"""Settings, splits and helpers of whole training runs on the toy store."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
from ranks import start_process

from scale.config import PretrainConfig, compose
from scale.runtime import StopSignal

SPLIT = """
[datasets]
toy = "."
[training]
toy = "train"
[zeroshot]
"toy.K562" = "test"
[fewshot."toy.HepG2"]
val = ["[('drugB', 0.5, 'uM')]", "[('drugC', 0.5, 'uM')]"]
test = ["[('drugA', 5.0, 'uM')]"]
"""

SETTINGS = (
    *("model=tiny", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2"),
    *("model.ffn_hidden_size=32", "model.set_size=8", "model.num_summary_cells=8"),
    *("trainer.max_steps=12", "trainer.sets_per_batch=4", "trainer.log_every_steps=1"),
    *("optimizer.warmup_steps=3", "checkpoint.every_steps=4", "validation.every_steps=6"),
    "data.control_fraction=0.05",
)


def settings(store: Path, *changes: str) -> list[str]:
    return [*SETTINGS, f"data.store={store}", *changes]


def config(run_dir: Path, store: Path, *changes: str) -> PretrainConfig:
    return compose("pretrain", settings(store, *changes), run_dir=run_dir)


def pretrain(run_dir: Path, store: Path, *changes: str, stop: StopSignal | None = None) -> int:
    """The task in this process."""
    from scale.tasks import pretrain as task

    return task.run(config(run_dir, store, *changes), stop or StopSignal())


def read_metrics(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def starts(run_dir: Path) -> list[dict]:
    return json.loads((run_dir / "run.json").read_text())["starts"]


def all_weights(checkpoint: Path) -> dict[str, np.ndarray]:
    """Weights, average and moments of a checkpoint."""
    from scale.train.export import _read_whole

    return {k: v.float().numpy() for k, v in _read_whole(checkpoint / "weights", "").items()}


def assert_same_weights(one: Path, other: Path, **tolerance) -> None:
    ours, theirs = all_weights(one), all_weights(other)
    assert ours.keys() == theirs.keys()
    assert any(k.startswith("ema.") for k in ours)
    assert any(k.startswith("optimizer.exp_avg_sq.") for k in ours)
    for key, value in ours.items():
        if tolerance:
            np.testing.assert_allclose(value, theirs[key], err_msg=key, **tolerance)
        else:
            np.testing.assert_array_equal(value, theirs[key], err_msg=key)


@contextmanager
def process(log: Path, *arguments: str, launcher: tuple[str, ...] = ()):
    """``scale`` as a process of its own; killed at the end if it still runs.

    Output goes to a file: whoever holds a pipe of a killed process may wait for ever.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, *(launcher or ()), "-m", "scale", *arguments]
    with log.open("ab") as output:
        running = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            yield running
        finally:
            if running.poll() is None:
                running.kill()
            running.wait()


def wait_for(condition, running: subprocess.Popen, log: Path, timeout: float = 120.0) -> None:
    """Wait until ``condition()`` holds while a process runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert running.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


class RanksOfRun:
    """``scale pretrain`` on ranks of the fork server, which start in a moment.

    They meet at a port of this machine, as under torchrun, and write to ``<log>-<rank>``.
    """

    def __init__(self, settings: PretrainConfig, size: int, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            start_process(_rank_of_run, settings, rank, size, port, f"{log}-{rank}")
            for rank in range(size)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def kill(self, ranks: Iterable[int]) -> None:
        """End ranks with SIGKILL."""
        for rank in ranks:
            self.processes[rank].kill()

    def wait(self, timeout: float) -> list[int | None]:
        """Return the status of each rank; None if it still runs after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]


def _rank_of_run(settings: PretrainConfig, rank: int, size: int, port: int, log: str) -> None:
    import torch

    from scale.tasks import pretrain as task

    with Path(log).open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.exit(task.run(settings, StopSignal()))
