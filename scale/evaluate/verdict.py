"""What an evaluation says in words: model against best baseline, per metric and per context.

Claim metrics are fixed here, before any number is seen. A model is called better only where the
interval of the paired difference over independent units (cell lines, donors) leaves out zero; the
rest is told as it is: a count of contexts, and that it is open.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scale.evaluate.aggregate import (
    Gain,
    best_baseline,
    condition_values,
    paired_gain,
    unit_word,
)
from scale.evaluate.statistics import (
    MINIMUM_UNITS,
    Outcome,
    outcome_of,
    t_interval,
)
from scale.plot.bars import CEILING, better_forms, ceiling_of, number
from scale.plot.canvas import method_name

if TYPE_CHECKING:
    from scale.evaluate.protocol import Evaluation

_CLAIMS: tuple[tuple[str, ...], ...] = (
    ("residual_pearson",),
    ("retrieval_l2", "discrimination_score_l2", "discrimination_score_l1"),
    ("energy_ratio", "energy_distance"),
    ("overlap_at_N",),
)
_DESCRIPTIONS: tuple[tuple[str, ...], ...] = (
    ("pearson_delta",),
    ("precision_at_N",),
    ("mse",),
)

LABELS = {
    "residual_pearson": "Residual correlation",
    "residual_pearson_two_way": "Residual correlation, two-way",
    "retrieval_l1": "Retrieval (L1)",
    "retrieval_l2": "Retrieval (L2)",
    "retrieval_cosine": "Retrieval (cosine)",
    "retrieval_transposed": "Retrieval, transposed",
    "discrimination_score_l1": "Discrimination (L1)",
    "discrimination_score_l2": "Discrimination (L2)",
    "discrimination_score_cosine": "Discrimination (cosine)",
    "energy_ratio": "Energy distance ratio",
    "energy_distance": "Energy distance",
    "overlap_at_N": "DE gene overlap",
    "precision_at_N": "DE gene precision",
    "de_direction_match": "DE direction match",
    "de_spearman_lfc_sig": "DE fold-change rank",
    "de_sig_genes_recall": "DE gene recall",
    "de_spearman_sig": "DE effect-size rank",
    "pr_auc": "DE area under PR",
    "roc_auc": "DE area under ROC",
    "pearson_delta": "Correlation of change",
    "mse": "Squared error",
    "mae": "Absolute error",
    "mse_delta": "Squared error of change",
    "mae_delta": "Absolute error of change",
}

MEANINGS = {
    "residual_pearson": "Pearson r over genes of the mean change, after the response that is "
    "common to all perturbations has been taken off: what is particular to this perturbation",
    "retrieval_l2": "how well the observed change is found again among all perturbations of the "
    "context; 0.5 is chance",
    "discrimination_score_l2": "rank of the right perturbation among all observed ones; about "
    "0.5 is chance",
    "discrimination_score_l1": "rank of the right perturbation among all observed ones; about "
    "0.5 is chance",
    "energy_ratio": "distance between predicted and observed cells as distributions, relative to "
    "that of the control cells; 1 is no skill",
    "energy_distance": "distance between predicted and observed cells as distributions, in "
    "principal components",
    "overlap_at_N": "share of the observed significant genes found among as many predicted ones",
    "precision_at_N": "share of the predicted significant genes that are observed ones",
    "de_spearman_lfc_sig": "Spearman rank correlation of log fold changes over the observed "
    "significant genes",
    "pearson_delta": "Pearson r over genes of the mean change against control; high for any "
    "model where all perturbations share a response",
    "mse": "mean squared error of mean expression",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A model against the best baseline on one metric.

    ``gain`` is positive where the model is better, whichever direction is good; ``low`` and
    ``high`` are its t interval over independent units, NaN with fewer than three. ``gains`` has it
    unit by unit; ``num_conditions`` of the model's ``num_scored`` conditions could be paired.
    ``ceiling_bound`` is the upper end of the ceiling's bracket where it has no correction.
    """

    model: str
    metric: str
    is_claim: bool
    value: float
    better: str
    baseline: str | None
    baseline_form: str
    baseline_value: float
    ceiling: float
    full_ceiling: float
    gain: float
    low: float
    high: float
    num_units: int
    num_units_better: int
    num_conditions: int
    unit_word: str = "contexts"
    num_scored: int = 0
    gains: Gain | None = None
    form: str = ""
    ceiling_bound: float = float("nan")

    @property
    def outcome(self) -> Outcome:
        """Better or worse only where the interval leaves out zero."""
        return outcome_of(self.low, self.high)


