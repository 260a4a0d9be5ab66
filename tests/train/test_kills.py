"""A run of two ranks that is killed again and again, while it trains and while it saves."""

import random
import time
from pathlib import Path

import pytest
from training_runs import RanksOfRun, assert_same_weights, config, read_metrics, starts

from scale.train.manifest import checkpoint_name, newest_checkpoint, read_manifest

KILLS = 20
EVERY = 3
STEPS = 100


def run_config(run_dir: Path, store: Path, *changes: str):
    return config(
        run_dir,
        store,
        f"trainer.max_steps={STEPS}",
        f"checkpoint.every_steps={EVERY}",
        "validation.every_steps=1000",
        *changes,
    )


def last_named(run_dir: Path) -> int:
    """Return the step that ``checkpoints/last`` names; 0 if it is not there."""
    last = run_dir / "checkpoints" / "last"
    return int(last.read_text().removeprefix("step_")) if last.exists() else 0


def last_logged(run_dir: Path) -> int:
    metrics = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    return metrics[-1]["step"] if metrics else 0


def is_saving(run_dir: Path, since: float) -> bool:
    """Return whether a checkpoint is being written; what an earlier life left does not count."""
    for partial in (run_dir / "checkpoints").glob("*.partial"):
        try:
            if partial.stat().st_ctime > since:
                return True
        except FileNotFoundError:
            continue
    return False


def is_logging(run_dir: Path, since: float) -> bool:
    """Return whether the steps past the checkpoint, which an earlier life logged, are dropped."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_mtime > since


def wait_until(condition, ranks: RanksOfRun, log: Path) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert all(p.exitcode is None for p in ranks.processes), told(log)
        assert time.monotonic() < deadline, told(log)
        time.sleep(0.001)


def told(log: Path) -> str:
    return "\n".join(p.read_text() for p in sorted(log.parent.glob(f"{log.name}-*")))


def is_beside(life: int) -> bool:
    """Return whether a life writes its checkpoints beside training."""
    return life % 4 == 3


def live_and_die(life: int, run_dir: Path, store: Path, log: Path, draw: random.Random) -> None:
    """Start the run, look where it goes on, and kill one rank or both."""
    named, logged, born = last_named(run_dir), last_logged(run_dir), time.time()
    settings = run_config(run_dir, store, f"checkpoint.save_async={str(is_beside(life)).lower()}")
    with RanksOfRun(settings, 2, log) as ranks:
        record = run_dir / "run.json"
        wait_until(lambda: record.exists() and len(starts(run_dir)) > life, ranks, log)
        resumed = starts(run_dir)[-1]["resumed_from"]
        if resumed is None:
            assert named == 0
        else:  # what `last` names, or one that got its name just before the kill
            assert resumed in {checkpoint_name(named), checkpoint_name(named + EVERY)}
        first_step = 0 if resumed is None else int(resumed.removeprefix("step_"))
        # What is written beside training is whole at the latest when the next save begins.
        assert logged - first_step <= (2 * EVERY if is_beside(life - 1) else EVERY)
        if life % 2:
            wait_until(lambda: is_saving(run_dir, born), ranks, log)
            time.sleep(draw.uniform(0.0, 0.005))
        else:
            target = first_step + draw.randint(1, 2 * EVERY)
            wait_until(
                lambda: is_logging(run_dir, born) and last_logged(run_dir) >= target, ranks, log
            )
        ranks.kill(draw.choice([(0,), (1,), (0, 1)]))
        # A rank that is left ends by itself.
        assert all(ranks.wait(timeout=30.0)), told(log)


@pytest.mark.slow
def test_killed_run_loses_one_interval_at_most_and_ends_with_the_same_bits(
    toy_store_path, tmp_path
):
    draw, run_dir, kills_in_saves = random.Random(1), tmp_path / "run", 0
    for life in range(KILLS):
        live_and_die(life, run_dir, toy_store_path, tmp_path / f"life{life}", draw)
        kills_in_saves += any((run_dir / "checkpoints").glob("*.partial"))
    assert last_logged(run_dir) < STEPS
    assert kills_in_saves >= 3
    whole = tmp_path / "whole"
    for folder in (run_dir, whole):
        log = tmp_path / f"{folder.name}-log"
        with RanksOfRun(run_config(folder, toy_store_path), 2, log) as ranks:
            assert ranks.wait(timeout=120.0) == [0, 0], told(log)
    assert_same_weights(newest_checkpoint(run_dir), newest_checkpoint(whole))
    assert read_manifest(newest_checkpoint(run_dir))["step"] == STEPS
    ours, theirs = read_metrics(run_dir), read_metrics(whole)
    assert [m["step"] for m in ours] == list(range(1, STEPS + 1))
    assert [m["train/loss"] for m in ours] == [m["train/loss"] for m in theirs]
    assert not list((run_dir / "checkpoints").glob("*.partial"))
