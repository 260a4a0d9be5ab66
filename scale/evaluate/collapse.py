"""Has a model collapsed to a mean? Always asked, whatever its scores are.

A model that gives one response to every perturbation, or one cell to every set, can score well on
correlations of change. Three questions tell: how far predicted responses spread over perturbations
(sampling noise taken out), how far cells spread within sets, and whether anything that is
particular to a perturbation is predicted at all. Where the observed cells themselves have no
answer (a screen without effects), none is given: a repeat of such a screen has not collapsed.

Shapes: P = conditions of a context, G = genes, K = principal components.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.evaluate.aggregate import CEILING, CELLS
from scale.evaluate.metrics import METRICS
from scale.evaluate.sides import Cells, Side
from scale.evaluate.statistics import Floats

Facts = dict[str, float | str]

_COLLAPSED, _SHRUNK = 0.05, 0.5
_WITHIN_COLLAPSED, _OVER_DISPERSED = 0.5, 2.0
_COPY_SHARE = 0.95
_STANDARD_ERRORS = 3.0
# What was seen this far from nothing is seen 3 standard errors from it in a repeat.
_CLEAR_STANDARD_ERRORS = 6.0
_SKILL = ("residual_pearson", "retrieval_l2")
_SKILL_CONDITIONS = 10
_COVARIANCE_CELLS = 200

ACROSS = "COLLAPSED ACROSS PERTURBATIONS"
COPY = "CONTROL COPY"
SHRUNK = "SHRUNK"
WITHIN = "COLLAPSED WITHIN SETS"
OVER_DISPERSED = "OVER-DISPERSED"
NONE = "no collapse"


@dataclass(slots=True)
class Collapse:
    """Sums over contexts, and the verdict they lead to."""

    spread: float = 0.0
    error: float = 0.0
    observed_spread: float = 0.0
    observed_error: float = 0.0
    within: float = 0.0
    observed_within: float = 0.0
    copies: int = 0
    changed: int = 0
    conditions: int = 0
    largest_context: int = 0

    def add(self, predicted: Side, observed: Side) -> None:
        """Take one context into account; both sides must hold cells."""
        assert predicted.cells is not None
        assert observed.cells is not None
        self.within += float(predicted.cells.variance_PG.sum())
        self.observed_within += float(observed.cells.variance_PG.sum())
        changed_P = _errors_from_control(observed, observed.cells) > _CLEAR_STANDARD_ERRORS
        copied_P = _errors_from_control(predicted, predicted.cells) <= _STANDARD_ERRORS
        self.changed += int(changed_P.sum())
        self.copies += int((copied_P & changed_P).sum())
        count = len(predicted.mean_PG)
        self.conditions += count
        self.largest_context = max(self.largest_context, count)
        if count > 1:
            self.spread += _spread(predicted, predicted.cells)
            self.observed_spread += _spread(observed, observed.cells)
            self.error = _add_error(self.error, predicted, predicted.cells)
            self.observed_error = _add_error(self.observed_error, observed, observed.cells)

    def result(self) -> Facts:
        """Return spread_ratio, within_variance_ratio, copied_share and the verdict.

        A ratio is NaN where the observed cells give it no ground.
        """
        spread = within = copied = float("nan")
        if self.observed_spread > _CLEAR_STANDARD_ERRORS * self.observed_error:
            spread = self.spread / self.observed_spread
        if self.observed_within > 0:
            within = self.within / self.observed_within
        if self.changed > (1 - _COPY_SHARE) * self.conditions:
            copied = self.copies / self.changed
        return {
            "spread_ratio": spread,
            "within_variance_ratio": within,
            "copied_share": copied,
            "verdict": self._verdict(spread, within, copied),
        }

    def _verdict(self, spread: float, within: float, copied: float) -> str:
        found = []
        # With few cells the spread of one response for all is not 0 but its noise.
        is_noise = self.spread <= _STANDARD_ERRORS * self.error
        if copied > _COPY_SHARE:
            found.append(COPY)
        elif spread < _COLLAPSED or (spread < _SHRUNK and is_noise):
            found.append(ACROSS)
        elif spread < _SHRUNK:
            found.append(SHRUNK)
        if within < _WITHIN_COLLAPSED:
            found.append(WITHIN)
        elif within > _OVER_DISPERSED:
            found.append(OVER_DISPERSED)
        if self.largest_context < 2:
            found.append("one perturbation per context: spread unknown")
        elif not np.isfinite(spread) and COPY not in found:
            found.append("the observed responses do not differ beyond noise: spread unknown")
        return ", ".join(found) or NONE


def judge(collapses: Mapping[str, Collapse], aggregate: pd.DataFrame) -> dict[str, Facts]:
    """Return the facts and the verdict of every method.

    A spread that is mere noise is a collapse too: where the intervals of ``residual_pearson`` and
    ``retrieval_l2`` both hold the value of no skill, and both end below where those of a repeated
    experiment begin, nothing particular to a perturbation is predicted. Asked from 10
    perturbations in a context; needs intervals, hence three units, and the ceiling.

    Parameters
    ----------
    collapses
        Method -> sums over contexts.
    aggregate
        Means and intervals by (method, form, metric).
    """
    cells = aggregate[(aggregate["form"] == CELLS) & aggregate["metric"].isin(_SKILL)]
    keys = zip(cells["method"], cells["metric"], strict=True)
    bounds = dict(zip(keys, cells[["low", "high"]].to_numpy(np.float64), strict=True))
    found = {}
    for method, collapse in collapses.items():
        facts = collapse.result()
        if collapse.largest_context >= _SKILL_CONDITIONS and _has_no_skill(method, bounds):
            facts["no_skill"] = "yes"
            words = [w for w in str(facts["verdict"]).split(", ") if w not in (NONE, SHRUNK)]
            if not {ACROSS, COPY} & set(words):
                facts["verdict"] = ", ".join([ACROSS, *words])
        found[method] = facts
    return found


def _has_no_skill(method: str, bounds: Mapping[tuple[str, str], Floats]) -> bool:
    """Whether a method is level with no skill on both metrics, and a repeat is clearly not."""
    for metric in _SKILL:
        if (method, metric) not in bounds or (CEILING, metric) not in bounds:
            return False
        low, high = bounds[(method, metric)]
        if not low <= METRICS[metric].no_skill <= high < bounds[(CEILING, metric)][0]:
            return False
    return True


def _spread(side: Side, cells: Cells) -> float:
    """Sum over genes of the variance over perturbations, less the variance of each mean."""
    noise_G: Floats = (cells.variance_PG / side.num_P[:, None]).mean(axis=0)
    return float((side.mean_PG.var(axis=0, ddof=1) - noise_G).sum())


def _add_error(error: float, side: Side, cells: Cells) -> float:
    """Add the standard error of a context's spread, if all its perturbations had one response."""
    size_P = _covariance_size(cells) / side.num_P
    return float(np.sqrt(error**2 + 2.0 / (len(size_P) - 1) * (size_P**2).mean()))


