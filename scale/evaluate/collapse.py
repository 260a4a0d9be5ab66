"""Has a model collapsed to a mean? Always asked, whatever its scores are.

A model that gives one response to every perturbation, or one cell to every set, can score well on
correlations of change. Two ratios tell: the spread over perturbations with the sampling noise
taken out, and the variance within sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scale.evaluate.sides import Cells, Side
from scale.evaluate.statistics import Floats

_COLLAPSED, _SHRUNK = 0.05, 0.5
_WITHIN_COLLAPSED, _OVER_DISPERSED = 0.5, 2.0
_COPY_SHARE = 0.95
_STANDARD_ERRORS = 3.0


@dataclass(slots=True)
class Collapse:
    """Sums over contexts, and the verdict they lead to."""

    spread: float = 0.0
    observed_spread: float = 0.0
    within: float = 0.0
    observed_within: float = 0.0
    copies: int = 0
    conditions: int = 0
    largest_context: int = 0

    def add(self, predicted: Side, observed: Side) -> None:
        """Take one context into account; both sides must hold cells."""
        assert predicted.cells is not None
        assert observed.cells is not None
        self.within += float(predicted.cells.variance_PG.sum())
        self.observed_within += float(observed.cells.variance_PG.sum())
        self.copies += int(_unchanged(predicted, predicted.cells).sum())
        count = len(predicted.mean_PG)
        self.conditions += count
        self.largest_context = max(self.largest_context, count)
        if count > 1:
            self.spread += _spread(predicted, predicted.cells)
            self.observed_spread += _spread(observed, observed.cells)

    def result(self) -> dict[str, float | str]:
        """Return spread_ratio, within_variance_ratio and the verdict."""
        spread = within = float("nan")
        if self.observed_spread > 0:
            spread = self.spread / self.observed_spread
        if self.observed_within > 0:
            within = self.within / self.observed_within
        return {
            "spread_ratio": spread,
            "within_variance_ratio": within,
            "verdict": self._verdict(spread, within),
        }

    def _verdict(self, spread: float, within: float) -> str:
        found = []
        if self.conditions and self.copies > _COPY_SHARE * self.conditions:
            found.append("CONTROL COPY")
        elif spread < _COLLAPSED:
            found.append("COLLAPSED ACROSS PERTURBATIONS")
        elif spread < _SHRUNK:
            found.append("SHRUNK")
        if within < _WITHIN_COLLAPSED:
            found.append("COLLAPSED WITHIN SETS")
        elif within > _OVER_DISPERSED:
            found.append("OVER-DISPERSED")
        if self.largest_context < 2:
            found.append("one perturbation per context: spread unknown")
        return ", ".join(found) or "no collapse"


def _spread(side: Side, cells: Cells) -> float:
    """Sum over genes of the variance over perturbations, less the variance of each mean."""
    noise_G: Floats = (cells.variance_PG / side.num_P[:, None]).mean(axis=0)
    return float((side.mean_PG.var(axis=0, ddof=1) - noise_G).sum())


def _unchanged(side: Side, cells: Cells) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Conditions whose squared change is within 3 standard errors of its noise."""
    control_G = side.control.variance_G / side.control.num_cells
    noise_PG = cells.variance_PG / side.num_P[:, None] + control_G
    excess_P = (side.delta_PG**2 - noise_PG).sum(axis=1)
    error_P = np.sqrt(2.0 * (noise_PG**2).sum(axis=1))
    return np.asarray(excess_P <= _STANDARD_ERRORS * error_P)
