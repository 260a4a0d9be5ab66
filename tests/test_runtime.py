"""Files that are whole or absent, the world a process sees, the run's record."""

import json
import os
import signal

import pytest
import torch

from scale.runtime import RunRecord, StopSignal, World, atomic_path, choose_device, write_json


def test_world_from_environments():
    assert World.from_env({}) == World(0, 1, 0)
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert World.from_env(torchrun) == World(3, 4, 1)
    # A batch script sees SLURM_NTASKS, but is alone.
    assert World.from_env({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == World(0, 1, 0)


def test_world_of_a_slurm_step_is_handed_on(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "unset")
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
    assert World.from_env(step) == World(2, 4, 0)
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("2", "4")


def test_cuda_that_is_not_there_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match="no CUDA device; use device=cpu"):
        choose_device("cuda", World(0, 1, 0))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]


def test_json_with_nan_is_refused_and_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_stop_signal_only_sets_a_flag():
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        stop = StopSignal().install()
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received == "SIGUSR1"
        # At the end, a launcher's signal to the last ranks changes nothing any more.
        StopSignal.ignore()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGUSR1"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_run_record_keeps_one_entry_per_start(tmp_path):
    for reason in ("stopped: SIGTERM", "done"):
        RunRecord(tmp_path, World(0, 1, 0), {"seed": 1}).close(reason)
    RunRecord(tmp_path, World(1, 2, 1), {"seed": 2}).close("done")  # other ranks write nothing
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [s["exit_reason"] for s in starts] == ["stopped: SIGTERM", "done"]
    assert all(s["versions"]["torch"] and s["peak_rss_bytes"] > 1e7 for s in starts)
