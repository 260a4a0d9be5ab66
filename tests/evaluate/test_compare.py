"""Comparisons: paired over units, seeds averaged first, unlike reports refused."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from example_evaluation import MODEL_QUALITY, example_evaluation
from scipy.stats import t as student_t
from small_screen import KEYS, hold_out, screen

import scale
from scale.config import Profile, ProtocolConfig
from scale.evaluate.baselines import BASELINES
from scale.evaluate.compare import compare, differences
from scale.evaluate.protocol import split_controls
from scale.evaluate.report import Report
from scale.evaluate.verdict import sentence

LINES, DRUGS = 4, 4


def shifted(observed, share, seed):
    """Predicted cells: each drug's observed change, a ``share`` of it, with noise of the seed."""
    generator = np.random.default_rng(seed)
    predicted = observed.copy()
    values = predicted.X.toarray()
    line, drug = (predicted.obs[c].to_numpy(str) for c in ("line", "drug"))
    for context in np.unique(line):
        control = values[(line == context) & (drug == "DMSO")]
        for label in np.unique(drug[line == context]):
            rows = (line == context) & (drug == label)
            if label != "DMSO":
                change = share * (values[rows].mean(axis=0) - control.mean(axis=0))
                change += generator.normal(0, 0.15, change.size)
                values[rows] = control[generator.integers(0, len(control), rows.sum())] + change
    predicted.X = sp.csr_matrix(np.maximum(values, 0).astype(np.float32))
    return predicted


@pytest.fixture(scope="module")
def cells():
    adata = screen(5, lines=LINES + 1, drugs=DRUGS + 2, cells=20, controls=40, own=0.3)
    pairs = [(f"L{c}", f"d{p}") for c in range(LINES) for p in range(DRUGS)]
    train, observed = hold_out(adata, pairs)
    return train, split_controls(observed, **KEYS)


def report_of(predicted, cells, *, seed=0, train=True, **protocol):
    return scale.evaluate(
        predicted,
        cells[1],
        train=cells[0] if train else None,
        seed=seed,
        protocol=ProtocolConfig(
            **{"baselines": False, "ceiling": False, "min_cells": 8} | protocol
        ),
        **KEYS,
    )


@pytest.fixture(scope="module")
def reports(cells):
    """Two models of three seeds each, the first the better."""
    return {
        name: [report_of(shifted(cells[1], share, seed), cells) for seed in seeds]
        for name, share, seeds in (("strong", 0.9, (1, 2, 3)), ("weak", 0.4, (4, 5, 6)))
    }


def values_of(report, metric):
    """(unit, perturbation) -> value: in these screens a context is a unit."""
    rows = report.scores[(report.scores["metric"] == metric) & (report.scores["method"] == "model")]
    return rows.set_index(["unit", "perturbation"])["value"]


@pytest.mark.parametrize("metric", ["residual_pearson", "mse"])
def test_gains_are_paired_and_seeds_are_averaged_first(reports, metric):
    row = compare(reports, reference="weak").set_index("metric").loc[metric]
    own, rival = (sum(values_of(r, metric) for r in reports[m]) / 3 for m in ("strong", "weak"))
    sign = -1 if metric == "mse" else 1
    units = (sign * (own - rival)).groupby("unit").mean()
    half = student_t.ppf(0.975, LINES - 1) * units.std(ddof=1) / np.sqrt(LINES)
    assert row["gain"] == pytest.approx(units.mean())
    assert (row["low"], row["high"]) == pytest.approx((units.mean() - half, units.mean() + half))
    assert row["mean"] - row["reference_mean"] == pytest.approx(sign * units.mean())
    assert (row["num_units"], row["num_conditions"]) == (LINES, LINES * DRUGS)
    assert row["num_units_better"] == (units > 0).sum()
    means = [values_of(r, metric).groupby("unit").mean().mean() for r in reports["strong"]]
    assert row["seed_sd"] == pytest.approx(np.std(means, ddof=1))
    assert row["outcome"] == ("better" if units.mean() > half else "open")
    assert row["seed_note"] == ""


def test_one_seed_is_named_as_such(reports):
    table = compare({"strong": reports["strong"][0], "weak": reports["weak"]}, reference="weak")
    assert (table["seed_note"] == "one seed: training variance not covered").all()
    assert (table["num_seeds"] == 1).all()
    assert table["seed_sd"].isna().all()
    assert table["reference_seed_sd"].notna().all()


