"""Launchers: torchrun on one machine and on two, tasks as Slurm starts them; stop and go on."""

import os
import signal
import socket
import stat
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from training_runs import pretrain, read_metrics, settings, starts, wait_for

from scale.runtime import EXIT_AGAIN
from scale.train.manifest import newest_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = str(ROOT / "scripts" / "torchrun")
SBATCH = ROOT / "scripts" / "slurm" / "pretrain.sbatch"
STOP_SECONDS = 30
"""From a signal to the last checkpoint and the end; torchrun and Slurm give no more by default."""

CHANGES = (
    *("trainer.sets_per_batch=8", "model.set_size=16", "checkpoint.every_steps=100000"),
    # A rate that does not know where the run will end: the reference is shorter.
    *("optimizer.final_lr_fraction=1.0", "trainer.max_steps=100000"),
)


@contextmanager
def launched(log, *command, **environ):
    """A launcher in a session of its own, which is killed at the end if it still runs."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    path = f"{Path(sys.executable).parent}:{clean['PATH']}"
    environment = clean | {"OMP_NUM_THREADS": "1", "PATH": path} | environ
    with log.open("ab") as output:
        running = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            yield running
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def one_machine(arguments):
    return [([TORCHRUN, *arguments], {"NPROC_PER_NODE": "2"})]


def two_machines(arguments):
    meeting = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        ([TORCHRUN, *arguments], {"NPROC_PER_NODE": "1", "NODE_RANK": str(node), **meeting})
        for node in range(2)
    ]


def slurm_step(arguments):
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    task = {"SLURM_STEP_NUM_TASKS": "2"}
    return [
        (
            [sys.executable, "-m", "scale", *arguments],
            {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), **task, **meeting},
        )
        for rank in range(2)
    ]


LAUNCHES = (two_machines, slurm_step)


def start_and_stop(run_dir, launch, arguments):
    """Launch a run, and send SIGUSR1 to the last process once it has gone on for two steps."""
    done = len(read_metrics(run_dir)) if run_dir.exists() else 0
    log = run_dir.parent / launch.__name__

    def has_begun():
        return (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) > done + 1

    with ExitStack() as stack:
        processes = [
            stack.enter_context(launched(log, *command, **environ))
            for command, environ in launch(arguments)
        ]
        wait_for(has_begun, processes[-1], log)
        processes[-1].send_signal(signal.SIGUSR1)
        for process in processes:
            assert process.wait(STOP_SECONDS) == EXIT_AGAIN, log.read_text()


def arguments_of(run_dir, store):
    return ["pretrain", *settings(store, *CHANGES), "name=run", f"hydra.run.dir={run_dir}"]


@pytest.fixture(scope="module")
def run_dir(toy_store_path, tmp_path_factory):
    """A run that was launched twice, and stopped in each by SIGUSR1 to one process."""
    run_dir = tmp_path_factory.mktemp("launches") / "run"
    for launch in LAUNCHES:
        start_and_stop(run_dir, launch, arguments_of(run_dir, toy_store_path))
    return run_dir


def test_each_launch_was_stopped_with_a_checkpoint(run_dir):
    reasons = [start["exit_reason"] for start in starts(run_dir)]
    assert reasons == ["stopped by another rank"] * len(LAUNCHES)
    assert [start["world_size"] for start in starts(run_dir)] == [2] * len(LAUNCHES)
    steps = [start["step"] for start in starts(run_dir)]
    assert steps == sorted(set(steps))
    assert newest_checkpoint(run_dir).name == f"step_{steps[-1]:08d}"


@pytest.mark.slow
def test_torchrun_on_one_machine_stops_with_a_checkpoint(toy_store_path, tmp_path):
    run_dir = tmp_path / "run"
    start_and_stop(run_dir, one_machine, arguments_of(run_dir, toy_store_path))
    (start,) = starts(run_dir)
    assert start["exit_reason"] == "stopped by SIGUSR1"
    assert start["world_size"] == 2
    assert newest_checkpoint(run_dir).name == f"step_{start['step']:08d}"


def test_launches_take_the_steps_of_one_process(run_dir, toy_store_path, tmp_path):
    metrics = read_metrics(run_dir)
    last = len(metrics)
    changes = (*CHANGES, f"trainer.max_steps={last}")
    assert pretrain(tmp_path / "alone", toy_store_path, *changes) == 0
    alone = read_metrics(tmp_path / "alone")
    assert [m["step"] for m in metrics] == [m["step"] for m in alone] == list(range(1, last + 1))
    for ours, theirs in zip(metrics, alone, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
    assert all(m["train/slowest_rank"] in (0, 1) for m in metrics)


def stub(folder, name, body):
    """Put a command into a folder that keeps what it was called with; return where."""
    command = folder / name
    command.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >>{folder}/{name}.said\n{body}\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return folder / f"{name}.said"


@pytest.mark.parametrize(
    ("torchrun_ends", "ranks_end", "status"),
    [(0, [0, 0], 0), (1, [75, 75], 75), (1, [75], 75), (1, [1, 1], 1), (137, [], 137)],
)
def test_wrapper_hands_on_the_status_of_its_ranks(tmp_path, torchrun_ends, ranks_end, status):
    told = "".join(f"echo {end} >>$SCALE_STATUS_FILE; " for end in ranks_end)
    stub(tmp_path, "torchrun", f"{told}exit {torchrun_ends}")
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([TORCHRUN, "pretrain"], env=environ, check=False)
    assert done.returncode == status


def test_wrapper_names_machine_and_meeting_point(tmp_path):
    said = stub(tmp_path, "torchrun", "exit 0")
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NNODES": "2", "NODE_RANK": "1"}
    refused = subprocess.run(
        [TORCHRUN, "pretrain"], env=environ, check=False, capture_output=True, text=True
    )
    assert refused.returncode != 0
    assert "MASTER_ADDR: name of the machine with NODE_RANK=0" in refused.stderr
    environ["MASTER_ADDR"] = "node1"
    subprocess.run([TORCHRUN, "pretrain", "model=base"], env=environ, check=True)
    words = said.read_text().split()
    assert words[:8] == [
        *("--nnodes", "2", "--node-rank", "1", "--master-addr", "node1", "--master-port", "29500")
    ]
    assert words[-4:] == ["-m", "scale", "pretrain", "model=base"]


@pytest.mark.parametrize(("status", "is_requeued"), [(0, False), (1, False), (75, True)])
def test_batch_script_starts_again_only_what_was_stopped(tmp_path, status, is_requeued):
    srun = stub(tmp_path, "srun", f"exit {status}")
    scontrol = stub(tmp_path, "scontrol", "echo node1; echo node2")
    environ = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    done = subprocess.run(
        ["bash", SBATCH, "trainer=multi_node"], env=environ, check=False, cwd=tmp_path
    )
    assert done.returncode == status
    words = srun.read_text().split()
    assert words[1:] == [
        "scale",
        "pretrain",
        "trainer=gpu",
        "name=slurm-1234",
        "trainer=multi_node",
    ]
    assert ("requeue\n1234" in scontrol.read_text()) is is_requeued
