"""Benchmarks are run by hand; here that they start and say what they do,
and that gains are what they say they are."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"


def test_the_comparison_with_arc_state_tells_its_options():
    script = BENCHMARKS / "state_side_by_side.py"
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=True
    )
    for option in ("--quick", "--run", "--state", "--json"):
        assert option in done.stdout
    assert "says nothing about which model is better" in done.stdout


def test_the_benchmark_of_a_step_says_what_it_compares():
    script = BENCHMARKS / "step.py"
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=True
    )
    for option in ("--quick", "--parts", "--json"):
        assert option in done.stdout
    assert "not the same\narithmetic" in done.stdout


def test_the_gains_of_the_quality_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gains = importlib.import_module("quality_gains")
    row = importlib.import_module("quality_runs").Row

    def rows(method, factor, form="cells", seeds=(0, 1)):
        return [
            row(
                "screen",
                data_seed,
                seed,
                method,
                form,
                {
                    "pearson_delta": {"one": 0.3 * factor, "two": (0.4 + data_seed / 10) * factor},
                    "mse": {"one": 0.1 / factor, "two": 0.2 / factor},
                },
            )
            for data_seed in (0, 1, 2)
            for seed in seeds
        ]

    baseline = [*rows("additive", 1.0, seeds=(None,)), *rows("additive", 1.2, "mean", (None,))]
    table = gains.Table([*rows("ours", 1.25), *rows("theirs", 1.0), *baseline])
    assert len(table.units()) == 6
    better = gains.gain_of(table, "pearson_delta", "ours", "theirs")
    # both sides are drawn alike: a gain that is the same everywhere has no width
    assert [better.value, better.low, better.high] == pytest.approx([0.25] * 3)
    less = gains.gain_of(table, "mse", "theirs", "ours")
    assert less.value == pytest.approx(-0.25)
    assert table.better_form("additive", "mse") == "mean"
    over = gains.gain_of(table, "pearson_delta", "ours", "additive")
    assert over.value == pytest.approx(1.25 / 1.2 - 1)
    mean = gains.mean_of(table, "theirs", "cells", "pearson_delta")
    assert mean.value == pytest.approx(0.4)
    assert 0.3 < mean.low < 0.4 < mean.high < 0.6