def label_of(metric: str) -> str:
    """Return a metric's name in words."""
    return LABELS.get(metric, metric.replace("_", " "))


def headline_metrics(aggregate: pd.DataFrame) -> list[str]:
    """Return the metrics of the first table that the evaluation has, claim metrics first."""
    present = set(aggregate.loc[aggregate["mean"].notna(), "metric"])
    chosen = []
    for choices in (*_CLAIMS, *_DESCRIPTIONS):
        chosen += [name for name in choices if name in present][:1]
    return chosen


def is_claim(metric: str) -> bool:
    """Return whether a metric was named beforehand as one that a claim may rest on."""
    return any(metric in choices for choices in _CLAIMS)


def form_of(aggregate: pd.DataFrame, method: str, metric: str) -> str | None:
    """Return the better form of a method on one metric, None where it has no value."""
    rows = better_forms(aggregate, metric)
    return str(rows["form"].to_dict()[method]) if method in rows.index else None


def against_best_baseline(
    evaluation: Evaluation, model: str, metric: str, baselines: Collection[str]
) -> Comparison | None:
    """Return the comparison of a model with the best baseline on one metric, None if undefined."""
    scores = evaluation.scores[evaluation.scores["metric"] == metric]
    table = evaluation.aggregate[evaluation.aggregate["metric"] == metric]
    rows = better_forms(table, metric)
    if model not in rows.index:
        return None
    better = str(rows["better"].iloc[0])
    units = unit_word(scores)
    form, scored = str(rows["form"].to_dict()[model]), int(rows["num_conditions"].to_dict()[model])
    best = best_baseline(table, metric, baselines)
    gain = None
    if best is not None:
        own, rival = (
            condition_values(scores[(scores["method"] == m) & (scores["form"] == f)])
            for m, f in ((model, form), (best.method, best.form))
        )
        gain = paired_gain(own, rival, better=better, units=units)
    interval = t_interval(np.array([])) if gain is None else gain.interval
    means = rows["mean"].to_dict()
    bounds = rows["mean_full_depth_bound"].to_dict() if "mean_full_depth_bound" in rows else {}
    return Comparison(
        model=model,
        metric=metric,
        is_claim=is_claim(metric),
        value=float(means[model]),
        better=better,
        baseline=None if best is None else best.method,
        baseline_form="" if best is None else best.form,
        baseline_value=float("nan") if best is None else best.mean,
        ceiling=float(means.get(CEILING, float("nan"))),
        full_ceiling=ceiling_of(rows),
        gain=interval.mean,
        low=interval.low,
        high=interval.high,
        num_units=interval.num_units,
        num_units_better=0 if gain is None else gain.signs.num_better,
        num_conditions=0 if gain is None else gain.num_conditions,
        unit_word=units,
        num_scored=scored,
        gains=gain,
        form=form,
        ceiling_bound=float(bounds.get(CEILING, float("nan"))),
    )


def sentence(comparison: Comparison) -> str:
    """Return a comparison in words."""
    c = comparison
    if c.baseline is None:
        text = f"{number(c.value)}; no baseline was scored, so nothing can be claimed."
    else:
        rival = f"{method_name(c.baseline)}, {number(c.baseline_value)}"
        units = f"{c.num_units_better} of {c.num_units} {c.unit_word}"
        gain = _signed(c.gain)
        interval = f" [{_signed(c.low)}, {_signed(c.high)}]" if np.isfinite(c.low) else ""
        head = {
            "better": f"better than the best baseline ({rival}) in {units}",
            "worse": f"worse than the best baseline ({rival}), better in {units}",
            "open": f"not told apart from the best baseline ({rival}): better in {units}",
        }[c.outcome]
        if c.num_units < MINIMUM_UNITS:
            side = "ahead of" if c.gain > 0 else "behind"
            head = f"{side} the best baseline ({rival}): better in {units}"
        text = f"{number(c.value)}, {head}, paired gain {gain}{interval}."
        if c.num_conditions < c.num_scored:
            text += f" The baseline covers {c.num_conditions} of {c.num_scored} conditions."
        if c.num_units < MINIMUM_UNITS:
            text += f" Fewer than {MINIMUM_UNITS} {c.unit_word}: no interval{_by_unit(c)}."
    return f"{text} {_ceiling(c)}".rstrip()


