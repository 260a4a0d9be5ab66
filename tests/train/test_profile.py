"""The trace of some steps: which steps are in it, and that it can be opened."""

import json

import pytest
from training_runs import pretrain

CHANGES = ("trainer.profile_steps=5", "checkpoint.every_steps=100")


@pytest.fixture(scope="module")
def run_dir(toy_store_path, tmp_path_factory):
    """A run of 12 steps, of which the last two are past the first ten."""
    run_dir = tmp_path_factory.mktemp("traced") / "run"
    assert pretrain(run_dir, toy_store_path, *CHANGES) == 0
    return run_dir


def test_trace_names_the_steps_after_the_first_ten(run_dir):
    (trace,) = (run_dir / "profile").glob("*.json")
    assert trace.name == "steps-11-12.json"
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {name for name in names if name.startswith("step ")} == {"step 11", "step 12"}
    assert "aten::mm" in names or "aten::addmm" in names


def test_table_tells_the_operators_that_took_longest(run_dir):
    table = (run_dir / "profile" / "steps-11-12.txt").read_text()
    assert "Self CPU" in table
    assert "aten::" in table
    assert "steps 11 to 12" in (run_dir / "pretrain.log").read_text()


def test_run_that_ends_too_early_for_a_trace_says_so(run_dir, toy_store_path):
    assert pretrain(run_dir, toy_store_path, *CHANGES, "trainer.max_steps=13") == 0
    assert "no trace: the run ended before step 23" in (run_dir / "pretrain.log").read_text()
    assert len(list((run_dir / "profile").iterdir())) == 2
