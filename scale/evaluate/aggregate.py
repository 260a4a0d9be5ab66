"""From scores of conditions to one number per method: means over independent units.

Conditions are averaged in their context, contexts in their unit (cell line or donor), units last;
the interval is that of unit means. Conditions of one cell line are no independent repeats, so that
an interval over them would cover far less than it says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scale.evaluate.metrics import METRICS
from scale.evaluate.scoring import DATA, PREDICTION, Scores
from scale.evaluate.sides import Side
from scale.evaluate.statistics import Floats, Interval, Signs, count_signs, t_interval

Key = tuple[str, str, str]
Means = dict[tuple[str, str], float]

CEILING = "replicate"
"""Method name of the split-half ceiling."""
CELLS, MEAN = "cells", "mean"
"""The two forms of a prediction: dispersed cells, or a mean alone."""
CONDITION = ["unit", "context", "perturbation"]
"""Columns that name a condition in the long table."""


class ScoreTable:
    """Collects scores context by context; one row per method, form, condition and metric."""

    def __init__(self) -> None:
        self._blocks: list[pd.DataFrame] = []

    def add(
        self,
        scores: Scores,
        *,
        method: str,
        form: str,
        context: str,
        unit: str,
        labels: tuple[str, ...],
        predicted: Side,
        observed: Side,
        num_significant_P: np.ndarray[tuple[int], np.dtype[np.int64]],
    ) -> None:
        """Append all metrics of one method in one context."""
        names = [name for name in METRICS if name in scores.values]
        count = len(labels)
        block = pd.DataFrame(
            {
                "perturbation": np.tile(np.asarray(labels, dtype=object), len(names)),
                "metric": np.repeat(np.asarray(names, dtype=object), count),
                "value": np.concatenate([scores.values[name] for name in names]),
                "reason": np.concatenate([scores.reasons[name] for name in names]),
                "num_cells_predicted": np.tile(predicted.num_P, len(names)),
                "num_cells_observed": np.tile(observed.num_P, len(names)),
                "num_significant_observed": np.tile(num_significant_P, len(names)),
            }
        )
        block.insert(0, "method", method)
        block.insert(1, "form", form)
        block.insert(2, "context", context)
        block.insert(3, "unit", unit)
        block["num_controls"] = observed.control.num_cells
        self._blocks.append(block)

    def add_missing(
        self,
        reasons: Mapping[str, str],
        *,
        method: str,
        form: str,
        context: str,
        unit: str,
        observed: Side,
        num_significant: Mapping[str, int],
        num_observed: Mapping[str, int],
    ) -> None:
        """Append one row per condition that a baseline cannot predict, with the reason."""
        labels = list(reasons)
        self._blocks.append(
            pd.DataFrame(
                {
                    "method": method,
                    "form": form,
                    "context": context,
                    "unit": unit,
                    "perturbation": labels,
                    "metric": "pearson_delta",
                    "value": np.nan,
                    "reason": [f"{PREDICTION}: {reasons[label]}" for label in labels],
                    "num_cells_predicted": 0,
                    "num_cells_observed": [num_observed[label] for label in labels],
                    "num_significant_observed": [num_significant[label] for label in labels],
                    "num_controls": observed.control.num_cells,
                }
            )
        )

    def frame(self) -> pd.DataFrame:
        """Return the long table."""
        table = pd.concat(self._blocks, ignore_index=True)
        columns = [
            "method",
            "form",
            "context",
            "unit",
            "perturbation",
            "metric",
            "value",
            "reason",
            "num_cells_predicted",
            "num_cells_observed",
            "num_controls",
            "num_significant_observed",
        ]
        return table[columns]


def context_means(scores: pd.DataFrame) -> dict[Key, Means]:
    """Return (method, form, metric) -> mean over conditions of each (unit, context)."""
    found: dict[Key, Means] = {}
    columns = ["method", "form", "metric", "unit", "context"]
    table = scores.groupby(columns, sort=False)["value"].mean().reset_index()
    for method, form, metric, unit, context, value in zip(
        *(table[column] for column in [*columns, "value"]), strict=True
    ):
        found.setdefault((method, form, metric), {})[(unit, context)] = float(value)
    return found


def unit_means(means: Means) -> Floats:
    """Return the mean over the contexts of each unit; undefined contexts are left out."""
    units: dict[str, list[float]] = {}
    for (unit, _), value in sorted(means.items()):
        if np.isfinite(value):
            units.setdefault(unit, []).append(value)
    return np.array([np.mean(values) for values in units.values()], dtype=np.float64)


def over_units(means: Means) -> float:
    """Return the mean over units of context means; NaN if all are undefined."""
    units = unit_means(means)
    return float(units.mean()) if units.size else float("nan")


def aggregate(scores: pd.DataFrame, *, confidence: float = 0.95) -> pd.DataFrame:
    """Return one row per (method, form, metric) with the mean over units and its interval.

    Parameters
    ----------
    scores
        Long table of :class:`ScoreTable`.
    confidence
        Coverage of the interval.
    """
    keys = [scores["method"], scores["form"], scores["metric"]]
    reasons = scores["reason"].astype(str)
    counts = pd.DataFrame(
        {
            "mean_over_conditions": scores["value"].groupby(keys, sort=False).mean(),
            "num_conditions": scores["value"].groupby(keys, sort=False).count(),
            "num_undefined": (reasons != "").groupby(keys, sort=False).sum(),
            "num_undefined_observed": reasons.str.startswith(DATA).groupby(keys, sort=False).sum(),
            "num_undefined_predicted": reasons.str.startswith(PREDICTION)
            .groupby(keys, sort=False)
            .sum(),
        }
    ).to_dict("index")
    rows = []
    units = {m: unit_word(block) for m, block in scores.groupby("metric", sort=False)}
    for key, means in context_means(scores).items():
        method, form, metric = key
        interval = t_interval(unit_means(means), confidence=confidence, units=units[metric])
        full = over_units({k: full_depth(metric, v) for k, v in means.items()})
        bound = over_units({k: full_depth_bound(metric, v) for k, v in means.items()})
        rows.append(
            {
                "method": method,
                "form": form,
                "metric": metric,
                "mean": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "reason": interval.reason,
                "num_units": interval.num_units,
                **{str(name): value for name, value in counts[key].items()},
                "better": METRICS[metric].better,
                "mean_full_depth": full if method == CEILING else float("nan"),
                "mean_full_depth_bound": bound if method == CEILING else float("nan"),
            }
        )
    return pd.DataFrame(rows)


def unit_word(scores: pd.DataFrame) -> str:
    """Return what an independent unit is called: a context, unless a unit holds several."""
    one_each = scores.groupby("unit", observed=True)["context"].nunique().max() == 1
    return "contexts" if one_each else "independent units"


@dataclass(frozen=True, slots=True)
class Baseline:
    """The baseline that a metric is hardest to beat with; ``covers_all``: every condition."""

    method: str
    form: str
    mean: float
    covers_all: bool


def best_baseline(table: pd.DataFrame, metric: str, baselines: Collection[str]) -> Baseline | None:
    """Return the best baseline on a metric, in its better form; None if none has a value.

    Only baselines that cover every scored condition compete, where there are any; else those that
    cover most. A mean over other conditions is no rival.

    Parameters
    ----------
    table
        From :func:`aggregate`.
    metric
        Name.
    baselines
        Names of baseline methods.
    """
    rows = table[(table["metric"] == metric) & table["mean"].notna()]
    rivals = rows[rows["method"].isin(list(baselines))]
    if rivals.empty:
        return None
    most = rivals["num_conditions"].max()
    rivals = rivals[rivals["num_conditions"] == most].reset_index(drop=True)
    is_higher = rivals["better"].iloc[0] == "higher"
    best = rivals.iloc[int(rivals["mean"].argmax() if is_higher else rivals["mean"].argmin())]
    covers_all = bool(most == rows["num_conditions"].max())
    return Baseline(str(best["method"]), str(best["form"]), float(best["mean"]), covers_all)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """How much better one method is than another on one metric; positive = better.

    Parameters
    ----------
    by_unit, conditions_by_unit
        Gain of each unit, and the conditions paired there.
    interval, signs
        Over units.
    """

    by_unit: dict[str, float]
    conditions_by_unit: dict[str, int]
    interval: Interval
    signs: Signs

    @property
    def num_conditions(self) -> int:
        """Conditions that were paired."""
        return sum(self.conditions_by_unit.values())


def condition_values(scores: pd.DataFrame) -> pd.Series:
    """Return the values of one method, form and metric by (unit, context, perturbation)."""
    rows = scores[[*CONDITION, "value"]].astype(dict.fromkeys(CONDITION, str))
    values: pd.Series = rows.groupby(CONDITION, sort=True)["value"].mean()
    return values


def paired_gain(
    model: pd.Series,
    rival: pd.Series,
    *,
    better: str,
    units: str = "units",
    confidence: float = 0.95,
) -> Gain:
    """Return the gain of ``model`` over ``rival``, condition by condition, then over units.

    Differences are averaged in the context, then in the unit; the interval is over units. What a
    cell line does to both methods alike is no part of the difference.

    Parameters
    ----------
    model, rival
        From :func:`condition_values`; a condition that is undefined in either is left out.
    better
        ``higher`` or ``lower``.
    units
        What the units are called.
    confidence
        Coverage of the interval.
    """
    gain = (model - rival).dropna() * (1.0 if better == "higher" else -1.0)
    units_of = gain.groupby(level="unit")
    by_context = gain.groupby(level=["unit", "context"]).mean()
    by_unit = by_context.groupby(level="unit").mean()
    values = by_unit.to_numpy(np.float64)
    return Gain(
        by_unit={str(k): float(v) for k, v in by_unit.items()},
        conditions_by_unit={str(k): int(v) for k, v in units_of.count().items()},
        interval=t_interval(values, confidence=confidence, units=units),
        signs=count_signs(values),
    )


def full_depth(metric: str, half_depth: float) -> float:
    """Return what a ceiling at half depth is at full depth.

    Spearman-Brown 2r / (1 + r) for correlations (r <= 0 has none), 1/2 and 1/sqrt 2 for errors,
    the value itself for unbiased distances. For set and ranking metrics of the gene test there is
    no correction: NaN. The catalogue says which.

    Examples
    --------
    >>> full_depth("pearson_delta", 0.5), full_depth("mse", 0.5)
    (0.6666666666666666, 0.25)
    """
    match METRICS[metric].full_depth:
        case "spearman_brown":
            return 2 * half_depth / (1 + half_depth) if half_depth > 0 else float("nan")
        case "half":
            return half_depth / 2
        case "root_half":
            return half_depth / 2**0.5
        case "same":
            return half_depth
        case _:
            return float("nan")


def full_depth_bound(metric: str, half_depth: float) -> float:
    """Return the upper end of a ceiling's bracket, for set and ranking metrics of the gene test.

    Spearman-Brown is too high for them (.80 where a replicate has .75): the ceiling lies between
    half depth and this, which is never to be shown alone. NaN for all other metrics.
    """
    row = METRICS[metric]
    if row.group != "genes" or row.better != "higher" or row.full_depth != "no":
        return float("nan")
    return 2 * half_depth / (1 + half_depth) if half_depth > 0 else float("nan")
