"""What a report says in words: no more than its intervals allow, and by the right names."""

import numpy as np
import pandas as pd
import pytest
from example_evaluation import MODEL_QUALITY, example_evaluation
from report_page import changed

from scale.evaluate.report import Report
from scale.evaluate.verdict import Comparison, against_best_baseline, label_of, overall, sentence

BASELINES = ["control_copy", "perturbation_mean", "context_transfer", "additive"]
CLAIMS = ["residual_pearson", "retrieval_l2", "energy_ratio", "overlap_at_N"]


@pytest.fixture(scope="module")
def evaluation():
    return example_evaluation()


def test_gain_is_the_paired_difference_over_units(evaluation):
    found = against_best_baseline(evaluation, "model", "pearson_delta", BASELINES)
    values = evaluation.scores.query("metric == 'pearson_delta'").pivot_table(
        index=["unit", "perturbation"], columns="method", values="value"
    )
    units = (values["model"] - values["additive"]).groupby("unit").mean()
    assert found.baseline == "additive"
    assert found.gain == pytest.approx(units.mean())
    half = 2.7764451051977987 * units.std(ddof=1) / np.sqrt(5)  # t of 4 degrees, 97.5 %
    assert found.low == pytest.approx(units.mean() - half)
    assert found.num_units == 5
    assert found.outcome == "better"


def test_gain_has_the_same_sign_where_lower_is_better(evaluation):
    found = against_best_baseline(evaluation, "model", "mse", BASELINES)
    assert found.value < found.baseline_value
    assert found.gain > 0


def test_the_best_baseline_is_taken_in_its_better_form(evaluation):
    extra = evaluation.scores.query("method == 'control_copy'").assign(form="mean", value=0.9)
    row = evaluation.aggregate.query("method == 'control_copy'").assign(form="mean", mean=0.9)
    other = changed(
        evaluation,
        scores=pd.concat([evaluation.scores, extra]),
        aggregate=pd.concat([evaluation.aggregate, row]),
    )
    found = against_best_baseline(other, "model", "pearson_delta", BASELINES)
    assert (found.baseline, found.baseline_form, found.outcome) == ("control_copy", "mean", "worse")


def test_an_equal_model_is_not_told_apart():
    equal = example_evaluation(quality={**MODEL_QUALITY, "model": 0.6}, seed=3)
    outcomes = [
        against_best_baseline(equal, "model", m, BASELINES).outcome
        for m in ("pearson_delta", "mse")
    ]
    assert "better" not in outcomes


@pytest.mark.parametrize(("num_contexts", "words"), [(1, "One independent"), (2, "2 independent")])
def test_few_units_give_no_interval_and_no_claim(num_contexts, words):
    few = example_evaluation(num_contexts=num_contexts, num_perturbations=6, num_genes=60)
    made = Report(few)
    text = made.markdown()
    assert words in text
    assert "none of this is established" in text
    claims = made.findings.comparisons["model"][:4]
    ahead = [label_of(c.metric).lower()[:9] for c in claims if c.gain > 0]
    lead = text.split("## Verdict")[1].split("established")[0].lower()
    assert f"on {len(ahead)} of 4 claim metrics" in lead
    assert all(name in lead for name in ahead)
    assert ("behind it on" in lead) == (len(ahead) < 4)
    assert f"{num_contexts} of {num_contexts} contexts" in text
    assert all(c.outcome == "open" for c in made.findings.comparisons["model"])


def test_without_baselines_nothing_is_claimed():
    alone = example_evaluation(quality={"model": 0.7}, num_perturbations=6, num_genes=60)
    text = Report(alone).markdown()
    assert "so nothing can be claimed" in text
    assert "no claim is possible" in text
    assert "No ceiling was computed" in text


@pytest.mark.parametrize("num_units", [1, 2, 5])
def test_a_unit_is_called_by_no_other_name(num_units):
    """Units may be donors, and hold several contexts: nothing speaks of cell lines then."""
    made = example_evaluation(num_perturbations=4, num_genes=20)
    donor = {f"LINE-{letter}": f"donor {i % num_units}" for i, letter in enumerate("ABCDE")}
    made.scores["unit"] = made.scores["context"].map(donor)
    made.aggregate["reason"] = ""
    text = Report(made).markdown()
    assert "cell line" not in text.lower()
    unit = "contexts" if num_units == 5 else "independent units"
    assert f"of {num_units} {unit}" in text
    if num_units < 3:
        assert f"Fewer than 3 {unit}: no interval; gain by independent unit: donor 0 " in text
    if num_units == 1:
        assert "One independent unit only (donor 0)" in text
        assert "say nothing about another unit" in text


def test_an_evaluation_without_a_model_is_refused():
    none = example_evaluation(quality={"additive": 0.5}, num_perturbations=3, num_genes=60)
    with pytest.raises(ValueError, match="no model, only additive"):
        Report(none)


def _comparison(**changes):
    facts = {
        "model": "model",
        "metric": "pearson_delta",
        "is_claim": True,
        "value": 0.5,
        "better": "higher",
        "baseline": "additive",
        "baseline_form": "mean",
        "baseline_value": 0.4,
        "ceiling": 0.6,
        "full_ceiling": 0.7,
        "gain": 0.1,
        "low": 0.05,
        "high": 0.15,
        "num_units": 5,
        "num_units_better": 5,
        "num_conditions": 50,
    }
    return Comparison(**{**facts, **changes})


def test_sentences_say_what_the_interval_allows():
    assert sentence(_comparison()) == (
        "0.500, better than the best baseline (additive, 0.400) in 5 of 5 contexts, paired gain "
        "+0.100 [+0.050, +0.150]. A replicate of half the cells reaches 0.600 (0.700 carried to "
        "all cells)."
    )
    assert "not told apart" in sentence(_comparison(low=-0.01, num_units_better=3))
    assert "worse than" in sentence(_comparison(gain=-0.1, low=-0.2, high=-0.05))
    assert "the best baseline is level with it" in sentence(_comparison(full_ceiling=0.39))
    assert "level with it" not in sentence(_comparison(ceiling=0.39))
    both = [_comparison(), _comparison(metric="mse", gain=-0.1, low=-0.2, high=-0.05)]
    assert overall("model", [*both, _comparison(metric="mae", low=-0.01)]) == (
        "model beats the best baseline on 1 of 3 claim metrics: correlation of change. It is "
        "beaten on 1: squared error. Not told apart on 1: absolute error."
    )


def test_no_claim_stands_where_the_collapse_check_fires(evaluation):
    assert "none of this is a claim" in overall("model", [_comparison()], "CONTROL COPY")
    fired = {"model": {"spread_ratio": 0.01, "verdict": "COLLAPSED ACROSS PERTURBATIONS"}}
    text = Report(changed(evaluation, collapse=fired)).markdown()
    assert "The mean-collapse check fires (COLLAPSED ACROSS PERTURBATIONS)" in text


def test_claim_metrics_are_fixed_beforehand(evaluation):
    found = Report(evaluation).findings.comparisons["model"]
    assert [c.metric for c in found if c.is_claim] == CLAIMS
