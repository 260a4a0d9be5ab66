"""Predictions and observations whose scores other tools give too, and the Python that has them.

cell-eval and cell-eval2 live in an environment of their own, made by scripts/cell_eval_environment.
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


def pairs(*, one_sided=True):
    """Name -> (predicted, observed).

    ``one_sided``: three genes are expressed under one perturbation only, so that fold changes
    are infinite.
    """
    generator = np.random.default_rng(5)
    base = np.exp(generator.normal(0.3, 1.3, GENES))
    base[:3] = 1e-9  # genes that are never seen: 0 / 0 fold changes
    labels = ["g7", "g11", "drug a", "drug b", "drug c", "inert", "Zeta", "alpha"]
    change = effects(generator, [1, 1.2, 0.8, 1, 0.5, 0, 1.5, 0.7])
    if one_sided:
        change[0, 3:6] = 12.0
        base[3:6] = 1e-6
    else:  # every gene is seen on every side
        base[3:], change = np.maximum(base[3:], 0.5), change.clip(-2, 2)
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
    copied = [CONTROLS if p in (1, 4, 8) else CELLS for p in range(9)]
    parts = np.split(make_cells(change, generator, copied, base), np.cumsum(copied)[:-1])
    parts[1] = parts[4] = parts[8]
    copy = to_anndata(np.vstack(parts), labels, copied)
    two = np.isin(observed.obs["perturbation"], ["drug a", "control"])
    return {
        "good": (good, observed),
        "collapsed": (collapsed, observed),
        "no_effect_predicted": (inert, observed),
        "no_effect_observed": (good, inert),
        "identical_cells": (to_anndata(identical, labels, sizes), observed),
        "two_control_copies": (copy, observed),
        "one_perturbation": (collapsed[two].copy(), observed[two].copy()),
        "shuffled_rows": (good[generator.permutation(good.n_obs)].copy(), observed),
    }


def reference_python():
    """Path of a Python with cell-eval and cell-eval2; skips where none can be made."""
    done = subprocess.run(
        [str(ROOT / "scripts" / "cell_eval_environment")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        pytest.skip(f"no environment with cell-eval and cell-eval2: {last}")
    return done.stdout.strip()


def run_reference(script, folder):
    """Run a script of this folder in that environment."""
    done = subprocess.run(
        [reference_python(), str(Path(__file__).parent / script), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def tables_of(script, chosen, folder):
    """Name -> the tool's table of each pair, one row per perturbation."""
    for name, (predicted, observed) in chosen.items():
        predicted.write_h5ad(folder / f"{name}.predicted.h5ad")
        observed.write_h5ad(folder / f"{name}.observed.h5ad")
    run_reference(script, folder)
    return {
        name: pd.read_csv(
            folder / name / "results.csv", index_col="perturbation", dtype={"perturbation": str}
        ).astype(float)
        for name in chosen
    }


def our_table(predicted, observed):
    """The same table by the profile cell_eval."""
    evaluation = run_protocol(
        {"model": predicted},
        observed,
        perturbation_key="perturbation",
        cell_type_key="line",
        control="control",
        protocol=ProtocolConfig(
            profile=Profile.cell_eval, baselines=False, ceiling=False, min_cells=2
        ),
    )
    return evaluation.scores.pivot(index="perturbation", columns="metric", values="value")
