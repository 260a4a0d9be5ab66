"""The profile cell_eval gives the numbers of cell-eval 0.8.2, undefined ones included.

cell-eval runs in an environment of its own, made by scripts/cell_eval_environment.
"""

import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scale.config import Profile, ProtocolConfig
from scale.evaluate.protocol import run_protocol

ROOT = Path(__file__).resolve().parents[2]
GENES, CELLS, CONTROLS = 200, 40, 80
# cell-eval averages in float32; everything that is ranks and counts agrees to rounding
TOLERANCE = dict.fromkeys(("pearson_delta", "mse", "mae", "mse_delta", "mae_delta"), 1e-6)
EXACT = 1e-9
# Identical cells make dozens of fold changes minus infinity. Among equal fold changes cell-eval
# takes the order of an unstable sort once there are more than about 20, here it is gene order.
DECIDED_BY_TIES = {"identical_cells": ("overlap_at_", "precision_at_")}


def to_log(rate, generator):
    counts = generator.poisson(generator.gamma(4.0, rate / 4.0))
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.log1p(counts * (1e4 / total)).astype(np.float32)


def make_cells(log_fold, generator, sizes, base):
    """Cells of perturbations with given natural-log fold changes, then the control."""
    blocks = [
        to_log(np.tile(base * np.exp(effect), (size, 1)), generator)
        for effect, size in zip([*log_fold, np.zeros(GENES)], sizes, strict=True)
    ]
    return np.vstack(blocks)


def to_anndata(values, labels, sizes):
    column = np.repeat([*labels, "control"], sizes)
    obs = pd.DataFrame(
        {"perturbation": column, "line": "one"},
        index=[f"c{i}" for i in range(len(column))],
    )
    var = pd.DataFrame(index=[f"g{i}" for i in range(GENES)])
    return ad.AnnData(X=sp.csr_matrix(values), obs=obs, var=var)


def effects(generator, strengths):
    shared = generator.normal(0, 0.5, GENES) * (generator.random(GENES) < 0.1)
    own = generator.normal(0, 1.2, (len(strengths), GENES))
    own *= generator.random((len(strengths), GENES)) < 0.15
    return np.asarray(strengths)[:, None] * (own + shared)


def pairs():
    """Name -> (predicted, observed)."""
    generator = np.random.default_rng(5)
    base = np.exp(generator.normal(0.3, 1.3, GENES))
    base[:3] = 1e-9  # genes that are never seen: 0 / 0 fold changes
    labels = ["g7", "g11", "drug a", "drug b", "drug c", "inert", "Zeta", "alpha"]
    change = effects(generator, [1, 1.2, 0.8, 1, 0.5, 0, 1.5, 0.7])
    change[0, 3:6] = 12.0  # expressed under one perturbation only: infinite fold changes
    base[3:6] = 1e-6
    sizes = [CELLS] * 8 + [CONTROLS]
    observed = to_anndata(make_cells(change, generator, sizes, base), labels, sizes)
    unequal = [40, 25, 60, 40, 41, 40, 30, 40, 70]
    good = to_anndata(make_cells(0.7 * change, generator, unequal, base), labels, unequal)
    mean = np.tile(change.mean(axis=0), (8, 1))
    collapsed = to_anndata(make_cells(mean, generator, sizes, base), labels, sizes)
    inert = to_anndata(make_cells(0 * change, generator, sizes, base), labels, sizes)
    identical = make_cells(change, generator, sizes, base)
    for p in range(8):
        identical[p * CELLS : (p + 1) * CELLS] = identical[p * CELLS]
    two = np.isin(observed.obs["perturbation"], ["drug a", "control"])
    return {
        "good": (good, observed),
        "collapsed": (collapsed, observed),
        "no_effect_predicted": (inert, observed),
        "no_effect_observed": (good, inert),
        "identical_cells": (to_anndata(identical, labels, sizes), observed),
        "one_perturbation": (collapsed[two].copy(), observed[two].copy()),
        "shuffled_rows": (good[generator.permutation(good.n_obs)].copy(), observed),
    }


@pytest.fixture(scope="module")
def cell_eval_python():
    script = ROOT / "scripts" / "cell_eval_environment"
    done = subprocess.run(
        [str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        pytest.skip(f"no environment with cell-eval 0.8.2: {last}")
    return done.stdout.strip()


@pytest.fixture(scope="module")
def reference(cell_eval_python, tmp_path_factory):
    """Name -> cell-eval's table, one row per perturbation."""
    folder = tmp_path_factory.mktemp("cell_eval")
    for name, (predicted, observed) in pairs().items():
        predicted.write_h5ad(folder / f"{name}.predicted.h5ad")
        observed.write_h5ad(folder / f"{name}.observed.h5ad")
    done = subprocess.run(
        [cell_eval_python, str(Path(__file__).parent / "run_cell_eval.py"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: pd.read_csv(
            folder / name / "results.csv", index_col="perturbation", dtype={"perturbation": str}
        )
        for name in pairs()
    }


@pytest.mark.parametrize("name", list(pairs()))
def test_every_metric_equals_cell_eval_per_perturbation(name, reference):
    predicted, observed = pairs()[name]
    protocol = ProtocolConfig(
        profile=Profile.cell_eval, baselines=False, ceiling=False, min_cells=2
    )
    evaluation = run_protocol(
        {"model": predicted},
        observed,
        perturbation_key="perturbation",
        cell_type_key="line",
        control="control",
        protocol=protocol,
    )
    ours = evaluation.scores.pivot(index="perturbation", columns="metric", values="value")
    theirs = reference[name].astype(float)
    assert set(ours.index) == set(theirs.index)
    for metric in theirs.columns:
        if metric.startswith(DECIDED_BY_TIES.get(name, ("-",))):
            continue
        np.testing.assert_allclose(
            ours[metric].to_numpy(),
            theirs.loc[ours.index, metric].to_numpy(),
            rtol=0,
            atol=TOLERANCE.get(metric, EXACT),
            equal_nan=True,
            err_msg=metric,
        )
    absent = {"de_direction_match", "de_spearman_lfc_sig", "de_sig_genes_recall"} - set(theirs)
    for metric in absent:  # no observed significant gene at all: cell-eval has no column
        assert ours[metric].isna().all(), metric
    assert len(theirs.columns) + len(absent) >= 25
