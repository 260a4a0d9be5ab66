"""Metrics against references, and what they say where the answer is known."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import spearmanr, wasserstein_distance
from sklearn.metrics import average_precision_score, matthews_corrcoef, roc_auc_score

from scale.evaluate import metrics, significance
from scale.evaluate.across_contexts import modulation_pearson, shared_pearson
from scale.evaluate.distances import (
    energy_distance,
    fit_space,
    random_directions,
    sliced_wasserstein,
    spread,
    squared_mmd,
    within_distance,
)
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


def undirected(seed):
    """Random tests with infinite, zero and undefined fold changes, ties, and target genes."""
    predicted, observed = random_tests(seed, 6), random_tests(seed + 1, 6)
    generator = np.random.default_rng(seed)
    for table in (predicted, observed):
        for value in (np.inf, -np.inf, 0.0, np.nan):
            table.lfc_PG[generator.random(table.lfc_PG.shape) < 0.05] = value
        table.fdr_PG[:] = np.round(table.fdr_PG, 2)  # ties, which p-values break
        table.p_PG[:] = table.fdr_PG / 2 + generator.integers(0, 3, table.p_PG.shape) * 1e-3
    predicted.fdr_PG[4], observed.fdr_PG[5] = 1.0, 1.0
    return predicted, observed, (None, 7, int(np.argmin(observed.fdr_PG[2])), 0, None, 3)


def sign(value):
    return 0 if np.isnan(value) or value == 0 else (1 if value > 0 else -1)


@pytest.mark.parametrize("seed", range(3))
def test_agreement_of_calls_by_brute_force(seed):
    predicted, observed, targets = undirected(10 * seed)
    found = {
        name: getattr(significance, name)(predicted, observed, targets)
        for name in ("jaccard", "direction_yield", "direction_reach")
    }
    for p, target in enumerate(targets):
        genes = [g for g in range(60) if g != target]
        lfc = observed.lfc_PG[p], predicted.lfc_PG[p]
        real = {g for g in genes if observed.fdr_PG[p, g] < 0.05}
        called = {g for g in genes if predicted.fdr_PG[p, g] < 0.05}
        union = real | called
        assert found["jaccard"][p] == (len(real & called) / len(union) if union else 1.0)
        equal = {g for g in genes if sign(lfc[0][g]) and sign(lfc[0][g]) == sign(lfc[1][g])}
        judged = {g for g in called if sign(lfc[0][g])}
        whole = max(len(judged), len(real))
        expected = len(judged & equal) / whole if whole else np.nan
        assert found["direction_yield"][p] == pytest.approx(expected, nan_ok=True)

        def place(g, p=p, called=called):
            size = abs(predicted.lfc_PG[p, g])
            rates = predicted.fdr_PG[p, g], predicted.p_PG[p, g]
            return (g not in called, *rates, 1.0 if np.isnan(size) else -size, g)

        order = sorted((g for g in real if sign(lfc[0][g])), key=place)
        depths = [k for k in range(1, len(order) + 1) if 10 * len(equal & set(order[:k])) >= 9 * k]
        expected = max(depths, default=0) / len(real) if real else np.nan
        assert found["direction_reach"][p] == pytest.approx(expected, nan_ok=True)
    assert (np.isfinite(found["direction_reach"])).sum() == 5


def test_matthews_correlation_equals_scikit_learn():
    predicted, observed = random_tests(11), random_tests(12)
    predicted.fdr_PG[3] = 1.0  # calls nothing
    found = significance.matthews(predicted, observed)
    for p in range(3):
        expected = matthews_corrcoef(observed.significant_PG[p], predicted.significant_PG[p])
        assert found[p] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(found[3])
    assert significance.matthews(observed, observed) == pytest.approx(np.ones(4))


def test_calls_of_the_truth_are_perfect_and_the_target_gene_counts_for_nothing():
    observed = random_tests(13)
    targets = tuple(int(g) for g in observed.fdr_PG.argmin(axis=1))
    other = table_of(observed.fdr_PG.copy(), observed.lfc_PG.copy())
    for p, gene in enumerate(targets):
        other.fdr_PG[p, gene], other.lfc_PG[p, gene] = 1.0, -100 * observed.lfc_PG[p, gene]
    for name in ("jaccard", "direction_yield", "direction_reach"):
        assert getattr(significance, name)(other, observed, targets).tolist() == [1.0] * 4
    for name in ("jaccard", "direction_yield"):
        assert (getattr(significance, name)(other, observed) < 1).all()
    assert significance.fold_change_nmae(other, observed, targets).tolist() == [0.0] * 4
    assert (significance.fold_change_nmae(other, observed) > 0).all()


def test_a_prediction_that_calls_nothing_yields_nothing():
    observed, none = random_tests(14), table_of(np.ones((4, 60)), np.zeros((4, 60)))
    assert significance.direction_yield(none, observed).tolist() == [0.0] * 4
    assert significance.direction_reach(none, observed).tolist() == [0.0] * 4
    assert np.isnan(significance.direction_yield(none, none)).all()
    enough = int(observed.significant_PG[0].sum())
    for minimum, defined in ((enough, True), (enough + 1, False)):
        value = significance.fold_change_nmae(none, observed, minimum=minimum)[0]
        assert np.isfinite(value) == defined


def test_nine_of_ten_signs_are_pure_and_depth_may_recover():
    fdr = np.linspace(1e-4, 1e-2, 10)[None]
    observed = table_of(fdr, np.ones((1, 10)))
    first_wrong = np.ones((1, 10))
    first_wrong[0, 0] = -1
    assert significance.direction_reach(table_of(fdr, first_wrong), observed)[0] == 1.0
    first_wrong[0, 1] = -1
    assert significance.direction_reach(table_of(fdr, first_wrong), observed)[0] == 0.0


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


def test_mmd_by_its_formula_and_unbiased():
    generator = np.random.default_rng(15)
    x, y, scale = generator.normal(size=(6, 3)), generator.normal(1, 1, (7, 3)), 2.5

    def kernel(a, b):
        square = ((a - b) ** 2).sum()
        return np.mean([np.exp(-square / (2 * w * scale)) for w in (0.5, 1, 2, 4)])

    def mean(a, b, *, distinct=False):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not distinct or i != j]
        return float(np.mean([kernel(a[i], b[j]) for i, j in pairs]))

    expected = mean(x, x, distinct=True) + mean(y, y, distinct=True) - 2 * mean(x, y)
    assert squared_mmd(x, y, scale) == pytest.approx(expected, rel=1e-10)
    squares = [((x[i] - x[j]) ** 2).sum() for i in range(6) for j in range(i)]
    # the median of an even count is a mean of two distances, not of their squares
    assert spread([x]) == pytest.approx(np.median(np.sqrt(squares)) ** 2, rel=1e-12)
    draws = [
        squared_mmd(generator.normal(size=(12, 3)), generator.normal(size=(30, 3)), 6.0)
        for _ in range(400)
    ]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 20  # false alarm 6e-5
    assert np.isnan(squared_mmd(x[:1], y, scale))
    assert np.isnan(squared_mmd(x, y, 0.0))


@pytest.mark.parametrize("sizes", [(9, 9), (9, 14), (8, 4), (1, 5)])
def test_sliced_wasserstein_equals_scipy_in_each_direction(sizes):
    generator = np.random.default_rng(16)
    x, y = (generator.normal(p, 1, (size, 4)) for p, size in enumerate(sizes))
    direction_KD = random_directions(4, generator)
    assert np.linalg.norm(direction_KD, axis=0) == pytest.approx(np.ones(128))
    expected = np.mean([wasserstein_distance(x @ d, y @ d) for d in direction_KD.T])
    assert sliced_wasserstein(x, y, direction_KD) == pytest.approx(expected, rel=1e-12)
    assert sliced_wasserstein(x, x[::-1], direction_KD) == 0.0


def test_a_residual_is_what_least_squares_leave():
    generator = np.random.default_rng(17)
    x_PG, effect_KG = generator.normal(size=(2, 30)), generator.normal(size=(3, 30))
    design = np.column_stack([np.ones(30), *effect_KG])
    expected = [x - design @ np.linalg.lstsq(design, x, rcond=None)[0] for x in x_PG]
    centred = effect_KG - effect_KG.mean(axis=1, keepdims=True)
    basis_KG = np.linalg.svd(centred, full_matrices=False)[2]
    assert metrics.residual(x_PG, basis_KG) == pytest.approx(np.stack(expected), abs=1e-12)


def test_shared_and_modulated_changes_are_told_apart():
    generator = np.random.default_rng(18)
    mean_G, apart_CG = generator.normal(size=40), generator.normal(size=(3, 40))
    apart_CG -= apart_CG.mean(axis=0)
    truth_CG = mean_G + apart_CG
    assert shared_pearson(mean_G + 0 * apart_CG, truth_CG) == pytest.approx(1)
    assert np.isnan(modulation_pearson(mean_G + 0 * apart_CG, truth_CG)).all()
    assert modulation_pearson(5.0 + apart_CG, truth_CG) == pytest.approx(np.ones(3))
    assert np.isnan(shared_pearson(5.0 + 1e-9 * apart_CG, truth_CG))
    wrong_CG = generator.normal(size=(3, 40))
    expected = [
        np.corrcoef(w, t)[0, 1]
        for w, t in zip(wrong_CG - wrong_CG.mean(axis=0), apart_CG, strict=True)
    ]
    assert modulation_pearson(wrong_CG, truth_CG) == pytest.approx(expected, abs=1e-12)


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
        if row.group in ("residual", "contexts", "retrieval"):
            assert np.isfinite(row.no_skill)
    assert set(metrics.PAPER_NAMES.values()) <= set(metrics.METRICS)
