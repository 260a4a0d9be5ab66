"""Benchmarks are run by hand; here only that they start and say what they do."""

import subprocess
import sys
from pathlib import Path

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
