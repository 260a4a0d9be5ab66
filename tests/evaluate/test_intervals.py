"""Intervals cover what they say over units, and there is none where there cannot be one."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from scipy.stats import t as student_t
from small_screen import KEYS, hold_out, screen

import scale
from scale.config import ProtocolConfig
from scale.evaluate.aggregate import aggregate, condition_values, paired_gain
from scale.evaluate.protocol import split_controls
from scale.evaluate.statistics import count_signs, t_interval

REPEATS, CONDITIONS = 4000, 100
UNIT_SD, CONDITION_SD, TRUTH = 0.08, 0.15, 0.3


def unit_means(num_units, seed, repeats=REPEATS):
    """Unit means of simulated screens whose conditions share what is particular to their unit."""
    generator = np.random.default_rng(seed)
    units = TRUTH + generator.normal(0, UNIT_SD, (repeats, num_units))
    return units + generator.normal(0, CONDITION_SD / np.sqrt(CONDITIONS), units.shape)


@pytest.mark.parametrize("num_units", [3, 5, 12])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_over_units_cover_what_they_say(num_units, confidence):
    intervals = [t_interval(u, confidence=confidence) for u in unit_means(num_units, num_units)]
    covered = np.mean([i.low <= TRUTH <= i.high for i in intervals])
    assert abs(covered - confidence) < 0.025  # 95 %: within 92.5 to 97.5, a standard error is .35
    if confidence == 0.95:
        assert 0.92 <= covered <= 0.97


def table_of(values_UP, method="m", form="cells"):
    """A long table: units x conditions of one metric, a context per unit."""
    num_units, num_conditions = values_UP.shape
    units = np.repeat([f"u{u}" for u in range(num_units)], num_conditions)
    return pd.DataFrame(
        {
            "method": method,
            "form": form,
            "metric": "pearson_delta",
            "unit": units,
            "context": units,
            "perturbation": np.tile([f"p{p}" for p in range(num_conditions)], num_units),
            "value": values_UP.ravel(),
            "reason": "",
        }
    )


def test_the_aggregate_interval_covers_and_one_over_conditions_would_not():
    """Five units of 40 conditions: the report's interval, and one that takes all as independent."""
    generator, repeats = np.random.default_rng(1), 150
    covered, covered_by_conditions = 0, 0
    for _ in range(repeats):
        values_UP = TRUTH + generator.normal(0, UNIT_SD, (5, 1))
        values_UP = values_UP + generator.normal(0, CONDITION_SD, (5, 40))
        row = aggregate(table_of(values_UP)).iloc[0]
        covered += row["low"] <= TRUTH <= row["high"]
        draws = generator.choice(values_UP.ravel(), (200, values_UP.size)).mean(axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        covered_by_conditions += low <= TRUTH <= high
    assert covered / repeats > 0.90  # 2.8 standard errors below 95 %
    assert covered_by_conditions / repeats < 0.6


def test_paired_intervals_cover_and_forget_what_units_do_to_both():
    generator = np.random.default_rng(4)
    covered, widths, plain = 0, [], []
    repeats, num_units = 100, 5
    for _ in range(repeats):
        unit = generator.normal(0, 0.5, (num_units, 1))  # hard and easy lines
        own = unit + 0.1 + generator.normal(0, 0.05, (num_units, 1))
        model = table_of(own + generator.normal(0, 0.1, (num_units, 10)))
        rival = table_of(unit + generator.normal(0, 0.1, (num_units, 10)))
        gain = paired_gain(condition_values(model), condition_values(rival), better="higher")
        covered += gain.interval.low <= 0.1 <= gain.interval.high
        widths.append(gain.interval.high - gain.interval.low)
        single = t_interval(model.groupby("unit")["value"].mean().to_numpy())
        plain.append(single.high - single.low)
    assert covered / repeats > 0.88  # 3 standard errors below 95 %
    assert np.mean(widths) < 0.3 * np.mean(plain)


def test_more_conditions_of_the_same_units_do_not_narrow_the_interval():
    generator = np.random.default_rng(2)
    units = generator.normal(0, 1, (4, 1))
    few, many = (aggregate(table_of(np.tile(units, (1, n)))).iloc[0] for n in (2, 200))
    assert (few["low"], few["high"]) == pytest.approx((many["low"], many["high"]))
    half = student_t.ppf(0.975, 3) * units.std(ddof=1) / 2
    assert many["high"] - many["mean"] == pytest.approx(half)


@pytest.mark.parametrize("num_units", [1, 2])
def test_the_table_says_why_there_is_no_interval(num_units):
    row = aggregate(table_of(np.arange(4.0 * num_units).reshape(num_units, 4))).iloc[0]
    assert np.isnan([row["low"], row["high"]]).all()
    assert np.isfinite([row["mean"], row["mean_over_conditions"]]).all()
    assert row["reason"] == f"fewer than 3 contexts ({num_units}): no interval"
    assert aggregate(table_of(np.ones((3, 4)))).iloc[0]["reason"] == ""


def test_a_unit_of_several_contexts_is_called_so():
    table = table_of(np.ones((4, 3)))
    table["unit"] = table["unit"].replace({"u1": "u0", "u3": "u2"})
    assert aggregate(table)["reason"].tolist() == [
        "fewer than 3 independent units (2): no interval"
    ]


@pytest.mark.parametrize("num_lines", [1, 2])
def test_the_report_prints_no_interval_below_three_units(num_lines):
    adata = screen(8, lines=num_lines + 2, drugs=5, cells=20, controls=40, own=0.4)
    pairs = [(f"L{c}", f"d{p}") for c in range(num_lines) for p in range(3)]
    train, observed = hold_out(adata, pairs)
    observed = split_controls(observed, **KEYS)
    predicted = observed[:, :].copy()
    protocol = ProtocolConfig(ceiling=False, min_cells=8)
    report = scale.evaluate(predicted, observed, train=train, protocol=protocol, **KEYS)
    text = report.markdown()
    assert report.aggregate[["low", "high"]].isna().all(axis=None)
    verdict = text[text.index("## Verdict") : text.index("## Scores")]
    assert "[" not in verdict
    assert "Fewer than 3 contexts: no interval; gain by context: L0 " in verdict
    words = (
        "One independent unit only (L0)" if num_lines == 1 else "2 independent units only (L0, L1)"
    )
    assert f"{words}, fewer than 3: no interval" in verdict
    assert "beats" not in verdict


def test_sign_counts_equal_the_binomial_test():
    generator = np.random.default_rng(3)
    for size in (1, 2, 5, 9):
        gains = generator.normal(0.3, 1, size)
        signs = count_signs(gains)
        assert (signs.num_better, signs.num_units) == ((gains > 0).sum(), size)
        assert signs.p == pytest.approx(binomtest(int((gains > 0).sum()), size).pvalue)
    assert count_signs(np.ones(5)).p == 0.0625
    assert count_signs(np.ones(6)).best_p < 0.05 < count_signs(np.ones(5)).best_p
    assert count_signs(np.zeros(4)).p == 1.0
    assert count_signs(np.array([1.0, 0.0, 1.0])).p == pytest.approx(0.5)  # a tie says nothing
