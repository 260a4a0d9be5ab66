"""From rows of scores to means, relative gains, their intervals, and what was aimed at.

Units are contexts of a data seed; a unit's value is the mean over its conditions. An interval is
that of 95 % of 4,000 draws, with replacement, of units and (apart from them) of model seeds; both
sides of a gain are drawn alike, so that what a context or a seed does to both falls out.

Shapes: U = units, S = model seeds, N = draws, the first of which is everything once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from quality_runs import LOWER_IS_BETTER, Row

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Statistic = Callable[[Sequence[Floats]], Floats]
"""Of the means of each side, one per draw."""

TARGETS = {
    "pearson_delta": 0.05,
    "overlap_at_n": 0.10,
    "precision_at_n": 0.15,
    "discrimination": 0.0,
    "mse": -0.05,
    "energy_distance": -0.05,
}
"""Least relative gain over arc-state that is aimed at, in the good direction."""
VARIANCE, NUM_DE = (0.9, 1.1), (0.5, 2.0)
"""Aimed at: predicted over observed variance, predicted over observed number of DE genes."""
SHOWN = (*TARGETS, "residual_pearson", "variance_ratio", "num_de_ratio")
"""Metrics of a printed table."""
_DRAWS = 4_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return "-"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Table:
    """Values of rows by method, form and metric."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.methods = list(dict.fromkeys(row.method for row in rows))

    def forms(self, method: str) -> list[str]:
        """Return the forms that a method was scored in."""
        return list(dict.fromkeys(row.form for row in self.rows if row.method == method))

    def values(self, method: str, form: str, metric: str) -> Floats:
        """Return values_US of units x model seeds, NaN where there is none.

        Column s is the s-th model seed of each data seed.
        """
        chosen = [row for row in self.rows if row.method == method and row.form == form]
        seeds: dict[tuple[str, int], list[int | None]] = {}
        for row in chosen:
            seeds.setdefault((row.dataset, row.data_seed), []).append(row.model_seed)
        units = self.units()
        values_US = np.full((len(units), max(map(len, seeds.values()))), np.nan)
        for row in chosen:
            column = seeds[(row.dataset, row.data_seed)].index(row.model_seed)
            for context, value in row.by_context.get(metric, {}).items():
                values_US[units.index((row.dataset, row.data_seed, context)), column] = value
        return values_US

    def units(self) -> list[tuple[str, int, str]]:
        """Return (dataset, data seed, context) of everything scored."""
        found = {
            (row.dataset, row.data_seed, context)
            for row in self.rows
            for contexts in row.by_context.values()
            for context in contexts
        }
        return sorted(found)

    def better_form(self, method: str, metric: str) -> str:
        """Return the form in which a method is best on a metric: a claim must beat that one."""
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        means = {}
        for form in self.forms(method):
            values_US = self.values(method, form, metric)
            if np.isfinite(values_US).any():
                means[form] = sign * float(np.nanmean(values_US))
        return max(means, key=lambda form: means[form]) if means else "cells"


def estimate(sides: Sequence[Floats], statistic: Statistic) -> Estimate:
    """Return a statistic of the means of one or more sides [U, S], with its interval.

    A side of one column (a baseline, which has no model seeds) is the same for every seed.
    """
    random = np.random.default_rng(0)
    num_units, num_seeds = len(sides[0]), max(side.shape[1] for side in sides)
    unit_NU = random.integers(0, num_units, (_DRAWS, num_units))
    seed_NS = random.integers(0, num_seeds, (_DRAWS, num_seeds))
    unit_NU[0], seed_NS[0] = np.arange(num_units), np.arange(num_seeds)  # all as they are
    found_N = statistic([_drawn_means(side, unit_NU, seed_NS) for side in sides])
    finite = found_N[1:][np.isfinite(found_N[1:])]
    low, high = np.percentile(finite, [2.5, 97.5]) if finite.size else (np.nan, np.nan)
    return Estimate(float(found_N[0]), float(low), float(high))


def _drawn_means(side_US: Floats, unit_NU: Indices, seed_NS: Indices) -> Floats:
    """Return the mean of each draw over what is defined; NaN if nothing is."""
    seed_NS = np.minimum(seed_NS, side_US.shape[1] - 1)
    drawn_NUS = side_US[unit_NU[:, :, None], seed_NS[:, None, :]]
    count_N = np.isfinite(drawn_NUS).sum(axis=(1, 2))
    mean_N = np.full(len(unit_NU), np.nan)
    np.divide(np.nansum(drawn_NUS, axis=(1, 2)), count_N, out=mean_N, where=count_N > 0)
    return mean_N


def mean_of(table: Table, method: str, form: str, metric: str) -> Estimate:
    """Return the mean over units and seeds; ``variance_ratio`` is the geometric one."""
    if metric == "variance_ratio":
        values_US = table.values(method, form, "variance_log_ratio")
        return estimate([values_US], lambda means: np.exp(means[0]))
    return estimate([table.values(method, form, metric)], lambda means: means[0])


def gain_of(
    table: Table, metric: str, method: str, rival: str, form: str | None = None
) -> Estimate:
    """Return the relative gain of a method over a rival; positive = better.

    Ratio of means less 1; of a metric of which less is better, 1 less that ratio: -0.05 is 5 %
    more of it. Both are scored in ``form``, None = each in its better one.
    """
    own_US = table.values(method, form or table.better_form(method, metric), metric)
    other_US = table.values(rival, form or table.better_form(rival, metric), metric)
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0

    def gain(means: Sequence[Floats]) -> Floats:
        own_N, other_N = means
        return sign * (own_N / np.where(other_N > 0, other_N, np.nan) - 1.0)

    return estimate([own_US, other_US], gain)


def summary(table: Table, method: str, rival: str, baselines: Sequence[str]) -> dict[str, object]:
    """Return gains over a rival with intervals, and whether what was aimed at was reached."""
    found: dict[str, object] = {}
    reached = {}
    for metric, least in TARGETS.items():
        gain = gain_of(table, metric, method, rival, "cells")
        found |= {f"gain_{metric}": _number(gain.value), f"gain_{metric}_low": _number(gain.low)}
        found[f"gain_{metric}_high"] = _number(gain.high)
        reached[f"gain_{metric}"] = bool(gain.value >= least)
        for baseline in (b for b in baselines if b in table.methods):
            over = gain_of(table, metric, method, baseline)
            found[f"gain_{metric}_over_{baseline}"] = _number(over.value)
            as_cells = gain_of(table, metric, method, baseline, "cells")
            found[f"gain_{metric}_over_{baseline}_as_cells"] = _number(as_cells.value)
            reached[f"{metric}_above_{baseline}"] = bool(over.value > 0)
    variance = mean_of(table, method, "cells", "variance_ratio").value
    num_de = mean_of(table, method, "cells", "num_de_ratio").value
    reached["variance_ratio"] = VARIANCE[0] <= variance <= VARIANCE[1]
    reached["num_de_ratio"] = NUM_DE[0] <= num_de <= NUM_DE[1]
    found |= {"variance_ratio": _number(variance), "num_de_ratio": _number(num_de)}
    return {**found, "reached": reached}


def ablation(table: Table, default: str) -> dict[str, dict[str, Estimate]]:
    """Return row -> metric -> gain of the default over it."""
    return {
        method: {metric: gain_of(table, metric, default, method) for metric in TARGETS}
        for method in table.methods
        if method != default
    }


def _number(value: float) -> float | None:
    return round(value, 5) if np.isfinite(value) else None