def test_swapping_model_and_reference_turns_the_sign(reports):
    there, back = (compare(reports, reference=m).set_index("metric") for m in ("weak", "strong"))
    assert back["gain"].to_numpy() == pytest.approx(-there["gain"].to_numpy(), nan_ok=True)
    assert back["low"].to_numpy() == pytest.approx(-there["high"].to_numpy(), nan_ok=True)


def test_saved_reports_compare_like_those_in_memory(reports, tmp_path):
    strong, weak = reports["strong"][0], reports["weak"]
    strong.save(tmp_path / "strong")
    saved = {"strong": tmp_path / "strong", "weak": weak}
    pd.testing.assert_frame_equal(
        compare(saved, reference="weak"),
        compare({"strong": strong, "weak": weak}, reference="weak"),
    )
    with pytest.raises(FileNotFoundError, match="no scores.parquet"):
        compare({"strong": strong, "weak": tmp_path}, reference="weak")


def fewer(report, context, perturbation):
    """The same report without one condition."""
    scores = report.scores
    left_out = (scores["context"] == context) & (scores["perturbation"] == perturbation)
    return Report(dataclasses.replace(report.evaluation, scores=scores[~left_out]))


def test_unlike_reports_are_refused_by_name(cells, reports):
    model = shifted(cells[1], 0.9, 1)
    good = reports["weak"][0]
    other_cells = (cells[0], cells[1][: cells[1].n_obs - 1].copy())
    genes = [f"g{i}" for i in range(70)]
    fewer_genes = tuple(part[:, genes].copy() for part in cells)
    halved = split_controls(cells[1], seed=9, **KEYS)
    without = [cells[0][cells[0].obs["drug"] != "d5"].copy(), cells[1]]
    for words, report in {
        "observed cells": report_of(model[: model.n_obs - 1].copy(), other_cells),
        "gene list": report_of(model[:, genes].copy(), fewer_genes),
        r"split \(training cells\)": report_of(model, without),
        "profile": report_of(model, cells, profile=Profile.cell_eval),
        "control folds": report_of(model, (cells[0], halved)),
        "seed of the evaluation": report_of(model, cells, seed=1),
        "conditions scored by .* alone: L1 d2": fewer(good, "L1", "d2"),
    }.items():
        with pytest.raises(ValueError, match=f"cannot be compared(.|\n)*{words}"):
            compare({"strong": report, "weak": good}, reference="weak")


def test_every_difference_is_listed(cells, reports):
    other = report_of(shifted(cells[1], 0.9, 1), cells, profile=Profile.cell_eval, seed=3)
    with pytest.raises(ValueError, match="cannot be compared") as caught:
        compare({"strong": other, "weak": reports["weak"]}, reference="weak")
    for words in ("profile", "control rule", "control folds", "seed of the evaluation"):
        assert words in str(caught.value)
    assert "observed cells" not in str(caught.value)


def test_what_cannot_be_meant_is_refused(cells, reports):
    strong, weak = reports["strong"][0], reports["weak"][0]
    with pytest.raises(ValueError, match="'best' is not among the models strong, weak"):
        compare(reports, reference="best")
    with pytest.raises(ValueError, match="needs a second model"):
        compare({"weak": weak}, reference="weak")
    with pytest.raises(ValueError, match="no report was given"):
        compare({"strong": [], "weak": weak}, reference="weak")
    with pytest.raises(ValueError, match="same predicted cells"):
        compare({"strong": [strong, strong], "weak": weak}, reference="weak")
    both = report_of({"a": shifted(cells[1], 0.9, 1), "b": shifted(cells[1], 0.4, 2)}, cells)
    with pytest.raises(ValueError, match="holds the models a, b, none of them called 'strong'"):
        compare({"strong": both, "weak": weak}, reference="weak")
    table = compare({"a": both, "b": both}, reference="b").set_index("metric")
    assert table.loc["residual_pearson", "gain"] > 0
    unknown = Report(dataclasses.replace(weak.evaluation, meta={"profile": "strict"}))
    with pytest.raises(ValueError, match="meta has no observed_sha256"):
        compare({"strong": strong, "weak": unknown}, reference="weak")


