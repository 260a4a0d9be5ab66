"""A disk that fills up while a command writes: one line, status 1, and nothing half-written."""

import os
import resource
import subprocess
import sys

import pytest
from training_runs import SETTINGS

SMALL = ["trainer.max_steps=4", "checkpoint.every_steps=2", "validation.every_steps=100"]


def scale(*arguments, limit_bytes=None):
    """Run a command in a process whose files cannot grow beyond a limit."""

    def restrict():
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    # numba may not write its cache either, and does without; Python would keep cut bytecode
    return subprocess.run(
        [sys.executable, "-m", "scale", *map(str, arguments)],
        preexec_fn=restrict,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, toy_store_path):
    folder = tmp_path_factory.mktemp("disk")
    done = scale(
        "pretrain",
        *SETTINGS,
        *SMALL,
        f"data.store={toy_store_path}",
        "name=run",
        f"hydra.run.dir={folder / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_checkpoint_that_does_not_fit(run_dir, toy_store_path, tmp_path):
    done = scale(
        "pretrain",
        *SETTINGS,
        *SMALL,
        f"data.store={toy_store_path}",
        "name=run",
        f"hydra.run.dir={tmp_path / 'run'}",
        limit_bytes=30_000,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "step_00000002 could not be written: rank 0: " in done.stderr
    assert "File too large; training goes on, older checkpoints are untouched" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "step_00000004 could not be written: rank 0: " in last
    assert "the save before it failed too, so training stops" in last
    checkpoints = tmp_path / "run" / "checkpoints"
    assert not list(checkpoints.glob("step_*[0-9]"))
    assert not (checkpoints / "last").exists()


def test_prediction_that_does_not_fit(run_dir, toy_anndata, tmp_path):
    toy_anndata.write_h5ad(tmp_path / "cells.h5ad")
    arguments = (
        "predict",
        f"checkpoint={run_dir}",
        f"input={tmp_path / 'cells.h5ad'}",
        "library_key=library",
        "cells_per_condition=200",
        f"hydra.run.dir={tmp_path / 'out'}",
    )
    done = scale(*arguments, limit_bytes=100_000)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*.h5ad"))
    assert not list((tmp_path / "out").glob(".*partial"))
    assert scale(*arguments).returncode == 0
