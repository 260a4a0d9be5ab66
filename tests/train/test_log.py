"""Metrics: one line per step in the file, resumed without doubles; wandb cannot end a run."""

import json
import logging

import pytest

from scale.config import LogConfig, WandbMode
from scale.train.log import Clock, MetricLog, console_line

METRICS = {
    "train/loss": 0.5,
    "train/cells_per_second": 950.4,
    "train/data_wait_fraction": 0.014,
    "train/lr": 1.5e-3,
    "system/memory_gib": 0.25,
}


def open_log(folder, **options):
    return MetricLog(folder, LogConfig(), max_steps=10, **options)


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resumed_log_drops_what_comes_again(tmp_path):
    log = open_log(tmp_path)
    for step in (1, 2, 3, 4):
        log.write(step, {**METRICS, "train/loss": float(step)}, eta_seconds=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 5, "train/lo')  # killed while it wrote
    before = read_lines(tmp_path)[1]["time_seconds"]
    log = open_log(tmp_path, first_step=2)
    log.write(3, {**METRICS, "train/loss": 30.0}, eta_seconds=1.0)
    rows = read(tmp_path)
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert rows[-1]["train/loss"] == 30.0
    assert rows[-1]["time_seconds"] >= before


def read_lines(folder):
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def test_values_that_json_cannot_hold_are_null(tmp_path):
    open_log(tmp_path).write(1, {"val/pearson_delta": float("nan")}, eta_seconds=1.0)
    assert read(tmp_path)[0]["val/pearson_delta"] is None


def test_other_ranks_write_nothing(tmp_path):
    log = open_log(tmp_path / "run", is_writer=False)
    log.write(1, METRICS, eta_seconds=1.0)
    log.close()
    assert not (tmp_path / "run").exists()


def test_console_line_of_small_numbers():
    assert console_line(3, 10, METRICS, 61.0) == (
        "step 3/10 | loss 0.5 | 950 cells/s | data 1% | lr 1.5e-3 | 0.2 GiB | eta 1m01s"
    )


def test_wandb_that_is_missing_warns_once(tmp_path, caplog):
    try:
        import wandb  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("wandb is installed")
    log = MetricLog(tmp_path, LogConfig(wandb=WandbMode.offline), max_steps=10)
    log.write(1, METRICS, eta_seconds=1.0)
    log.close()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("wandb did not start (No module named 'wandb')")
    assert read(tmp_path)[0]["step"] == 1


def test_clock_counts_cells_of_its_window():
    clock = Clock(0, 100)
    clock.add(1, 64, 0.0, [0.1])
    first = clock.read()
    assert first["train/cells_per_second"] > 0
    assert first["train/step_seconds"] * first["train/cells_per_second"] == pytest.approx(64)
    assert clock.read()["train/cells_per_second"] == 0
    clock.add(2, 64, 1e9, [0.1])
    assert clock.read()["train/data_wait_fraction"] == 1.0
    for step in range(3, 13):
        clock.add(step, 64, 0.0, [0.1])
        assert clock.eta_seconds() > 0


def test_clock_names_the_rank_that_holds_up_the_others():
    clock = Clock(0, 100)
    for step in (1, 2):
        clock.add(step, 64, 0.0, [0.2, 0.7, 0.2, 0.3])
    rates = clock.read()
    assert rates["train/slowest_rank"] == 1
    assert rates["train/slowest_rank_lag_seconds"] == pytest.approx(0.45)
    clock.add(3, 64, 0.0, [0.2])  # one process has nobody to wait for
    assert "train/slowest_rank" not in clock.read()
