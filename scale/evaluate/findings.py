"""An evaluation sorted for reading: who is a model, who a baseline, what is compared, what is best.

The text for the terminal and the page are two renderings of this one object, so that they cannot
say different things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from scale.evaluate.baselines import BASELINES, ORACLE
from scale.evaluate.verdict import Comparison, against_best_baseline, headline_metrics
from scale.plot.bars import CEILING, number
from scale.plot.canvas import method_name

if TYPE_CHECKING:
    from scale.evaluate.protocol import Evaluation

FULL_DEPTH = "full depth"
"""Form of the replicate that is carried from half of the cells to all of them."""

BETTER_FORM = "better form"
"""Form of a method in the first table: on each metric the better of those it has."""

POOLED_TITLE = "Pooled over contexts"
POOLED_WARNING = (
    "All contexts as one, as some papers score. Differences in the mix of contexts then count as "
    "an effect: read each number only beside that of the control copy, which knows nothing of any "
    "perturbation, and beside the scores of each context alone, above."
)

Kind = Literal["model", "baseline", "ceiling"]


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the tables: a method in one of its forms."""

    method: str
    form: str
    kind: Kind
    name: str


@dataclass(frozen=True, slots=True)
class Score:
    """One mean with its interval; NaN where there is none.

    A ceiling without a mean has a bracket in its place: it lies between ``low`` and ``high``.
    """

    mean: float
    low: float
    high: float

    @property
    def interval(self) -> str:
        """The interval as text, empty where there is none."""
        if not (np.isfinite(self.low) and np.isfinite(self.high)):
            return ""
        return f"[{number(self.low)}, {number(self.high)}]"


@dataclass(frozen=True, slots=True)
class PooledLine:
    """One metric pooled over contexts: (method, control copy) of each method."""

    metric: str
    better: str
    pairs: tuple[tuple[float, float], ...]


_NOTHING = Score(float("nan"), float("nan"), float("nan"))


