"""The profile cell_eval gives the numbers of cell-eval2 with its preset cell-eval-0.7.6."""

import json

import numpy as np
import pandas as pd
import pytest
from cell_eval_pairs import our_table, pairs, run_reference, tables_of

from scale.evaluate import significance
from scale.evaluate.metrics import METRICS
from scale.evaluate.statistics import GeneTests, benjamini_hochberg


def shared_pairs():
    """Pairs on which the two definitions agree.

    cell-eval2 adds 1e-9 to both means of a fold change, so that none is infinite and their order
    is another one; the pairs here have none among significant genes.
    """
    chosen = pairs(one_sided=False)
    del chosen["identical_cells"]
    return chosen


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return tables_of("run_cell_eval2.py", shared_pairs(), tmp_path_factory.mktemp("cell_eval2"))


@pytest.mark.parametrize("name", list(shared_pairs()))
def test_every_shared_metric_equals_cell_eval2_per_perturbation(name, reference):
    ours, theirs = our_table(*shared_pairs()[name]), reference[name]
    assert set(ours.index) == set(theirs.index)
    shared = [metric for metric in theirs.columns if metric in METRICS]
    absent = {"de_direction_match", "de_spearman_lfc_sig", "de_sig_genes_recall"} - set(shared)
    for metric in absent:  # no observed significant gene at all: cell-eval2 has no row
        assert ours[metric].isna().all(), metric
    assert len(shared) + len(absent) == 26
    for metric in shared:
        np.testing.assert_allclose(
            ours[metric].to_numpy(),
            theirs.loc[ours.index, metric].to_numpy(),
            rtol=0,
            atol=1e-6,
            equal_nan=True,
            err_msg=metric,
        )


CONDITIONS, GENES = 40, 120


def some_tests(seed):
    """Tables with ties, infinite, zero and undefined fold changes, and conditions without any."""
    generator = np.random.default_rng(seed)
    shared = np.random.default_rng(0).normal(0, 1, (CONDITIONS, GENES))
    strength = np.random.default_rng(1).uniform(0, 3, (CONDITIONS, 1))
    lfc_PG = (strength * shared + generator.normal(0, 0.7, shared.shape)).round(1)
    p_PG = np.exp(-3 * np.abs(lfc_PG) * generator.uniform(0.2, 1, shared.shape)).round(4)
    p_PG[generator.random(CONDITIONS) < 0.15] = 1.0
    draw_PG = generator.random(shared.shape)
    for value, low in ((np.inf, 0.0), (-np.inf, 0.02), (0.0, 0.04), (np.nan, 0.08)):
        lfc_PG[(draw_PG >= low) & (draw_PG < low + 0.02)] = value
    fdr_PG = np.stack([benjamini_hochberg(p_G) for p_G in p_PG])
    return GeneTests(p_PG, fdr_PG.astype(np.float32), lfc_PG.astype(np.float32))


def as_frame(tests, labels, genes):
    return pd.DataFrame(
        {
            "target": np.repeat(labels, GENES),
            "feature": np.tile(genes, CONDITIONS),
            "log2_fold_change": tests.lfc_PG.reshape(-1).astype(np.float64),
            "p_value": tests.p_PG.reshape(-1),
            "fdr": tests.fdr_PG.reshape(-1).astype(np.float64),
        }
    )


def test_metrics_of_significant_genes_equal_cell_eval2_on_one_table(tmp_path):
    predicted, observed = some_tests(2), some_tests(3)
    genes = [f"g{g:03d}" for g in range(GENES)]  # equal genes are ordered by name there
    target_P = tuple(p if p % 3 == 0 else None for p in range(CONDITIONS))
    labels = [f"drug {p:03d}" if g is None else genes[g] for p, g in enumerate(target_P)]
    as_frame(predicted, labels, genes).to_parquet(tmp_path / "predicted.parquet")
    as_frame(observed, labels, genes).to_parquet(tmp_path / "observed.parquet")
    run_reference("run_cell_eval2_genes.py", tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    sides = (predicted, observed)
    ours = {
        "jaccard": significance.jaccard(*sides, target_P),
        "fold_change_nmae": significance.fold_change_nmae(*sides, target_P),
        "fold_change_nmae_of_10": significance.fold_change_nmae(*sides, target_P, minimum=10),
        "direction_yield": significance.direction_yield(*sides, target_P),
        "direction_reach": significance.direction_reach(*sides, target_P),
        # undefined is -1 there
        "matthews": np.nan_to_num(significance.matthews(*sides), nan=-1.0),
    }
    assert set(ours) == set(found)
    for name, values in ours.items():
        theirs = [found[name].get(label, np.nan) for label in labels]
        np.testing.assert_allclose(values, theirs, rtol=0, atol=1e-12, err_msg=name)
        assert len(np.unique(values)) > 10, name
    for name in ("fold_change_nmae", "direction_yield", "direction_reach"):
        assert np.isnan(ours[name]).any(), name
