"""What every figure of a report asks of an evaluation, and what a figure is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scale.evaluate.verdict import form_of, headline_metrics, label_of
from scale.plot.bars import CEILING, arrow, better_forms, condition_values
from scale.plot.canvas import Figure, method_colours, png_pieces, shorten
from scale.plot.cells import pretty

if TYPE_CHECKING:
    from scale.evaluate.protocol import Evaluation

_DOTS = 96.0
MOST_PIXELS = 1075.0

Condition = tuple[str, str]
"""(context, perturbation)."""


MOST_MODELS = 3
"""Models drawn beside each other; the tables have all of them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A PNG and the pixels at which it is shown; it holds more, for dense screens."""

    png: bytes
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One figure of the report."""

    name: str
    title: str
    caption: str
    alt: str
    pieces: tuple[Piece, ...]
    """From left to right; a narrow screen shows them below each other."""


class Subject:
    """An evaluation with what every builder asks of it."""

    def __init__(
        self,
        evaluation: Evaluation,
        models: list[str],
        baselines: list[str],
        training_metrics: pd.DataFrame | None = None,
    ) -> None:
        self.evaluation = evaluation
        self.scores = evaluation.scores
        self.aggregate = evaluation.aggregate
        self.models = models
        self.baselines = baselines
        self.training_metrics = training_metrics
        self.colours = method_colours(models, baselines)
        self.order = [*models, *baselines, CEILING]
        self.headline = headline_metrics(self.aggregate)
        self.contexts = list(dict.fromkeys(self.scores["context"].astype(str)))

    @property
    def model(self) -> str:
        """The first model: the one that figures of a single model show."""
        return self.models[0]

    @property
    def shown(self) -> list[str]:
        """The models that are drawn beside each other."""
        return self.models[:MOST_MODELS]

    def rivals(self, metric: str, *, ceiling: bool = True) -> dict[str, pd.Series]:
        """Values per condition of models, the best baseline and the replicate, where defined."""
        names = [*self.shown, self.best_baseline(metric), CEILING if ceiling else None]
        found = {m: self.values(metric, m) for m in names if m is not None}
        return {m: values for m, values in found.items() if not values.empty}

    def methods_of(self, metric: str) -> dict[str, str]:
        """Method -> better form for the methods with values of a metric, in drawing order."""
        rows = better_forms(self.aggregate, metric)
        forms = rows["form"].to_dict()
        return {m: str(forms[m]) for m in self.order if m in forms}

    def best_baseline(self, metric: str) -> str | None:
        """Name of the baseline that is best on a metric."""
        rows = better_forms(self.aggregate, metric)
        means = {m: v for m, v in rows["mean"].to_dict().items() if m in self.baselines}
        if not means:
            return None
        choose = max if rows["better"].iloc[0] == "higher" else min
        return str(choose(means, key=lambda name: means[name]))

    def values(self, metric: str, method: str) -> pd.Series:
        """Values of a method's better form by (context, perturbation)."""
        form = form_of(self.aggregate, method, metric)
        if form is None:
            return pd.Series(dtype=np.float64)
        return condition_values(self.scores, metric, method, form)

    def ranking(self, model: str) -> tuple[str, pd.Series] | None:
        """The metric that ranks conditions, and a model's values, best first."""
        for metric in ("residual_pearson", "pearson_delta"):
            values = self.values(metric, model)
            if not values.empty:
                return metric, values.sort_values(ascending=False, kind="stable")
        return None

    def examples(self, model: str) -> dict[str, Condition]:
        """Best, median and worst condition of a model among those with a table of changes."""
        ranked = self.ranking(model)
        if ranked is None:
            return {}
        known = [
            c
            for c in ranked[1].index
            if all(has_row(self.evaluation.deltas, m, c) for m in ("observed", model))
        ]
        if not known:
            return {}
        chosen = {"Best": known[0], "Median": known[len(known) // 2], "Worst": known[-1]}
        return {"The only": known[0]} if len(known) == 1 else chosen

    def name(self, condition: Condition, length: int = 34) -> str:
        """Text for a condition; the context is left out where there is only one."""
        context, perturbation = condition
        text = pretty(perturbation)
        return shorten(text if len(self.contexts) == 1 else f"{text}, {context}", length)

    def words(self, metric: str) -> str:
        """Label of a metric with the arrow of the good direction."""
        rows = self.aggregate[self.aggregate["metric"] == metric]
        return f"{label_of(metric)} {arrow(str(rows['better'].iloc[0]))}"


def has_row(tables: dict[Condition, pd.DataFrame], method: str, condition: Condition) -> bool:
    """Return whether a method has a row for a condition."""
    table = tables.get((method, condition[0]))
    return table is not None and condition[1] in table.index


def row_of(tables: dict[Condition, pd.DataFrame], method: str, condition: Condition) -> pd.Series:
    """Return a method's numbers per gene for a condition."""
    table = tables[method, condition[0]]
    row = table.index.get_loc(condition[1])
    return pd.Series(table.iloc[row].to_numpy(np.float64), index=table.columns)


def picture_of(name: str, title: str, caption: str, alt: str, figure: Figure) -> Picture:
    """Return a figure as it stands in the report."""
    scale = min(_DOTS, MOST_PIXELS / float(figure.get_figwidth()))
    pieces = tuple(Piece(data, int(scale * inches)) for data, inches in png_pieces(figure))
    return Picture(name=name, title=title, caption=caption, alt=alt, pieces=pieces)
