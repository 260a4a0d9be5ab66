"""The gene test against scipy, and the coverage of intervals."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, mannwhitneyu

from scale.evaluate import statistics
from scale.evaluate.statistics import (
    benjamini_hochberg,
    column_means,
    gene_tests,
    log2_fold_change,
    rank_sum,
    t_interval,
)


def rank_sum_of(control, cells):
    """(U, p) of every gene, of one condition."""
    u_PG, p_PG = rank_sum(sp.csr_matrix(control), [sp.csr_matrix(cells)])
    return u_PG[0], p_PG[0]


def assert_equals_scipy(cells, control):
    u_G, p_G = rank_sum_of(control, cells)
    # scipy computes in the precision of its input
    cells, control = cells.astype(np.float64), control.astype(np.float64)
    for g in range(cells.shape[1]):
        result = mannwhitneyu(cells[:, g], control[:, g], method="asymptotic")
        assert u_G[g] == result.statistic
        expected = 1.0 if np.isnan(result.pvalue) else result.pvalue
        assert p_G[g] == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize(("num_cells", "num_control"), [(2, 10), (40, 100), (130, 60)])
def test_u_and_p_equal_scipy_with_ties_and_zeros(num_cells, num_control):
    generator = np.random.default_rng(num_cells)
    rate = np.array([0.0, 0.05, 0.5, 2.0, 30.0])
    cells = np.log1p(generator.poisson(rate * 1.3, (num_cells, 5))).astype(np.float32)
    control = np.log1p(generator.poisson(rate, (num_control, 5))).astype(np.float32)
    control[:, 4] += generator.random(num_control, dtype=np.float32)  # no ties, no zeros
    assert_equals_scipy(cells, control)


def test_special_genes_equal_scipy():
    # all zero; all equal; expressed on one side only, either side; perfectly separated
    cells = np.array([[0, 2, 0, 1, 5], [0, 2, 0, 3, 6], [0, 2, 0, 3, 7]], np.float32)
    control = np.array([[0, 2, 1, 0, 1], [0, 2, 4, 0, 2]] * 4, np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        u_G, p_G = rank_sum_of(control, cells)
    assert p_G[0] == p_G[1] == 1.0
    assert_equals_scipy(cells[:, 2:], control[:, 2:])
    assert u_G[4] == cells.shape[0] * control.shape[0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(2, 12), st.integers(1, 4))
def test_any_small_table_equals_scipy(seed, num_cells, num_control, levels):
    generator = np.random.default_rng(seed)
    cells = generator.integers(0, levels + 1, (num_cells, 3)).astype(np.float32)
    control = generator.integers(0, levels + 1, (num_control, 3)).astype(np.float32)
    varies = np.ptp(np.vstack([cells, control]), axis=0) > 0
    if varies.any():
        assert_equals_scipy(cells[:, varies], control[:, varies])


def test_stored_zeros_do_not_count_as_values():
    dense = np.array([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]], np.float32)
    stored = sp.csr_matrix(np.ones_like(dense))
    stored.data[:] = dense.ravel()
    for a, b in zip(rank_sum_of(stored, stored), rank_sum_of(dense, dense), strict=True):
        assert a.tolist() == b.tolist()


def test_the_test_does_not_touch_its_input():
    cells = sp.csr_matrix(np.array([[3.0, 0.0], [1.0, 2.0], [2.0, 1.0]], np.float32))
    cells.data[0] = 0.0
    before = cells.copy()
    rank_sum(cells, [cells, cells])
    assert cells.data.tolist() == before.data.tolist()
    assert cells.indices.tolist() == before.indices.tolist()


@pytest.mark.parametrize(("at_once", "per_block"), [(1, 1), (150, 100), (10**6, 10**6)])
def test_conditions_tested_together_are_tested_as_if_alone(at_once, per_block, monkeypatch):
    generator = np.random.default_rng(2)
    rate = np.array([0.0, 0.0, 0.1, 0.5, 2.0, 9.0, 0.0])  # genes that nobody has, the last one too
    control, *conditions = (
        np.log1p(generator.poisson(rate, (size, 7))).astype(np.float32)
        for size in (30, 9, 1, 14, 40)
    )
    conditions.append(np.zeros((5, 7), np.float32))
    monkeypatch.setattr(statistics, "_VALUES_AT_ONCE", at_once)
    monkeypatch.setattr(statistics, "_VALUES_PER_BLOCK", per_block)
    u_PG, p_PG = rank_sum(sp.csr_matrix(control), [sp.csr_matrix(c) for c in conditions])
    for cells, u_G, p_G in zip(conditions, u_PG, p_PG, strict=True):
        below = (control[:, None] < cells).sum((0, 1)) + (control[:, None] == cells).sum((0, 1)) / 2
        assert u_G.tolist() == below.tolist()
        assert p_G.tolist() == rank_sum_of(control, cells)[1].tolist()


def test_benjamini_hochberg_equals_scipy():
    p_G = np.random.default_rng(0).random(500) ** 3
    p_G[:20] = p_G[20]
    assert benjamini_hochberg(p_G) == pytest.approx(false_discovery_control(p_G), rel=1e-14)


def test_fold_changes_have_no_pseudocount():
    lfc = log2_fold_change(np.array([0.0, 1.0, 0.0, 2.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    expected = np.log2(np.expm1(2.0) / np.expm1(1.0))
    assert lfc.tolist() == [0.0, np.inf, -np.inf, expected]


def test_fdr_is_taken_within_the_condition():
    generator = np.random.default_rng(1)
    control = sp.csr_matrix(generator.poisson(1.0, (80, 50)).astype(np.float32))
    quiet = sp.csr_matrix(generator.poisson(1.0, (30, 50)).astype(np.float32))
    loud = sp.csr_matrix(generator.poisson(9.0, (30, 50)).astype(np.float32))
    alone, together = (
        gene_tests(control, cells, np.stack([column_means(c) for c in cells]))
        for cells in ([quiet], [loud, quiet])
    )
    assert together.fdr_PG[1].tolist() == alone.fdr_PG[0].tolist()
    assert together.significant_PG[0].all()
    assert not together.significant_PG[1].any()


@pytest.mark.parametrize("units", [3, 5, 12])
def test_t_intervals_cover_what_they_say(units):
    draws = np.random.default_rng(units).normal(0.3, 0.1, (3000, units))
    intervals = [t_interval(draw) for draw in draws]
    covered = np.mean([i.low <= 0.3 <= i.high for i in intervals])
    assert 0.93 < covered < 0.97  # 5 standard errors of 3,000 repeats


def test_few_units_have_no_interval():
    interval = t_interval(np.array([0.2, np.nan, 0.4]))
    assert interval.mean == pytest.approx(0.3)
    assert np.isnan([interval.low, interval.high]).all()
    assert interval.reason == "fewer than 3 units (2): no interval"
    assert t_interval(np.array([1.0])).reason == "fewer than 3 units (1): no interval"
