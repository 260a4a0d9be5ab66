"""Paired differences: of one report against its baselines, and of models over several reports.

The unit is the cell line or donor. Methods meet condition by condition, differences are averaged
in the unit, and the interval is over units. Several trained seeds of a model are averaged inside
each condition before anything else, so that seeds are never counted as units.

>>> from scale.evaluate.compare import compare
>>> compare({"new": ["a/seed0", "a/seed1"], "old": ["b/seed0"]}, reference="old")  # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scale.evaluate import verdict
from scale.evaluate.aggregate import (
    CEILING,
    CELLS,
    CONDITION,
    Gain,
    condition_values,
    paired_gain,
    unit_word,
)
from scale.evaluate.baselines import BASELINES, ORACLE
from scale.evaluate.metrics import METRICS
from scale.evaluate.statistics import outcome_of

if TYPE_CHECKING:
    from scale.evaluate.protocol import Evaluation
    from scale.evaluate.report import Report

_MUST_AGREE = {
    "observed_sha256": "observed cells",
    "genes_sha256": "gene list",
    "train_sha256": "split (training cells)",
    "profile": "profile",
    "control_rule": "control rule",
    "control_folds_sha256": "control folds",
    "seed": "seed of the evaluation",
    "max_control_cells": "protocol.max_control_cells",
    "min_cells": "protocol.min_cells",
    "min_significant": "protocol.min_significant",
    "match_cells": "protocol.match_cells",
    "normalize": "protocol.normalize",
}
"""Facts of a report without which two reports are not of the same conditions and rules."""
_PROMISED = ("observed_sha256", "genes_sha256", "profile", "control_rule")
_NO_MODELS = (*BASELINES, ORACLE, CEILING)
_SHOWN = 5


@dataclass(frozen=True)
class _Source:
    """The scores of one model in one report; its values by metric."""

    name: str
    model: str
    scores: pd.DataFrame
    meta: Mapping[str, Any]

    @cached_property
    def values(self) -> dict[str, pd.Series]:
        """Metric -> value by (unit, context, perturbation)."""
        rows = self.scores[(self.scores["method"] == self.model) & (self.scores["form"] == CELLS)]
        groups = rows.groupby("metric", observed=True, sort=False)
        return {str(metric): condition_values(block) for metric, block in groups}

    @cached_property
    def conditions(self) -> frozenset[tuple[str, ...]]:
        """Conditions that were scored for any method."""
        table = self.scores[CONDITION].astype(str).drop_duplicates()
        return frozenset(zip(*(table[c] for c in CONDITION), strict=True))


def compare(
    reports: Mapping[str, Report | Path | str | Sequence[Report | Path | str]],
    *,
    reference: str,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Return how much better each model is than ``reference``, one row per model and metric.

    Parameters
    ----------
    reports
        Model -> its reports, one per trained seed: :class:`~scale.evaluate.report.Report`, or the
        directory of a saved one, so that runs of different days compare. A report of several
        models must hold one under the name given here.
    reference
        Model that the others are compared with.
    confidence
        Coverage of the intervals.

    Returns
    -------
    DataFrame
        ``model, reference, metric, is_claim, better``; ``mean, reference_mean`` over units;
        ``gain`` (positive = better, whichever direction is good) with ``low, high`` over units and
        ``reason`` where there is no interval; ``outcome`` (better or worse only where the interval
        leaves out 0); ``num_units, num_units_better, sign_p, best_sign_p``; ``num_conditions``
        that were paired (defined for every seed of both); ``num_seeds, seed_sd`` (standard
        deviation over seeds of the mean over units), ``reference_num_seeds, reference_seed_sd``,
        ``seed_note``; ``gain_by_unit``.

    Raises
    ------
    ValueError
        If reports are not of the same observed cells, genes, split, profile, control folds or
        conditions; each difference is listed.
    FileNotFoundError
        If a directory holds no report.

    Examples
    --------
    >>> compare({"new": [report_a, report_b], "old": [report_c]}, reference="old")  # doctest: +SKIP
    """
    if reference not in reports:
        raise ValueError(
            f"the reference {reference!r} is not among the models {', '.join(sorted(reports))}"
        )
    if len(reports) < 2:
        raise ValueError(f"only {reference!r} was given; comparing needs a second model")
    sources = {model: _sources(model, found) for model, found in reports.items()}
    _require_same(sources)
    rows = []
    for model in reports:
        if model == reference:
            continue
        for metric in METRICS:
            if METRICS[metric].better != "none" and all(
                metric in source.values for m in (model, reference) for source in sources[m]
            ):
                pair = sources[model], sources[reference]
                rows.append(
                    {
                        "model": model,
                        "reference": reference,
                        **_row(*pair, metric, confidence=confidence),
                    }
                )
    return pd.DataFrame(rows)


