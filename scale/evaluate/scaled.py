"""Scores on a scale that can be read: 0 = the best trivial prediction, 1 = a repeated experiment.

Raw scores of different metrics, data sets and depths cannot be compared; this places each between
the best baseline and the replicate, where there is room between the two.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from scale.evaluate.aggregate import (
    CEILING,
    CELLS,
    Baseline,
    Key,
    Means,
    best_baseline,
    context_means,
    full_depth,
    over_units,
)
from scale.evaluate.metrics import METRICS

_SPLIT_SDS = 3.0
_CONVENTION = "perturbation_mean"
"""The baseline, as cells, that others take as 0 of their scaled scores."""
_NAN = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """The two ends of a metric's scale, over units and by context; ``reason`` if there is none."""

    baseline: str = ""
    form: str = ""
    low: float = _NAN
    high: float = _NAN
    high_sd: float = _NAN
    half_sd: float = _NAN
    low_by_context: Means | None = None
    room_by_context: Means | None = None
    reason: str = ""

    def score(self, own: Means | None) -> float:
        """Return the scaled score of context means; NaN where there is no scale."""
        low, room = self.low_by_context, self.room_by_context
        if own is None or low is None or room is None:
            return _NAN
        return over_units({k: (own.get(k, _NAN) - low[k]) / room[k] for k in room})


def add_scaled(
    table: pd.DataFrame,
    scores: pd.DataFrame,
    splits: pd.DataFrame,
    baselines: Collection[str],
) -> pd.DataFrame:
    """Return the aggregate with the columns of the scaled score.

    .. math:: s = (u - b) / (r - b)

    per context, then averaged like every score. b is the best baseline on this metric, in its
    better form, among those that cover every scored condition; r is the replicate at full depth
    (at half depth for metrics that have no correction, so that s may pass 1). Not clipped. NaN,
    with the reason, where r - b is below 3 standard deviations over the splits, or where the
    replicate is not better than the baseline: then no model can be ranked on this metric.

    ``ceiling_sd`` is that of the halves over the splits, ``ceiling_full_depth_sd`` that of
    ``ceiling``. ``scaled_perturbation_mean`` takes the cells of the perturbation mean as b, which
    is a common convention; it flatters where another baseline is better.

    Parameters
    ----------
    table
        From :func:`scale.evaluate.aggregate.aggregate`.
    scores
        Long table of scores.
    splits
        Ceiling by split: split, unit, context, metric, value (mean over conditions).
    baselines
        Names of baseline methods.
    """
    means = context_means(scores)
    most = table.groupby("metric")["num_conditions"].max().to_dict()
    is_other = table["method"].isin(list(baselines)) & (
        (table["method"] != _CONVENTION) | (table["form"] != CELLS)
    )
    by_convention_only = table[~is_other]
    best, convention = {}, {}
    for metric in METRICS:
        best[metric] = _scale(metric, best_baseline(table, metric, baselines), means, splits)
        mean = best_baseline(by_convention_only, metric, [_CONVENTION])
        convention[metric] = _scale(metric, mean, means, splits)
    scaled, reasons, by_convention = [], [], []
    for method, form, metric, count in zip(
        *(table[name] for name in ("method", "form", "metric", "num_conditions")), strict=True
    ):
        reason = best[metric].reason
        if not reason and count < most[metric]:
            reason = f"covers {count} of {most[metric]} conditions"
        is_shown = count == most[metric] and method != CEILING
        own = means[(method, form, metric)] if is_shown else None
        scaled.append(best[metric].score(own))
        by_convention.append(convention[metric].score(own))
        reasons.append(reason)
    chosen = [best[metric] for metric in table["metric"]]
    return table.assign(
        baseline=[s.baseline for s in chosen],
        baseline_form=[s.form for s in chosen],
        baseline_mean=[s.low for s in chosen],
        ceiling=[s.high for s in chosen],
        ceiling_sd=[s.half_sd for s in chosen],
        ceiling_full_depth_sd=[s.high_sd for s in chosen],
        scaled=scaled,
        scaled_reason=reasons,
        scaled_perturbation_mean=by_convention,
    )


