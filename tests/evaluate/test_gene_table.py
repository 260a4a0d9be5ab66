"""The gene tests that cell-eval takes: every column against scipy and numpy."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import false_discovery_control, mannwhitneyu
from small_screen import evaluate, screen

from scale.evaluate.report import Report

COLUMNS = [
    "target",
    "feature",
    "target_mean",
    "ref_mean",
    "target_membership",
    "ref_membership",
    "log2_fold_change",
    "percent_change",
    "p_value",
    "statistic",
    "fdr",
]


@pytest.fixture(scope="module")
def made():
    adata = screen(90, lines=2, drugs=3, cells=20, controls=40, genes=30)
    values = adata.X.toarray()
    values[:, 3:5] = 0  # g3 in no cell, g4 in treated cells only
    values[np.flatnonzero(adata.obs["drug"] == "d1")[::4], 4] = 1.5
    adata.X = sp.csr_matrix(values)
    return adata, evaluate(adata, adata, profile="cell_eval", export_de=True)


def test_every_column_is_that_of_scipy(made):
    adata, evaluation = made
    assert set(evaluation.gene_tables) == {"L0", "L1"}
    table = evaluation.gene_tables["L1"]
    assert list(table.columns) == COLUMNS
    assert len(table) == 3 * 30
    line = (adata.obs["line"] == "L1").to_numpy()
    drug = adata.obs["drug"].to_numpy(str)
    control = adata.X[line & (drug == "DMSO")].toarray().astype(np.float64)
    for label, rows in table.groupby("target"):
        cells = adata.X[line & (drug == label)].toarray().astype(np.float64)
        test = mannwhitneyu(cells, control, method="asymptotic")
        p = np.where(np.isnan(test.pvalue), 1.0, test.pvalue)
        assert rows["feature"].tolist() == adata.var_names.tolist()
        np.testing.assert_allclose(rows["statistic"], test.statistic)
        np.testing.assert_allclose(rows["p_value"], p, rtol=1e-9)
        np.testing.assert_allclose(rows["fdr"], false_discovery_control(p), rtol=1e-5)
        mean, reference = (np.expm1(x.mean(axis=0)) for x in (cells, control))
        np.testing.assert_allclose(rows["target_mean"], mean, rtol=1e-6)
        np.testing.assert_allclose(rows["ref_mean"], reference, rtol=1e-6)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = mean / reference
        silent = (mean == 0) & (reference == 0)
        change = np.where(silent, 0.0, ratio - 1.0)
        np.testing.assert_allclose(rows["percent_change"], change, rtol=1e-5, atol=1e-6)
        with np.errstate(divide="ignore", invalid="ignore"):
            fold = np.where(silent, 0.0, np.log2(ratio))
        np.testing.assert_allclose(rows["log2_fold_change"], fold, rtol=1e-4, atol=1e-5)
        assert (rows["target_membership"] == 20).all()
        assert (rows["ref_membership"] == 40).all()


def test_the_table_is_written_if_asked(made, tmp_path, without_pictures):
    adata, evaluation = made
    Report(evaluation).save(tmp_path / "with")
    assert (tmp_path / "with" / "cell_eval" / "L0_real_de.csv").is_file()
    Report(evaluate(adata, adata, profile="cell_eval")).save(tmp_path / "without")
    assert not list((tmp_path / "without").rglob("*real_de*"))