def differences(evaluation: Evaluation) -> pd.DataFrame:
    """Return what each model gains over the best baseline, one row per metric and unit.

    The baseline is the best on that metric, in its better form. Columns over all units (``gain``,
    ``low``, ``high``, ``reason``, ``outcome``, ``num_units``, ``num_units_better``, ``sign_p``,
    ``best_sign_p``) are the same in every row of a metric; ``unit``, ``gain_in_unit`` and
    ``num_conditions`` are those of the row. Gains are positive where the model is better.

    Parameters
    ----------
    evaluation
        Scores of models and baselines; without baselines the table is empty.
    """
    columns = ["model", "form", "metric", "is_claim", "better", "baseline", "baseline_form"]
    columns += ["unit", "gain_in_unit", "num_conditions", *_OVER_UNITS]
    methods = list(dict.fromkeys(evaluation.aggregate["method"].astype(str)))
    models = [m for m in methods if m not in (*BASELINES, CEILING, ORACLE)]
    rows = []
    for metric in dict.fromkeys(evaluation.aggregate["metric"].astype(str)):
        for model in models:
            found = verdict.against_best_baseline(evaluation, model, metric, tuple(BASELINES))
            if found is None or found.gains is None or found.better == "none":
                continue
            facts = {
                "model": model,
                "form": found.form,
                "metric": metric,
                "is_claim": found.is_claim,
                "better": found.better,
                "baseline": found.baseline,
                "baseline_form": found.baseline_form,
            }
            over_units = _over_units(found.gains)
            for unit, gain in found.gains.by_unit.items():
                count = found.gains.conditions_by_unit[unit]
                own = {"unit": unit, "gain_in_unit": gain, "num_conditions": count}
                rows.append({**facts, **own, **over_units})
    return pd.DataFrame(rows, columns=columns)


_OVER_UNITS = (
    "gain",
    "low",
    "high",
    "reason",
    "outcome",
    "num_units",
    "num_units_better",
    "sign_p",
    "best_sign_p",
)


def _over_units(gain: Gain) -> dict[str, float | int | str]:
    """Return the columns of a gain over all units, in the order of ``_OVER_UNITS``."""
    interval, signs = gain.interval, gain.signs
    values = (
        interval.mean,
        interval.low,
        interval.high,
        interval.reason,
        outcome_of(interval.low, interval.high),
        interval.num_units,
        signs.num_better,
        signs.p,
        signs.best_p,
    )
    return dict(zip(_OVER_UNITS, values, strict=True))


def _row(
    model: list[_Source],
    reference: list[_Source],
    metric: str,
    *,
    confidence: float,
) -> dict[str, Any]:
    better = METRICS[metric].better
    tables = [
        pd.DataFrame({seed: source.values[metric] for seed, source in enumerate(group)})
        for group in (model, reference)
    ]
    # A condition that one seed leaves undefined has no average over the seeds.
    kept = tables[0].notna().all(axis=1) & tables[1].notna().all(axis=1)
    own, rival = (table[kept.reindex(table.index, fill_value=False)] for table in tables)
    units = unit_word(own.index.to_frame(index=False))
    gain = paired_gain(
        own.mean(axis=1), rival.mean(axis=1), better=better, units=units, confidence=confidence
    )
    short = [len(group) for group in (model, reference) if len(group) == 1]
    return {
        "metric": metric,
        "is_claim": verdict.is_claim(metric),
        "better": better,
        "mean": _mean(own.mean(axis=1)),
        "reference_mean": _mean(rival.mean(axis=1)),
        **_over_units(gain),
        "num_conditions": gain.num_conditions,
        "num_seeds": len(model),
        "seed_sd": _seed_sd(own),
        "reference_num_seeds": len(reference),
        "reference_seed_sd": _seed_sd(rival),
        "seed_note": "one seed: training variance not covered" if short else "",
        "gain_by_unit": ", ".join(f"{unit} {value:+.4g}" for unit, value in gain.by_unit.items()),
    }


