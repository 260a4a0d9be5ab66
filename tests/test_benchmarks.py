"""Benchmarks are run by hand; here that they start and say what they do,
and that gains are what they say they are."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
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
    assert "not the same arithmetic" in " ".join(done.stdout.split())


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


def test_real_sets_hold_out_each_pair_once_and_the_doubles_of_seen_singles(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sets = importlib.import_module("quality_real_sets")
    pairs = pd.DataFrame([(c, p) for c in "xyz" for p in "ABCDE"], columns=["context", "label"])
    held = [sets.rotated(pairs["context"], pairs["label"], seed) for seed in range(3)]
    assert (np.sum(held, axis=0) == 1).all()
    assert all(pairs["label"][h].is_unique for h in held)
    labels = {"A", "B", "C", "A+B", "B+D", "E+F", "C+A"}
    assert sets.doubles_of_singles(labels) == {"A+B", "C+A"}


def test_what_real_sets_cannot_tell_is_said(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    real = importlib.import_module("quality_real")

    def values(method, level, form="cells", noise=0.0, metric="mse"):
        return [
            (method, form, metric, seed, "x", p, level + noise * (i - 1.5) + 0.01 * seed)
            for seed in (0, 1)
            for i, p in enumerate("ABCD")
        ]

    def found(*rows, metric="mse"):
        columns = ["method", "form", "metric", "seed", "context", "perturbation", "value"]
        table = pd.DataFrame([row for block in rows for row in block], columns=columns)
        return real.gain(table, "all", metric, "additive")

    rival = [*values("additive", 0.9), *values("additive", 0.5, "mean")]  # the better form counts
    ceiling = values("replicate", 0.6)  # all cells have half the error of half the cells
    assert found(values("ours", 0.3), rival, ceiling).verdict == "better"
    assert found(values("ours", 0.7), rival, ceiling).verdict == "worse"
    unclear = found(values("ours", 0.5, noise=0.2), rival, ceiling)
    assert unclear.verdict == "cannot tell"
    assert unclear.rival == pytest.approx(0.505)
    assert unclear.ceiling == pytest.approx(0.3025)
    no_headroom = found(values("ours", 0.5, noise=0.2), rival, values("replicate", 1.0, noise=0.2))
    assert no_headroom.verdict == "cannot tell: no headroom"
    assert found(rival, ceiling, metric="mse").verdict == "undefined"


def test_gains_of_finetuning_are_paired_over_lines(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    transfer = importlib.import_module("quality_transfer")
    runs = importlib.import_module("quality_runs")

    def row(method, seed, level):
        by_line = {"A": level + 0.3 * seed, "B": level + 0.1}
        scores = {"mse": by_line, "overlap_at_n": by_line}
        return runs.Row("second", seed, seed, method, runs.CELLS, scores)

    levels = {"finetuned 20": 0.5, "scratch 20": 0.7, "finetuned 40": 0.3, "scratch 40": 0.6}
    rows = [row(method, seed, level) for method, level in levels.items() for seed in (0, 1)]
    found = transfer.gains(rows, transfer.Plan((0, 1), (20, 40)))
    gains = {(g.finetuned_steps, g.scratch_steps, g.metric): g for g in found}
    assert {key[:2] for key in gains} == {(20, 20), (40, 40), (20, 40)}
    less_error, less_overlap = gains[20, 40, "mse"], gains[20, 40, "overlap_at_n"]
    assert less_error.gain == pytest.approx(0.1)
    assert less_overlap.gain == pytest.approx(-0.1)
    assert (less_error.outcome, less_overlap.outcome) == ("better", "worse")
    assert less_error.num_lines == 4
