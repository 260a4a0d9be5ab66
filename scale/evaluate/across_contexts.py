"""Metrics that need every context at once: what a perturbation does everywhere, and what not.

Apart from ``scoring``, which sees one context: here mean changes are kept until the last context is
done. Their values stand beside the others in the table, one per condition, but under one common
unit: contexts are no independent repeats of a number that is made from all of them, so that no
interval is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from scale.evaluate import metrics
from scale.evaluate.metrics import METRICS
from scale.evaluate.scoring import DATA, PREDICTION
from scale.evaluate.statistics import Floats, Floats32

UNIT = "all contexts"
"""Unit of the rows."""
WHOLE = -1
"""Number in place of a split's for whole cells."""
NAMES = ("shared_pearson", "modulation_pearson")
_CONSTANT = 1e-6
"""Changes are kept in float32: a spread below this is rounding."""
_COLUMNS = ["method", "form", "split", "context", "perturbation", "metric", "value", "reason"]

Key = tuple[str, str, int]


def shared_pearson(predicted_CG: Floats, observed_CG: Floats) -> float:
    """Return the Pearson correlation of mean changes over contexts. Higher is better.

    What the perturbation does in all contexts alike. A control copy has 0 where the controls are
    split, a replicate more than in one context, as the noise of the contexts averages out. Our
    definition: SCALE (arXiv 2603.17380) names such a correlation without a formula.
    """
    means = predicted_CG.mean(axis=0)[None], observed_CG.mean(axis=0)[None]
    return float(metrics.pearson(*means, constant=_CONSTANT)[0])


def modulation_pearson(predicted_CG: Floats, observed_CG: Floats) -> Floats:
    """Return, per context, the Pearson correlation of what differs from the mean over contexts.

    How contexts modulate the perturbation. Higher is better. A control copy has 0 where the
    controls are split; a replicate as much as the contexts differ beyond noise. Our definition, as
    of :func:`shared_pearson`.
    """
    apart = predicted_CG - predicted_CG.mean(axis=0), observed_CG - observed_CG.mean(axis=0)
    return metrics.pearson(*apart, constant=_CONSTANT)


class AcrossContexts:
    """Keeps mean changes context by context, [P, G] in float32, and scores them at the end.

    Parameters
    ----------
    strict
        An undefined value that is the prediction's fault gets what knowing nothing is worth.
    """

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._observed: dict[tuple[int, str, str], Floats32] = {}
        self._predicted: dict[Key, dict[str, dict[str, Floats32]]] = {}

    def observe(
        self, context: str, labels: Sequence[str], observed_PG: Floats, split: int = WHOLE
    ) -> None:
        """Keep the observed changes of a context; ``split`` tells halvings from whole cells."""
        for label, observed_G in zip(labels, observed_PG.astype(np.float32), strict=True):
            self._observed[split, context, label] = observed_G

    def add(
        self,
        method: str,
        form: str,
        context: str,
        labels: Sequence[str],
        predicted_PG: Floats,
        split: int = WHOLE,
    ) -> None:
        """Keep the predicted changes of some conditions of a context."""
        by_label = self._predicted.setdefault((method, form, split), {})
        for label, predicted_G in zip(labels, predicted_PG.astype(np.float32), strict=True):
            by_label.setdefault(label, {})[context] = predicted_G

    def scores(self) -> pd.DataFrame:
        """Return method, form, split, context, perturbation, metric, value, reason of each."""
        rows = [
            (*key, context, label, name, value, reason)
            for key, by_label in self._predicted.items()
            for name in NAMES
            for label, predicted in by_label.items()
            for context, value, reason in self._values(name, label, predicted, key[2])
        ]
        return pd.DataFrame(rows, columns=_COLUMNS)

    def _values(
        self, name: str, label: str, predicted: Mapping[str, Floats32], split: int
    ) -> list[tuple[str, float, str]]:
        contexts = list(predicted)
        if len(contexts) < 2:
            return [(contexts[0], float("nan"), f"{DATA}: scored in one context")]
        predicted_CG = np.stack(list(predicted.values())).astype(np.float64)
        observed = [self._observed[split, context, label] for context in contexts]
        observed_CG = np.stack(observed).astype(np.float64)
        if name == "shared_pearson":
            values_C = np.full(len(contexts), shared_pearson(predicted_CG, observed_CG))
        else:
            values_C = modulation_pearson(predicted_CG, observed_CG)
        found = []
        for context, value in zip(contexts, values_C.tolist(), strict=True):
            reason = f"{PREDICTION}: the change is constant" if np.isnan(value) else ""
            if reason and self._strict:
                value = METRICS[name].no_skill
            found.append((context, value, reason))
        return found


def add_rows(scores: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Return the long table of scores with those of :meth:`AcrossContexts.scores`.

    Values of several splits are averaged. All else of a condition is as in its other rows.
    """
    columns = ["method", "form", "context", "perturbation"]
    values: dict[tuple[str, ...], list[float]] = {}
    reasons: dict[tuple[str, ...], str] = {}
    for value, reason, *key in zip(
        *(found[name] for name in ["value", "reason", "metric", *columns]), strict=True
    ):
        values.setdefault(tuple(key), []).append(value)
        reasons.setdefault(tuple(key), reason)
    template = scores[scores["metric"] == "pearson_delta"].assign(unit=UNIT)
    conditions = list(zip(*(template[name] for name in columns), strict=True))
    blocks = [scores]
    for name in NAMES:
        keys = [(name, *condition) for condition in conditions]
        present = np.array([key in values for key in keys], dtype=bool)
        keys = [key for key in keys if key in values]
        blocks.append(
            template[present].assign(
                metric=name,
                value=[float(np.mean(values[key])) for key in keys],
                reason=[reasons[key] for key in keys],
            )
        )
    return pd.concat(blocks, ignore_index=True)


def split_means(found: pd.DataFrame) -> list[tuple[int, str, str, str, float]]:
    """Return (split, unit, context, metric, mean over conditions) of the ceiling's rows."""
    keys = ["split", "context", "metric"]
    means = found.groupby(keys, sort=False)["value"].mean().reset_index()
    return [
        (int(split), UNIT, str(context), str(metric), float(value))
        for split, context, metric, value in zip(*(means[c] for c in [*keys, "value"]), strict=True)
    ]
