"""A training that stands still ends on every rank, and says which rank stood where."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ranks import _CONTEXT
from training_runs import read_metrics, settings, starts

from scale.train.manifest import newest_checkpoint
from scale.train.watchdog import PeerError, Watchdog, _all_places, _Place, naming_lost_ranks

TIMEOUT_SECONDS = 12.0
"""Of collectives and watchdog: far above a step of the toy model on a busy machine."""


def _to_log(function, log, *arguments):
    """Run a function as a process whose output goes to a file; its return value is the status."""
    with Path(log).open("ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.exit(function(*arguments))


def start(function, log, *arguments):
    process = _CONTEXT.Process(target=_to_log, args=(function, log, *arguments))
    process.start()
    return process


def end(process, timeout=120.0):
    """Return the status of a process, which is killed if it does not end by itself."""
    process.join(timeout)
    is_alive = process.is_alive()
    if is_alive:
        process.kill()
        process.join()
    assert not is_alive, f"still alive after {timeout} s"
    return process.exitcode


# --- one process --------------------------------------------------------------------------------


def beat_for_a_while(run_dir):
    with Watchdog(run_dir, rank=0, world_size=1, timeout_seconds=1.5, step=0) as watchdog:
        for step in range(30):
            watchdog.beat(step, "beating")
            time.sleep(0.1)
    return 0


def stand_still(run_dir):
    with Watchdog(run_dir, rank=0, world_size=1, timeout_seconds=1.0, step=0) as watchdog:
        watchdog.beat(1, "validating", is_limited=False)
        time.sleep(2.5)
        child = subprocess.Popen(["sleep", "1000"])
        sys.stdout.write(f"child {child.pid}\n")
        watchdog.beat(2, "saving a checkpoint")
        time.sleep(1000)
    return 0


def test_process_that_stands_still_ends_with_its_stacks(tmp_path):
    log = tmp_path / "log"
    assert end(start(stand_still, log, tmp_path)) == 1
    text = log.read_text()
    assert "rank 0 has begun nothing new for 1 s (parallel.timeout_seconds) and ends: " in text
    assert "last step 2, saving a checkpoint, in stand_still (test_watchdog.py:" in text
    stacks = (tmp_path / "rank-0.log").read_text()
    assert "rank 0 stands still: last step 2, saving a checkpoint" in stacks
    assert " in stand_still\n" in stacks
    child = int(text.split("child ")[1].split()[0])
    with suppress(psutil.NoSuchProcess):  # a zombie has ended; its parent has too
        assert psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_process_that_was_suspended_goes_on(tmp_path):
    process = start(beat_for_a_while, tmp_path / "log", tmp_path)
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
    assert end(process) == 0, (tmp_path / "log").read_text()
    assert not (tmp_path / "rank-0.log").exists()


def test_many_ranks_are_told_in_groups():
    def place(rank, doing):
        return _Place(rank, 41, doing, "f (engine.py:1)", 0.0)

    places = {rank: place(rank, "waiting for the other ranks") for rank in (0, 1, 2, 4, 7)}
    places[5] = place(5, "reading the next batch")
    assert _all_places(places, [3, 6]) == (
        "ranks 3, 6: no word, stopped or lost; "
        "rank 5: last step 41, reading the next batch, in f (engine.py:1); "
        "ranks 0-2, 4, 7: last step 41, waiting for the other ranks, in f (engine.py:1)"
    )


def test_error_of_a_collective_becomes_a_sentence():
    found = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:7"
    with (
        pytest.raises(
            PeerError, match=r"rank 3 .* \(Connection closed by peer \[::1\]:7\), outside"
        ),
        naming_lost_ranks(3),
    ):
        raise RuntimeError(found)
    with pytest.raises(RuntimeError, match="shapes"), naming_lost_ranks(3):
        raise RuntimeError("shapes differ")


# --- several ranks ------------------------------------------------------------------------------


def train_rank(rank, size, port, arguments, fault):
    """``scale pretrain`` as this rank; ``fault`` of a rank comes before its third batch."""
    from scale.cli import main
    from scale.data.module import CellSetDataModule

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    train_batches = CellSetDataModule.train_batches

    def with_fault(self, **options):
        for number, batch in enumerate(train_batches(self, **options), start=1):
            if number == 3 and fault == "sleeps":
                time.sleep(1000)
            elif number == 3 and fault is not None:
                os.kill(os.getpid(), getattr(signal, fault))
            yield batch

    CellSetDataModule.train_batches = with_fault
    return main(arguments)


def run_with_faults(store, tmp_path, *faults):
    """Start a rank per fault; return processes and their logs."""
    size = len(faults)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        "pretrain",
        *settings(
            store,
            f"trainer.sets_per_batch={size}",
            f"parallel.timeout_seconds={TIMEOUT_SECONDS}",
            "checkpoint.every_steps=1",
        ),
        *("name=faulty", f"hydra.run.dir={tmp_path / 'run'}"),
    ]
    logs = [tmp_path / f"log-{rank}" for rank in range(size)]
    processes = [
        start(train_rank, logs[rank], rank, size, port, arguments, fault)
        for rank, fault in enumerate(faults)
    ]
    return processes, logs


def test_ranks_that_hang_end_all_and_are_named(toy_store_path, tmp_path):
    processes, logs = run_with_faults(toy_store_path, tmp_path, None, "sleeps", "SIGSTOP")
    try:
        assert end(processes[0]) == 1, logs[0].read_text()
        assert end(processes[1]) == 1
        waits, sleeps = logs[0].read_text(), logs[1].read_text()
        assert "rank 1 has begun nothing new for 12 s" in sleeps
        assert "last step 2, reading the next batch, in with_fault (test_watchdog.py:" in sleeps
        assert "rank 0 has begun nothing new for 12 s" in waits
        assert "rank 2: no word, stopped or lost; " in waits
        assert "rank 1: last step 2, reading the next batch, in with_fault" in waits
        assert "rank 0: last step 2, waiting for the other ranks" in waits
        assert "has begun nothing new" in (tmp_path / "run" / "pretrain.log").read_text()
        assert " in with_fault\n" in (tmp_path / "run" / "rank-1.log").read_text()
        assert newest_checkpoint(tmp_path / "run").name == "step_00000002"
        # The rank that was stopped finds out when it goes on.
        os.kill(processes[2].pid, signal.SIGCONT)
        assert end(processes[2]) == 1
        assert "rank 2 has lost another rank, which ended or does not answer" in logs[2].read_text()
    finally:
        for process in processes:
            process.kill()


def test_rank_that_dies_is_noticed_at_once(toy_store_path, tmp_path):
    processes, logs = run_with_faults(toy_store_path, tmp_path, None, "SIGKILL")
    assert end(processes[1]) == -signal.SIGKILL
    assert end(processes[0]) == 1
    said = " ".join(logs[0].read_text().split())
    assert "rank 0 has lost another rank, which ended or does not answer (" in said
    assert "after step 2 while taking step 3" in said
    assert "The same command goes on from the last checkpoint" in said
    assert "Traceback" not in said
    (record,) = starts(tmp_path / "run")
    assert record["exit_reason"].startswith("PeerError: rank 0 has lost another rank")
    first, second = read_metrics(tmp_path / "run")
    assert [first["step"], second["step"]] == [1, 2]
    # What the log and the record tell of costs; no MFU without a GPU.
    assert second["train/save_seconds"] > 0
    assert second["train/slowest_rank"] in (0, 1)
    flops_per_rank = second["train/cells_per_second"] * record["flops_per_cell"] / 2
    assert second["train/tflops_per_second"] == pytest.approx(flops_per_rank / 1e12)
    assert "train/mfu" not in second
    assert record["parameters"] > 0
    assert record["ceiling_tflops_per_second"] is None
