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
    Key,
    Means,
    context_means,
    full_depth,
    over_units,
)
from scale.evaluate.metrics import METRICS

_SPLIT_SDS = 3.0
_NAN = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """The two ends of a metric's scale, over units and by context; ``reason`` if there is none."""

    baseline: str = ""
    form: str = ""
    low: float = _NAN
    high: float = _NAN
    high_sd: float = _NAN
    low_by_context: Means | None = None
    room_by_context: Means | None = None
    reason: str = ""


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
    scales = {metric: _scale(metric, table, means, splits, baselines) for metric in METRICS}
    most = table.groupby("metric")["num_conditions"].max().to_dict()
    values, reasons = [], []
    for method, form, metric, count in zip(
        *(table[name] for name in ("method", "form", "metric", "num_conditions")), strict=True
    ):
        scale = scales[metric]
        values.append(_NAN)
        reasons.append(scale.reason)
        if not scale.reason and count < most[metric]:
            reasons[-1] = f"covers {count} of {most[metric]} conditions"
            continue
        low, room = scale.low_by_context, scale.room_by_context
        if low is not None and room is not None and method != CEILING:
            own = means[(method, form, metric)]
            values[-1] = over_units({k: (own.get(k, _NAN) - low[k]) / room[k] for k in room})
    chosen = [scales[metric] for metric in table["metric"]]
    return table.assign(
        baseline=[s.baseline for s in chosen],
        baseline_form=[s.form for s in chosen],
        baseline_mean=[s.low for s in chosen],
        ceiling=[s.high for s in chosen],
        ceiling_sd=[s.high_sd for s in chosen],
        scaled=values,
        scaled_reason=reasons,
    )


def _scale(
    metric: str,
    table: pd.DataFrame,
    means: dict[Key, Means],
    splits: pd.DataFrame,
    baselines: Collection[str],
) -> _Scale:
    """Return baseline and ceiling of a metric, or the reason why there is no scale."""
    better = METRICS[metric].better
    if better == "none":
        return _Scale(reason="a description, not a score")
    rows = table[(table["metric"] == metric) & table["mean"].notna()]
    rivals = rows[rows["method"].isin(list(baselines))]
    rivals = rivals[rivals["num_conditions"] == rows["num_conditions"].max()]
    if rivals.empty:
        return _Scale(reason="no baseline covers every condition")
    best = rivals["mean"].idxmax() if better == "higher" else rivals["mean"].idxmin()
    baseline, form = str(rivals["method"].to_dict()[best]), str(rivals["form"].to_dict()[best])
    low = means[(baseline, form, metric)]
    scale = _Scale(baseline=baseline, form=form, low=over_units(low))
    half = means.get((CEILING, CELLS, metric), {})
    if not np.isfinite(list(half.values())).any():
        return replace(scale, reason="no ceiling")
    ceiling = {k: full_depth(metric, v) for k, v in half.items()}
    if not np.isfinite(list(ceiling.values())).any():
        ceiling = half
    sd = _split_sd(splits[splits["metric"] == metric])
    scale = replace(scale, high=over_units(ceiling), high_sd=sd)
    sign = 1.0 if better == "higher" else -1.0
    least = _SPLIT_SDS * float(np.nan_to_num(sd))
    room = {k: v - low.get(k, _NAN) for k, v in ceiling.items()}
    if not sign * over_units(room) > least:
        return replace(scale, reason="no headroom: the best baseline is at the ceiling")
    # a context without room of its own would rule the mean by a small divisor
    room = {k: v for k, v in room.items() if sign * v > least}
    return replace(scale, low_by_context=low, room_by_context=room)


def _split_sd(splits: pd.DataFrame) -> float:
    """Standard deviation over splits of the ceiling; NaN for one split."""
    numbers = sorted(set(splits["split"]))
    means = []
    for number in numbers:
        block = splits[splits["split"] == number]
        places = zip(block["unit"], block["context"], strict=True)
        means.append(over_units(dict(zip(places, block["value"], strict=True))))
    return float(np.std(means, ddof=1)) if len(means) > 1 else _NAN