def _errors_from_control(side: Side, cells: Cells) -> Floats:
    """Squared change of each condition less its noise, in standard errors of that noise.

    0 for a condition that has neither change nor noise.
    """
    control = side.control
    noise_P = (cells.variance_PG.sum(axis=1) / side.num_P) + (
        control.variance_G.sum() / control.num_cells
    )
    excess_P = (side.delta_PG**2).sum(axis=1) - noise_P
    of_control = _size(control.points, control.variance_G) / control.num_cells
    error_P = np.sqrt(2.0) * (_covariance_size(cells) / side.num_P + of_control)
    zero_P = np.zeros_like(excess_P)
    return np.asarray(np.divide(excess_P, error_P, out=zero_P, where=error_P > 0))


def _covariance_size(cells: Cells) -> Floats:
    """Norm of the covariance of genes within each set."""
    pairs = zip(cells.points, cells.variance_PG, strict=True)
    return np.array([_size(points, variance_G) for points, variance_G in pairs])


def _size(points: npt.NDArray[np.float64], variance_G: Floats) -> float:
    """Frobenius norm of a covariance: its leading components, and its diagonal.

    Genes of a cell go together (depth, cell cycle), so that the diagonal alone makes the noise of
    a squared change look smaller than it is; counting both makes it a little larger.
    """
    sample = points[:_COVARIANCE_CELLS]
    centred = sample - sample.mean(axis=0)
    covariance_KK = centred.T @ centred / max(len(sample) - 1, 1)
    return float(np.sqrt((covariance_KK**2).sum() + (variance_G**2).sum()))
