"""The ceiling is what a repeated experiment scores, and the scale between baseline and ceiling."""

import numpy as np
import pandas as pd
import pytest
from small_screen import evaluate, hold_out, screen

from scale.evaluate.aggregate import aggregate, full_depth_bound
from scale.evaluate.baselines import BASELINES
from scale.evaluate.report import Report
from scale.evaluate.scaled import add_scaled

CORRELATIONS = ("pearson_delta", "residual_pearson", "shared_pearson", "modulation_pearson")
SETS = (
    "overlap_at_N",
    "precision_at_N",
    "pr_auc",
    "sig_jaccard",
    "de_spearman_lfc_sig",
    "de_direction_match",
)


@pytest.fixture(scope="module")
def repeated():
    """An experiment and its repeat: two halves of one of twice the size, each with its controls."""
    adata = screen(
        11, lines=3, drugs=16, cells=100, controls=1600, genes=150, strength=0.8, own=0.3
    )
    number = adata.obs.groupby(["line", "drug"], observed=True).cumcount().to_numpy()
    observed, repeat = (adata[number % 2 == part].copy() for part in (0, 1))
    pairs = [(f"L{c}", f"d{p}") for c in range(3) for p in range(12)]
    train, observed = hold_out(observed, pairs)
    _, predicted = hold_out(repeat, pairs)
    return evaluate(
        {"repeat": predicted}, observed, train, ceiling=True, baselines=True, num_splits=3
    )


def row(evaluation, method, metric):
    table = evaluation.aggregate
    found = table[(table["method"] == method) & (table["metric"] == metric)]
    return found[found["form"] == "cells"].iloc[0]


@pytest.mark.parametrize("metric", CORRELATIONS)
def test_correlations_at_full_depth_are_those_of_a_repeat(repeated, metric):
    ceiling, repeat = row(repeated, "replicate", metric), row(repeated, "repeat", metric)
    assert ceiling["mean_full_depth"] == pytest.approx(repeat["mean"], abs=0.03)
    assert ceiling["mean"] < repeat["mean"]


@pytest.mark.parametrize("metric", ["mse", "mae"])
def test_errors_at_full_depth_are_those_of_a_repeat(repeated, metric):
    ceiling, repeat = row(repeated, "replicate", metric), row(repeated, "repeat", metric)
    assert ceiling["mean_full_depth"] == pytest.approx(repeat["mean"], rel=0.05)


@pytest.mark.parametrize("metric", SETS)
def test_set_metrics_have_a_bracket_around_a_repeat(repeated, metric):
    ceiling, repeat = row(repeated, "replicate", metric), row(repeated, "repeat", metric)
    assert np.isnan(ceiling["mean_full_depth"])
    assert ceiling["mean"] - 0.02 < repeat["mean"] < ceiling["mean_full_depth_bound"] + 0.02
    assert ceiling["ceiling"] == pytest.approx(ceiling["mean"])  # never the upper end


def test_a_repeat_is_one_on_the_scale(repeated):
    for metric in ("pearson_delta", "residual_pearson", "mse"):
        found = row(repeated, "repeat", metric)
        assert found["scaled_reason"] == ""
        assert found["scaled"] == pytest.approx(1, abs=0.15)
        assert found["baseline"] in BASELINES
        assert found["ceiling_full_depth_sd"] > 0


def test_the_other_convention_is_zero_for_cells_of_the_perturbation_mean(repeated):
    for metric in ("pearson_delta", "residual_pearson", "overlap_at_N"):
        mean = row(repeated, "perturbation_mean", metric)
        assert mean["scaled_perturbation_mean"] == pytest.approx(0, abs=1e-12)
    repeat = row(repeated, "repeat", "residual_pearson")
    assert repeat["scaled_perturbation_mean"] >= repeat["scaled"] - 1e-12 or repeat["scaled"] > 1


def test_the_bracket_is_told_in_the_report(repeated):
    bound = row(repeated, "replicate", "overlap_at_N")["mean_full_depth_bound"]
    assert f"(of all cells at most {bound:.3f})" in Report(repeated).markdown()


def test_only_set_and_ranking_metrics_of_genes_have_a_bracket():
    assert full_depth_bound("overlap_at_N", 0.5) == pytest.approx(2 / 3)
    assert np.isnan(full_depth_bound("overlap_at_N", 0.0))
    for metric in ("pearson_delta", "mse", "retrieval_l2", "lfc_nmae", "energy_ratio"):
        assert np.isnan(full_depth_bound(metric, 0.5))


# --- the scale by hand --------------------------------------------------------------------------


def table_of(metric, **methods):
    """Methods -> one value per context; a context is a unit of two equal conditions."""
    return pd.DataFrame(
        [
            {
                "method": method,
                "form": "cells",
                "metric": metric,
                "unit": f"u{u}",
                "context": f"u{u}",
                "perturbation": f"p{p}",
                "value": value,
                "reason": "",
            }
            for method, values in methods.items()
            for u, value in enumerate(values)
            for p in range(2)
        ]
    )


def splits_of(metric, *values):
    """Splits -> one value for every one of three contexts."""
    return pd.DataFrame(
        [(s, f"u{u}", f"u{u}", metric, v) for s, v in enumerate(values) for u in range(3)],
        columns=["split", "unit", "context", "metric", "value"],
    )


def scaled(scores, splits):
    return add_scaled(aggregate(scores), scores, splits, tuple(BASELINES)).set_index("method")


def test_halves_that_do_not_agree_give_no_ceiling():
    scores = table_of(
        "pearson_delta", model=[0.2] * 3, additive=[-0.3] * 3, replicate=[-0.02, 0.0, -0.01]
    )
    found = scaled(scores, splits_of("pearson_delta", -0.01, -0.02)).loc["model"]
    assert np.isnan([found["scaled"], found["ceiling"]]).all()
    assert found["scaled_reason"].startswith("no ceiling: the halves")


@pytest.mark.parametrize(("sd", "has_room"), [(0.01, True), (0.05, False)])
def test_headroom_is_measured_at_the_depth_of_the_ceiling(sd, has_room):
    """r = .1 is .18 at full depth, where its sd over splits is 1.65 times as large."""
    scores = table_of("pearson_delta", model=[0.1] * 3, additive=[0.02] * 3, replicate=[0.1] * 3)
    half = splits_of("pearson_delta", 0.1 - sd, 0.1, 0.1 + sd)
    found = scaled(scores, half).loc["model"]
    assert found["ceiling_sd"] == pytest.approx(sd)
    assert found["ceiling_full_depth_sd"] == pytest.approx(2 / 1.1**2 * sd, rel=0.02)
    if has_room:
        assert found["scaled"] == pytest.approx((0.1 - 0.02) / (0.2 / 1.1 - 0.02))
    else:
        assert np.isnan(found["scaled"])
        assert found["scaled_reason"].startswith("no headroom")


def test_a_set_metric_is_scaled_to_the_replicate_at_half_depth():
    scores = table_of("overlap_at_N", model=[0.7] * 3, additive=[0.2] * 3, replicate=[0.6] * 3)
    found = scaled(scores, splits_of("overlap_at_N", 0.59, 0.61)).loc["model"]
    assert found["ceiling"] == pytest.approx(0.6)
    assert found["scaled"] == pytest.approx(0.5 / 0.4)  # passes 1: conservative