def _mean(values: pd.Series) -> float:
    """Mean over units of context means."""
    by_context = values.groupby(level=["unit", "context"]).mean()
    return float(by_context.groupby(level="unit").mean().mean())


def _seed_sd(values: pd.DataFrame) -> float:
    """Standard deviation over seeds (columns) of the mean over units; NaN for one seed."""
    means = [_mean(values[seed]) for seed in values.columns]
    return float(np.std(means, ddof=1)) if len(means) > 1 else float("nan")


def _sources(
    model: str, reports: Report | Path | str | Sequence[Report | Path | str]
) -> list[_Source]:
    """Read all reports of a model."""
    if isinstance(reports, str | Path) or not isinstance(reports, Sequence):
        reports = [reports]
    if not reports:
        raise ValueError(f"{model}: no report was given; one per trained seed is needed")
    found = []
    for place, report in enumerate(reports):
        name = f"{model}, report {place + 1}"
        if isinstance(report, str | Path):
            name, (scores, meta) = str(report), _read(Path(report))
        else:
            scores, meta = report.scores, report.meta
        methods = set(scores["method"].astype(str)) - {*BASELINES, CEILING, ORACLE}
        chosen = model if model in methods else next(iter(methods)) if len(methods) == 1 else ""
        if not chosen:
            raise ValueError(
                f"{name} holds the models {', '.join(sorted(methods)) or 'none'}, none of them "
                f"called {model!r}; use one of these names"
            )
        found.append(_Source(name, chosen, scores, meta))
    _require_different(model, found)
    return found


def _require_different(model: str, sources: list[_Source]) -> None:
    """Refuse one prediction given twice: it would pass for seeds that agree."""
    seen: dict[str, str] = {}
    for source in sources:
        key = str(dict(source.meta.get("predicted_sha256", {})).get(source.model, source.name))
        if key in seen:
            raise ValueError(
                f"{model}: {seen[key]} and {source.name} are of the same predicted cells; give one "
                "report per trained seed"
            )
        seen[key] = source.name


def _read(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return scores and facts of a saved report."""
    for file in ("scores.parquet", "meta.json"):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder} has no {file}; give the directory of a report (the one of report.html)"
            )
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return pd.read_parquet(folder / "scores.parquet"), dict(meta)


def _require_same(sources: Mapping[str, list[_Source]]) -> None:
    """Refuse reports that are not of the same conditions under the same rules."""
    every = [source for group in sources.values() for source in group]
    first, problems = every[0], []
    for source in every:
        absent = [key for key in _PROMISED if key not in source.meta]
        if absent:
            raise ValueError(
                f"{source.name}: its meta has no {', '.join(absent)}, so it is not known what it "
                "was made of; evaluate again with this version"
            )
    for other in every[1:]:
        for key, words in _MUST_AGREE.items():
            here, there = first.meta.get(key), other.meta.get(key)
            if here != there:
                problems.append(
                    f"{words}: {first.name} {_short(here)}, {other.name} {_short(there)}"
                )
        if first.conditions != other.conditions:
            few = _names(first.conditions ^ other.conditions)
            problems.append(f"conditions scored by {first.name} or {other.name} alone: {few}")
    if problems:
        raise ValueError(
            "the reports cannot be compared, they differ in:\n  "
            + "\n  ".join(problems)
            + "\nevaluate all models on the same files with the same protocol and seed"
        )


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _names(conditions: Iterable[tuple[str, ...]]) -> str:
    found = sorted({" ".join(dict.fromkeys(condition)) for condition in conditions})
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