@dataclass
class Findings:
    """What an evaluation found.

    Parameters
    ----------
    evaluation
        Scores of every method.
    """

    evaluation: Evaluation
    models: list[str] = field(init=False)
    baselines: list[str] = field(init=False)

    def __post_init__(self) -> None:
        found = list(dict.fromkeys(self.evaluation.aggregate["method"].astype(str)))
        others = [m for m in found if m not in (CEILING, ORACLE, "observed")]
        self.models = [m for m in others if m not in BASELINES]
        self.baselines = [m for m in BASELINES if m in others]
        if not self.models:
            raise ValueError(
                f"the evaluation has no model, only {', '.join(found) or 'nothing'}; give "
                "predicted cells"
            )

    @cached_property
    def headline(self) -> list[str]:
        """Metrics of the first table."""
        return headline_metrics(self.evaluation.aggregate)

    @cached_property
    def metrics(self) -> list[str]:
        """All metrics, those of the first table first."""
        present = list(dict.fromkeys(self.evaluation.aggregate["metric"].astype(str)))
        return [*self.headline, *(m for m in present if m not in self.headline)]

    @cached_property
    def comparisons(self) -> dict[str, list[Comparison]]:
        """Model -> comparisons with the best baseline, one per metric of the first table."""
        found = {
            model: [
                against_best_baseline(self.evaluation, model, m, self.baselines)
                for m in self.headline
            ]
            for model in self.models
        }
        return {model: [c for c in each if c is not None] for model, each in found.items()}

    @cached_property
    def lines(self) -> list[Line]:
        """Rows of the full table, one per method and form: models, baselines, the ceiling last."""
        lines = []
        for kind, method in self._methods:
            words, forms = method_name(method), self._forms[method]
            for form in forms:
                name = f"{words} ({form})" if len(forms) > 1 else words
                lines.append(Line(method, form, kind, name))
        return [*lines, *self._ceiling_lines]

    @cached_property
    def best_lines(self) -> list[Line]:
        """Rows of the first table: a method of two forms has on each metric the better one."""
        lines = [
            Line(method, BETTER_FORM, kind, method_name(method)) for kind, method in self._methods
        ]
        return [*lines, *self._ceiling_lines]

    @property
    def _methods(self) -> list[tuple[Kind, str]]:
        oracle = [ORACLE] if ORACLE in self._forms else []
        kinds: list[tuple[Kind, Sequence[str]]] = [
            ("model", self.models),
            ("baseline", self.baselines),
            ("ceiling", oracle),
        ]
        return [(kind, method) for kind, methods in kinds for method in methods]

    @property
    def _ceiling_lines(self) -> list[Line]:
        if CEILING not in self._forms:
            return []
        form = self._forms[CEILING][0]
        if not any(key[1] == FULL_DEPTH for key in self._scores):
            return [Line(CEILING, form, "ceiling", CEILING)]
        return [
            Line(CEILING, form, "ceiling", f"{CEILING}, half the cells"),
            Line(CEILING, FULL_DEPTH, "ceiling", f"{CEILING}, all cells"),
        ]

    @cached_property
    def _forms(self) -> dict[str, list[str]]:
        """Method -> its forms, cells before mean."""
        forms = self.evaluation.aggregate.groupby("method", observed=True)["form"]
        return {str(method): sorted(set(column.astype(str))) for method, column in forms}

    @cached_property
    def _scores(self) -> dict[tuple[str, str, str], Score]:
        table = self.evaluation.aggregate
        keys = zip(table["method"], table["form"], table["metric"], strict=True)
        numbers = table[["mean", "low", "high"]].to_numpy(np.float64)
        scores = {
            (str(a), str(b), str(c)): Score(*map(float, row))
            for (a, b, c), row in zip(keys, numbers, strict=True)
        }
        if "mean_full_depth" in table:
            ceiling = table[(table["method"] == CEILING) & table["mean_full_depth"].notna()]
            nan = float("nan")
            for metric, mean in zip(ceiling["metric"], ceiling["mean_full_depth"], strict=True):
                scores[CEILING, FULL_DEPTH, str(metric)] = Score(float(mean), nan, nan)
        if "mean_full_depth_bound" in table:
            bounded = table["mean_full_depth_bound"].notna() & (table["method"] == CEILING)
            columns = ["metric", "mean", "mean_full_depth_bound"]
            for metric, low, high in table.loc[bounded, columns].itertuples(index=False):
                bracket = Score(float("nan"), float(low), float(high))
                scores[CEILING, FULL_DEPTH, str(metric)] = bracket
        return scores

    @cached_property
    def _better(self) -> dict[str, str]:
        table = self.evaluation.aggregate
        return dict(zip(table["metric"].astype(str), table["better"].astype(str), strict=True))

    def better(self, metric: str) -> str:
        """``higher``, ``lower``, or ``none`` for a description."""
        return self._better[metric]

    def score(self, line: Line, metric: str) -> Score:
        """Mean and interval of a row on a metric."""
        if line.form != BETTER_FORM:
            return self._scores.get((line.method, line.form, metric), _NOTHING)
        forms = [self._scores.get((line.method, f, metric)) for f in self._forms[line.method]]
        known = [score for score in forms if score is not None and np.isfinite(score.mean)]
        if not known:
            return _NOTHING
        # a description has no better form: that of cells, which comes first
        choose = {"higher": max, "lower": min}.get(self.better(metric))
        return known[0] if choose is None else choose(known, key=lambda score: score.mean)

    def is_best(self, line: Line, metric: str) -> bool:
        """Whether a row is the best on a metric; the ceiling does not compete.

        Rows that print the same number are all marked.
        """
        if line.kind == "ceiling" or self.better(metric) == "none":
            return False
        rivals = [self.score(other, metric).mean for other in self.lines if other.kind != "ceiling"]
        rivals = [value for value in rivals if np.isfinite(value)]
        value = self.score(line, metric).mean
        if not rivals or not np.isfinite(value):
            return False
        top = max(rivals) if self.better(metric) == "higher" else min(rivals)
        return number(value) == number(top)

    def verdict(self, model: str) -> str:
        """Verdict of the mean-collapse check, empty where it was not made."""
        return str(self.evaluation.collapse.get(model, {}).get("verdict", ""))

    def summary(self) -> dict[str, dict[str, float]]:
        """Method -> metric -> mean over contexts; the better form where a method has two."""
        means: dict[str, dict[str, float]] = {}
        for line in self.lines:
            is_full = line.form == FULL_DEPTH
            of_method = means.setdefault(f"{CEILING}_full_depth" if is_full else line.method, {})
            for metric in self.metrics:
                value = self.score(line, metric).mean
                known = of_method.get(metric, float("nan"))
                if np.isfinite(known) and np.isfinite(value):
                    pick = {"higher": max, "lower": min}.get(self.better(metric))
                    of_method[metric] = known if pick is None else pick(known, value)
                elif not np.isfinite(known):
                    of_method[metric] = value
        return means

    def without_interval(self) -> list[str]:
        """Why scores of models have no interval, each reason once."""
        table = self.evaluation.aggregate
        if "reason" not in table:
            return []
        rows = table[table["method"].isin(self.models) & table["metric"].isin(self.headline)]
        found: dict[str, list[str]] = {}
        for metric, reason in zip(rows["metric"], rows["reason"].astype(str), strict=True):
            if reason and metric not in found.setdefault(reason, []):
                found[reason].append(str(metric))
        every = len(set(rows["metric"]))
        return [
            f"No interval{'' if len(metrics) == every else ' for ' + ', '.join(metrics)}: {reason}."
            for reason, metrics in found.items()
        ]

    @property
    def pooled_evaluation(self) -> Evaluation | None:
        """The same predictions with all contexts as one; never to be shown alone."""
        return self.evaluation.pooled

    @property
    def pooled_methods(self) -> list[str]:
        """Models of the pooled result."""
        pooled = self.pooled_evaluation
        if pooled is None:
            return []
        found = dict.fromkeys(pooled.aggregate["method"].astype(str))
        return [m for m in self.models if m in found]

    @cached_property
    def pooled(self) -> list[PooledLine]:
        """The pooled result, metric by metric; empty where nothing was pooled."""
        pooled = self.pooled_evaluation
        if pooled is None:
            return []
        lines = []
        for metric, rows in pooled.aggregate.groupby("metric", sort=False):
            known = rows.drop_duplicates("method").set_index("method")
            pairs = {
                str(m): (float(mean), float(copy))
                for m, mean, copy in zip(
                    known.index, known["mean"], known["control_copy"], strict=True
                )
            }
            nothing = (float("nan"), float("nan"))
            of_models = tuple(pairs.get(m, nothing) for m in self.pooled_methods)
            lines.append(PooledLine(str(metric), str(rows["better"].iloc[0]), of_models))
        return lines

    @property
    def excluded(self) -> pd.DataFrame:
        """Conditions that were left out, with the reason."""
        table: pd.DataFrame = self.evaluation.excluded
        return table
