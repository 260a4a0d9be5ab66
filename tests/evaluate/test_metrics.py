"""Metrics against references, and what they say where the answer is known."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

from scale.evaluate import metrics, significance
from scale.evaluate.distances import energy_distance, fit_space, within_distance
from scale.evaluate.statistics import GeneTests


def table_of(fdr, lfc):
    fdr = np.asarray(fdr, np.float32)
    return GeneTests(fdr.astype(np.float64), fdr, np.asarray(lfc, np.float32))


def random_tests(seed, conditions=4, genes=60):
    generator = np.random.default_rng(seed)
    fdr = generator.random((conditions, genes)) ** 4
    return table_of(fdr, generator.normal(size=(conditions, genes)))


def test_pearson_equals_numpy_and_is_undefined_for_constants():
    x_PG, y_PG = np.random.default_rng(0).normal(size=(2, 3, 20))
    x_PG[1] = 0.25
    found = metrics.pearson(x_PG, y_PG)
    assert np.isnan(found[1])
    for p in (0, 2):
        assert found[p] == pytest.approx(np.corrcoef(x_PG[p], y_PG[p])[0, 1], abs=1e-14)


def test_rounding_noise_is_no_signal():
    x_PG = 1e-16 * np.random.default_rng(0).normal(size=(1, 20))
    assert np.isnan(metrics.pearson(x_PG, np.arange(20.0)[None])[0])


def test_areas_equal_scikit_learn():
    predicted, observed = random_tests(1), random_tests(2)
    predicted.fdr_PG[0, :30] = predicted.fdr_PG[0, 0]  # ties
    predicted.fdr_PG[1, :9] = 0.0
    found = metrics.ranking_areas(predicted, observed)
    score_PG = -np.log10(np.clip(predicted.fdr_PG, 1e-10, 1))
    for p, label_G in enumerate(observed.significant_PG):
        expected = average_precision_score(label_G, score_PG[p])
        assert found["pr_auc"][p] == pytest.approx(expected, abs=1e-12)
        assert found["roc_auc"][p] == pytest.approx(roc_auc_score(label_G, score_PG[p]), abs=1e-12)


def test_areas_need_two_classes():
    none = table_of(np.ones((1, 5)), np.zeros((1, 5)))
    found = metrics.ranking_areas(random_tests(0, 1, 5), none)
    assert np.isnan(found["pr_auc"][0])
    assert np.isnan(found["roc_auc"][0])


def test_overlap_and_precision_by_hand():
    #            significant    observed order: g2 (inf), g0, g1; predicted order: g3, g0
    observed = table_of([[0.01, 0.01, 0.01, 0.5]], [[-2.0, 1.0, np.inf, 9.0]])
    predicted = table_of([[0.01, 0.5, 0.5, 0.01]], [[1.0, 5.0, 5.0, -3.0]])
    found = metrics.overlaps(predicted, observed)
    assert found["overlap_at_N"][0] == pytest.approx(1 / 3)
    assert found["precision_at_N"][0] == 0.5
    assert metrics.recall(predicted, observed)[0] == pytest.approx(1 / 3)
    assert significance.jaccard(predicted, observed)[0] == 0.25
    assert metrics.direction_match(predicted, observed)[0] == pytest.approx(2 / 3)


def test_nothing_significant_anywhere_gives_zero_overlap():
    some, none = random_tests(3), table_of(np.ones((4, 60)), np.zeros((4, 60)))
    for pair in ((some, none), (none, some)):
        assert all((values == 0).all() for values in metrics.overlaps(*pair).values())
    assert np.isnan(metrics.recall(some, none)).all()
    assert metrics.spearman_significant(some, none) == 1.0


def test_fold_change_metrics_against_references():
    predicted, observed = random_tests(4), random_tests(5)
    found = metrics.spearman_fold_change(predicted, observed)
    for p, chosen in enumerate(observed.significant_PG):
        expected = spearmanr(predicted.lfc_PG[p, chosen], observed.lfc_PG[p, chosen]).statistic
        assert found[p] == pytest.approx(expected, abs=1e-12)
    zero = table_of(np.ones((4, 60)), np.zeros((4, 60)))
    assert significance.fold_change_nmae(zero, observed) == pytest.approx(np.ones(4))
    assert significance.fold_change_nmae(observed, observed) == pytest.approx(np.zeros(4))


def test_infinite_fold_changes_are_left_out_or_read_as_none():
    observed = table_of([[0.01, 0.01]], [[np.inf, 2.0]])
    predicted = table_of([[0.01, 0.01]], [[1.0, np.inf]])
    assert significance.fold_change_nmae(predicted, observed)[0] == 1.0


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_retrieval_of_the_truth_is_perfect_and_of_one_answer_is_chance(metric):
    observed_PG = np.random.default_rng(6).normal(size=(9, 30))
    skip = (None,) * 9
    own = metrics.distances(observed_PG, observed_PG, metric, skip)
    assert metrics.retrieval(own).tolist() == [1.0] * 9
    assert metrics.discrimination_score(own).tolist() == [1.0] * 9
    same = metrics.distances(np.tile(observed_PG[:1], (9, 1)), observed_PG, metric, skip)
    assert metrics.retrieval(same).mean() == pytest.approx(0.5)
    assert metrics.discrimination_score(same).mean() == pytest.approx(10 / 18)


def test_ties_count_half_in_retrieval_and_by_position_in_discrimination():
    tied = np.ones((4, 4))
    assert metrics.retrieval(tied).tolist() == [0.5] * 4
    assert metrics.discrimination_score(tied).tolist() == [1.0, 0.75, 0.5, 0.25]
    assert np.isnan(metrics.retrieval(np.ones((1, 1)))).all()


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_a_target_gene_is_left_out_of_its_row_only(metric):
    x_PG, y_PG = np.random.default_rng(7).normal(size=(2, 3, 6))
    found = metrics.distances(x_PG, y_PG, metric, (None, 4, None))
    keep = [0, 1, 2, 3, 5]
    plain = metrics.distances(x_PG, y_PG, metric, (None,) * 3)
    cut = metrics.distances(x_PG[:, keep], y_PG[:, keep], metric, (None,) * 3)
    assert found[[0, 2]] == pytest.approx(plain[[0, 2]], rel=1e-12)
    assert found[1] == pytest.approx(cut[1], rel=1e-12)


def test_energy_distance_is_unbiased():
    generator = np.random.default_rng(8)
    draws = [
        energy_distance(generator.normal(size=(12, 5)), generator.normal(size=(30, 5)))
        for _ in range(400)
    ]
    error = np.std(draws) / len(draws) ** 0.5
    assert abs(np.mean(draws)) < 4 * error  # false alarm 6e-5; the biased form is off by 20 errors
    assert energy_distance(generator.normal(size=(50, 5)), generator.normal(2, 1, (50, 5))) > 1


def test_energy_distance_by_its_formula():
    generator = np.random.default_rng(9)
    x, y = generator.normal(size=(6, 3)), generator.normal(size=(7, 3))

    def mean(a, b, *, distinct=False):
        pairs = [
            np.linalg.norm(p - q)
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not distinct or i != j
        ]
        return float(np.mean(pairs))

    expected = 2 * mean(x, y) - mean(x, x, distinct=True) - mean(y, y, distinct=True)
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-12)
    assert within_distance(x) == pytest.approx(mean(x, x, distinct=True), rel=1e-12)


@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
def test_principal_components_equal_the_singular_vectors(shape):
    cells = np.random.default_rng(10).gamma(0.5, 1.0, shape).astype(np.float32)
    space = fit_space([sp.csr_matrix(cells)], np.random.default_rng(0), count=5)
    centred = cells - cells.mean(axis=0)
    axes = np.linalg.svd(centred.astype(np.float64), full_matrices=False)[2][:5]
    assert np.abs(axes @ space.basis_GK) == pytest.approx(np.eye(5), abs=1e-6)
    points = space.project(sp.csr_matrix(cells))
    assert np.abs(points) == pytest.approx(np.abs(centred @ axes.T), abs=1e-5)


def test_the_catalogue_names_every_metric_once_with_a_direction():
    for name, row in metrics.METRICS.items():
        assert row.name == name
        assert row.better in ("higher", "lower", "none")
        if row.group in ("residual", "retrieval"):
            assert np.isfinite(row.no_skill)