@pytest.mark.parametrize("num_units", [1, 2])
def test_below_three_units_there_is_no_interval(cells, num_units):
    lines = [f"L{c}" for c in range(num_units)]
    few = tuple(part[part.obs["line"].isin([*lines, "L4"])].copy() for part in cells)
    reports = {
        name: report_of(shifted(few[1], share, 1), few, train=False)
        for name, share in (("strong", 0.9), ("weak", 0.4))
    }
    table = compare(reports, reference="weak")
    assert table[["low", "high"]].isna().all(axis=None)
    assert table["reason"].str.fullmatch(r"fewer than 3 .* \(\d\): no interval").all()
    assert (table["outcome"] == "open").all()
    row = table.set_index("metric").loc["pearson_delta"]
    assert row["reason"] == f"fewer than 3 contexts ({num_units}): no interval"
    assert row["gain_by_unit"].count("L") == num_units
    assert row["best_sign_p"] == 2 * 0.5**num_units


# --- one report ---------------------------------------------------------------------------------


def test_differences_are_those_of_the_sentences():
    evaluation = example_evaluation()
    table = differences(evaluation)
    report = Report(evaluation)
    assert set(table["model"]) == {"model"}
    assert not table.duplicated(["model", "metric", "unit"]).any()
    for found in report.findings.comparisons["model"]:
        rows = table[table["metric"] == found.metric]
        assert rows["unit"].tolist() == sorted(evaluation.scores["unit"].unique())
        assert (rows["baseline"] == found.baseline).all()
        assert rows["gain_in_unit"].mean() == pytest.approx(found.gain)
        assert rows["low"].tolist() == pytest.approx([found.low] * 5)
        assert (rows["num_units_better"] == (rows["gain_in_unit"] > 0).sum()).all()
        assert (rows["outcome"] == found.outcome).all()
        assert rows["num_conditions"].sum() == found.num_conditions
        assert (rows["best_sign_p"] == 0.0625).all()
    assert "5 of 5 is p = 0.0625 two-sided at best" in report.markdown()


def test_without_baselines_there_are_no_differences():
    table = differences(example_evaluation(quality={"model": 0.7}))
    assert len(table) == 0
    assert {"model", "baseline", "unit", "gain_in_unit", "low", "reason"} <= set(table.columns)


@pytest.mark.parametrize("num_contexts", [1, 2])
def test_few_units_are_told_one_by_one(num_contexts):
    evaluation = example_evaluation(num_contexts=num_contexts, num_perturbations=6, num_genes=60)
    report = Report(evaluation)
    table = differences(evaluation)
    assert (table["reason"] == f"fewer than 3 contexts ({num_contexts}): no interval").all()
    text = report.markdown()
    for found in report.findings.comparisons["model"]:
        words = sentence(found)
        assert words in text
        assert "Fewer than 3 contexts: no interval; gain by context: LINE-A " in words
        assert "[" not in words
        assert words.count("LINE-") == num_contexts
    assert "fewer than 3: no interval" in text
    assert "better than" not in text


def test_a_baseline_of_few_conditions_is_no_rival():
    evaluation = example_evaluation(quality={**MODEL_QUALITY, "additive": 0.5})
    scores, table = evaluation.scores, evaluation.aggregate
    one = scores.query("method == 'additive' and perturbation == 'drug-00'").assign(
        method="linear", value=9.0
    )
    row = table.query("method == 'additive'").assign(
        method="linear", mean=9.0, num_conditions=len(one) // table["metric"].nunique()
    )
    evaluation.scores, evaluation.aggregate = pd.concat([scores, one]), pd.concat([table, row])
    found = differences(evaluation).query("metric == 'pearson_delta'")
    assert (found["baseline"] == "context_transfer").all()
    alone = evaluation.scores["method"].isin(["model", "linear"])
    evaluation.scores = evaluation.scores[alone]
    evaluation.aggregate = evaluation.aggregate[
        evaluation.aggregate["method"].isin(["model", "linear"])
    ]
    assert "linear" in BASELINES
    found = differences(evaluation).query("metric == 'pearson_delta'")
    assert (found["num_conditions"] == 1).all()
    text = Report(evaluation).markdown()
    assert "The baseline covers 5 of 60 conditions." in text
