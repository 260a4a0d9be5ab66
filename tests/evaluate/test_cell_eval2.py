"""The profile cell_eval gives the numbers of cell-eval2 with its preset cell-eval-0.7.6."""

import numpy as np
import pytest
from cell_eval_pairs import our_table, pairs, tables_of

from scale.evaluate.metrics import METRICS


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
