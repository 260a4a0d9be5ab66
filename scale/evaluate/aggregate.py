"""From scores of conditions to one number per method: means over independent units.

Conditions are averaged in their context, contexts in their unit (cell line or donor), units last;
the interval is that of unit means. Conditions of one cell line are no independent repeats, so that
an interval over them would cover far less than it says.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from scale.evaluate.metrics import METRICS
from scale.evaluate.scoring import DATA, PREDICTION, Scores
from scale.evaluate.sides import Side
from scale.evaluate.statistics import t_interval

CEILING = "replicate"
"""Method name of the split-half ceiling."""
CELLS, MEAN = "cells", "mean"
"""The two forms of a prediction: dispersed cells, or a mean alone."""


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


def aggregate(scores: pd.DataFrame, *, confidence: float = 0.95) -> pd.DataFrame:
    """Return one row per (method, form, metric) with the mean over units and its interval.

    Parameters
    ----------
    scores
        Long table of :class:`ScoreTable`.
    confidence
        Coverage of the interval.
    """
    rows = []
    for (method, form, metric), block in scores.groupby(
        ["method", "form", "metric"], sort=False, observed=True
    ):
        contexts = block.groupby(["unit", "context"], sort=True)["value"].mean()
        units = contexts.groupby(level="unit").mean()
        interval = t_interval(units.to_numpy(np.float64), confidence=confidence)
        reasons = block["reason"].astype(str)
        rows.append(
            {
                "method": method,
                "form": form,
                "metric": metric,
                "mean": interval.mean,
                "mean_over_conditions": block["value"].mean(),
                "low": interval.low,
                "high": interval.high,
                "reason": interval.reason,
                "num_units": interval.num_units,
                "num_conditions": int(block["value"].notna().sum()),
                "num_undefined": int((reasons != "").sum()),
                "num_undefined_observed": int(reasons.str.startswith(DATA).sum()),
                "num_undefined_predicted": int(reasons.str.startswith(PREDICTION).sum()),
                "better": METRICS[str(metric)].better,
                "mean_full_depth": full_depth(str(metric), contexts)
                if method == CEILING
                else np.nan,
            }
        )
    return pd.DataFrame(rows)


def full_depth(metric: str, half_depth: pd.Series) -> float:
    """Return what a ceiling at half depth is at full depth, averaged like the scores."""
    return float(full_depth_of(metric, half_depth).groupby(level="unit").mean().mean())


def full_depth_of(metric: str, half_depth: pd.Series) -> pd.Series:
    """Return context means of a half-depth ceiling carried to full depth.

    Parameters
    ----------
    metric
        Name; the catalogue knows the correction: Spearman-Brown 2r / (1 + r) for correlations
        (r <= 0 has none), 1/2 and 1/sqrt 2 for errors, none for unbiased distances. For set and
        ranking metrics of the gene test there is none: NaN.
    half_depth
        Context means, indexed by (unit, context).
    """
    match METRICS[metric].full_depth:
        case "spearman_brown":
            return (2 * half_depth / (1 + half_depth)).where(half_depth > 0)
        case "half":
            return half_depth / 2
        case "root_half":
            return half_depth / float(np.sqrt(2))
        case "same":
            return half_depth
        case _:
            return half_depth * float("nan")