def _by_unit(c: Comparison) -> str:
    """Return the gains one by one, where they are all that can be said."""
    if c.gains is None or not c.gains.by_unit:
        return ""
    each = ", ".join(f"{unit} {_signed(gain)}" for unit, gain in c.gains.by_unit.items())
    return f"; gain by {c.unit_word.removesuffix('s')}: {each}"


def _ceiling(c: Comparison) -> str:
    """Return what a replicate reaches; a half-depth one is no bound for noise-free means."""
    if not np.isfinite(c.ceiling):
        return ""
    text = f"A replicate of half the cells reaches {number(c.ceiling)}"
    if number(c.full_ceiling) != number(c.ceiling):
        text += f" ({number(c.full_ceiling)} carried to all cells)"
    elif np.isfinite(c.ceiling_bound):
        text += f" (of all cells at most {number(c.ceiling_bound)})"
    sign = 1.0 if c.better == "higher" else -1.0
    if c.baseline is not None and sign * (c.full_ceiling - c.baseline_value) <= 0:
        text += ", the best baseline is level with it"
    return f"{text}."


def _signed(value: float) -> str:
    return f"{'-' if value < 0 else '+'}{number(abs(value))}"


def gain_in_short(comparison: Comparison) -> str:
    """Return the paired gain as it stands in a table: gain, interval, count of units."""
    c = comparison
    interval = f" [{_signed(c.low)}, {_signed(c.high)}]" if np.isfinite(c.low) else ""
    return f"{_signed(c.gain)}{interval}, {c.num_units_better} of {c.num_units}"


def short_verdict(comparison: Comparison) -> str:
    """Return a comparison in one or two words."""
    if comparison.baseline is None:
        return "no baseline"
    if comparison.num_units < MINIMUM_UNITS:
        return "no interval"
    return {"better": "better", "worse": "worse", "open": "not told apart"}[comparison.outcome]


_COLLAPSES = ("COLLAPSED", "CONTROL COPY")


def overall(model: str, comparisons: Sequence[Comparison], collapse: str = "") -> str:
    """Return the verdict over the claim metrics in words, each metric by its name.

    Where the mean-collapse check (its verdict is ``collapse``) fires, no claim stands.
    """
    claims = [c for c in comparisons if c.is_claim and c.baseline is not None]
    if not claims:
        return f"{model}: no baseline was scored on a claim metric, so nothing can be claimed."
    total = f"{len(claims)} claim metric{'s' if len(claims) != 1 else ''}"
    fired = ""
    if any(word in collapse for word in _COLLAPSES):
        fired = f" The mean-collapse check fires ({collapse}), so none of this is a claim."
    if max(c.num_units for c in claims) < MINIMUM_UNITS:
        ahead, behind = [c for c in claims if c.gain > 0], [c for c in claims if c.gain < 0]
        text = f"{model} is ahead of the best baseline on {len(ahead)} of {total}{_listed(ahead)}"
        if behind:
            text += f"; behind it on {len(behind)}{_listed(behind)}"
        return (
            f"{text}. With fewer than {MINIMUM_UNITS} independent units none of this is "
            f"established.{fired}"
        )
    better, worse, level = ([c for c in claims if c.outcome == o] for o in _OUTCOMES)
    text = f"{model} beats the best baseline on {len(better)} of {total}{_listed(better)}."
    if worse:
        text += f" It is beaten on {len(worse)}{_listed(worse)}."
    if level:
        text += f" Not told apart on {len(level)}{_listed(level)}."
    return text + fired


_OUTCOMES: tuple[Outcome, ...] = ("better", "worse", "open")


def _listed(comparisons: Sequence[Comparison]) -> str:
    """Return the metrics' names after a colon, nothing where there are none."""
    names = [label_of(c.metric) for c in comparisons]
    words = [n if n[:2].isupper() else n[:1].lower() + n[1:] for n in names]
    return f": {', '.join(words)}" if words else ""