def scaled_by_context(table: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Return the scaled score of every context: method, form, metric, unit, context, scaled.

    The mean over units of the mean over their contexts is ``scaled`` of the aggregate; contexts
    without room between baseline and ceiling are left out.

    Parameters
    ----------
    table
        From :func:`add_scaled`.
    scores
        Long table of scores.
    """
    means = context_means(scores)
    rows = []
    for method, form, metric, baseline, baseline_form, sd in table.loc[
        table["scaled"].notna(),
        ["method", "form", "metric", "baseline", "baseline_form", "ceiling_full_depth_sd"],
    ].itertuples(index=False):
        low = means[(baseline, baseline_form, metric)]
        room = _room(metric, low, _ceiling(metric, means), float(sd))
        own = means[(method, form, metric)]
        rows += [
            (
                method,
                form,
                metric,
                unit,
                context,
                (value - low[unit, context]) / room[unit, context],
            )
            for (unit, context), value in own.items()
            if (unit, context) in room
        ]
    columns = ["method", "form", "metric", "unit", "context", "scaled"]
    return pd.DataFrame(rows, columns=columns)


def _ceiling(metric: str, means: dict[Key, Means]) -> Means:
    """Return the replicate by context, carried to full depth where there is a correction.

    NaN where the halves of a context do not agree (r <= 0): then it has no ceiling.
    """
    half = means.get((CEILING, CELLS, metric), {})
    return {k: _carried(metric, v) for k, v in half.items()}


def _carried(metric: str, half_depth: float) -> float:
    """Return a half-depth ceiling at full depth, as it is for metrics without a correction."""
    if METRICS[metric].full_depth == "no":
        return half_depth
    return full_depth(metric, half_depth)


def _room(metric: str, low: Means, ceiling: Means, sd: float) -> Means:
    """Return ceiling minus baseline where it is above 3 sd over the splits.

    A context without room of its own would rule the mean by a small divisor.
    """
    sign = 1.0 if METRICS[metric].better == "higher" else -1.0
    least = _SPLIT_SDS * float(np.nan_to_num(sd))
    room = {k: v - low.get(k, _NAN) for k, v in ceiling.items()}
    return {k: v for k, v in room.items() if sign * v > least}


def _scale(
    metric: str, best: Baseline | None, means: dict[Key, Means], splits: pd.DataFrame
) -> _Scale:
    """Return baseline and ceiling of a metric, or the reason why there is no scale."""
    better = METRICS[metric].better
    if better == "none":
        return _Scale(reason="a description, not a score")
    if best is None or not best.covers_all:
        return _Scale(reason="no baseline covers every condition")
    low = means[(best.method, best.form, metric)]
    scale = _Scale(baseline=best.method, form=best.form, low=over_units(low))
    half = means.get((CEILING, CELLS, metric), {})
    if not np.isfinite(list(half.values())).any():
        return replace(scale, reason="no ceiling")
    ceiling = _ceiling(metric, means)
    if not np.isfinite(list(ceiling.values())).any():
        return replace(scale, reason="no ceiling: the halves of the observed cells do not agree")
    rows = splits[splits["metric"] == metric]
    # The threshold is at the depth of the ceiling: carrying r = .1 to full depth doubles its sd.
    sd = _split_sd(rows.assign(value=[_carried(metric, v) for v in rows["value"]]))
    scale = replace(scale, high=over_units(ceiling), high_sd=sd, half_sd=_split_sd(rows))
    sign = 1.0 if better == "higher" else -1.0
    room = {k: v - low.get(k, _NAN) for k, v in ceiling.items()}
    if not sign * over_units(room) > _SPLIT_SDS * float(np.nan_to_num(sd)):
        return replace(scale, reason="no headroom: the best baseline is at the ceiling")
    return replace(scale, low_by_context=low, room_by_context=_room(metric, low, ceiling, sd))


def _split_sd(splits: pd.DataFrame) -> float:
    """Standard deviation over splits of the ceiling; NaN for one split."""
    means = []
    for _, block in splits.groupby("split"):
        places = zip(block["unit"], block["context"], strict=True)
        means.append(over_units(dict(zip(places, block["value"], strict=True))))
    return float(np.std(means, ddof=1)) if len(means) > 1 else _NAN
