"""A report as one page: verdict, table, pictures, what was left out, how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scale.evaluate import html
from scale.evaluate.findings import POOLED_TITLE, POOLED_WARNING, Findings
from scale.evaluate.html import Cell, Row
from scale.evaluate.pictures import Picture, Subject
from scale.evaluate.text import facts, left_out
from scale.evaluate.verdict import (
    MEANINGS,
    Comparison,
    banners,
    collapse_sentence,
    label_of,
    overall,
    sentence,
    short_verdict,
)
from scale.plot.bars import CEILING, arrow, number
from scale.plot.canvas import CAN_DRAW

MOST_EXCLUDED = 100
"""Rows of left-out conditions on the page; the file has them all."""
_MOST_BESIDE = 3
"""Verdicts beside each other."""
_EXTREMES = 5
"""Best and worst conditions in their table."""


def build(
    findings: Findings,
    subject: Subject,
    pictures: Sequence[Picture],
    *,
    title: str,
    subtitle: str,
    meta: Mapping[str, Any],
) -> str:
    """Return the page."""
    figures = "".join(
        html.picture(
            name=p.name,
            title=p.title,
            caption=p.caption,
            alt=p.alt,
            pieces=[(piece.png, piece.width) for piece in p.pieces],
        )
        for p in pictures
    )
    sections = {
        "verdict": ("Verdict", _verdict(findings)),
        "scores": ("Scores", _scores(findings)),
        "pooled": (POOLED_TITLE, _pooled(findings)),
        "figures": ("Figures", figures or html.paragraph(_no_figures())),
        "conditions": ("Best and worst conditions", _conditions(subject)),
        "left-out": (left_out(len(findings.excluded)), _excluded(findings)),
        "made": ("How it was made", html.facts(facts(meta))),
    }
    return html.page(
        title=title,
        subtitle=subtitle,
        sections={name: parts for name, parts in sections.items() if parts[1]},
    )


def _no_figures() -> str:
    if CAN_DRAW:
        return "No figure could be drawn."
    return "matplotlib is not installed, so there are no figures: pip install matplotlib."


def _verdict(findings: Findings) -> str:
    parts = [
        html.paragraph(overall(model, comparisons, findings.verdict(model)), "lead")
        for model, comparisons in findings.comparisons.items()
    ]
    several = len(findings.models) > 1
    columns = min(len(findings.models), _MOST_BESIDE) if several else 0
    by_metric: dict[str, list[Comparison]] = {}
    for comparisons in findings.comparisons.values():
        for c in comparisons:
            by_metric.setdefault(c.metric, []).append(c)
    cards = []
    for metric, found in by_metric.items():
        if not found[0].is_claim:
            continue
        meaning = _capital(MEANINGS.get(metric, ""))
        title = f"{label_of(metric)}\N{NO-BREAK SPACE}{arrow(found[0].better)}"
        row = [
            html.verdict(
                title=c.model if several else title,
                chip=short_verdict(c),
                outcome=c.outcome,
                text=_capital(sentence(c)),
                small="" if several else meaning,
            )
            for c in found
        ]
        if several:
            parts.append(html.heading(title) + html.paragraph(meaning, "quiet"))
            parts.append(html.cards(row, columns=columns))
        cards += row
    if not several:
        parts.append(html.cards(cards))
    others = [c for found in by_metric.values() for c in found if not c.is_claim]
    if others:
        parts.append(html.paragraph("Not claim metrics, for description:", "quiet"))
        parts.append(
            html.points(
                (
                    f"{label_of(c.metric)} {arrow(c.better)}" + (f", {c.model}:" * several),
                    sentence(c),
                )
                for c in others
            )
        )
    lines = []
    for model in findings.models:
        collapse = findings.evaluation.collapse.get(model, {})
        told = collapse_sentence(model, collapse)
        alarm = any(word in findings.verdict(model) for word in _ALARMS)
        lines.append(("Mean-collapse check.", told, alarm))
    lines += [("", line, False) for line in banners(findings.evaluation, findings.baselines)]
    return "".join(parts) + html.notes(lines)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


_ALARMS = ("COLLAPSED", "SHRUNK", "OVER-DISPERSED", "CONTROL COPY")


def _scores(findings: Findings) -> str:
    columns = [("", "")]
    columns += [
        (f"{label_of(m)}\N{NO-BREAK SPACE}{arrow(findings.better(m))}", m)
        for m in findings.headline
    ]
    rows = []
    previous = "model"
    for line in findings.lines:
        cells = [
            Cell(
                number(findings.score(line, metric).mean),
                findings.score(line, metric).interval,
                findings.is_best(line, metric),
            )
            for metric in findings.headline
        ]
        kind = f"{line.kind} first" if line.kind != previous else line.kind
        previous = line.kind
        rows.append(Row(line.name, cells, kind))
    first = html.table(
        columns,
        rows,
        caption="Mean over contexts, with the t interval over independent units where there are "
        "three or more. The best of models and baselines is marked. The replicate, one "
        "half of the observed cells as a prediction of the other half, is the ceiling; it is "
        "carried to all cells where that is possible, else it lies between the two numbers in "
        "brackets. The oracle is the observed mean itself. ↑ higher is better, ↓ lower.",
    )
    first += html.notes(("", line, False) for line in findings.without_interval())
    return first + html.fold(f"All {len(findings.metrics)} metrics", _all_metrics(findings))


def _all_metrics(findings: Findings) -> str:
    rows = [
        Row(
            f"{metric} {arrow(findings.better(metric))}",
            [
                Cell(
                    number(findings.score(line, metric).mean),
                    findings.score(line, metric).interval,
                    findings.is_best(line, metric),
                )
                for line in findings.lines
            ],
        )
        for metric in findings.metrics
    ]
    return html.table([("metric", ""), *((line.name, "") for line in findings.lines)], rows)


def _pooled(findings: Findings) -> str:
    """The result with all contexts as one, each number beside the control copy's."""
    rows = [
        Row(
            f"{pooled.metric} {arrow(pooled.better)}",
            [text for pair in pooled.pairs for text in map(number, pair)],
        )
        for pooled in findings.pooled
    ]
    if not rows:
        return ""
    columns = [("pooled over contexts", "")]
    for method in findings.pooled_methods:
        columns += [(method, "pooled"), ("control copy", "pooled")]
    return html.table(columns, rows, caption=POOLED_WARNING)


def _conditions(subject: Subject) -> str:
    ranked = subject.ranking()
    if ranked is None:
        return ""
    metric, values = ranked
    best = subject.best_baseline(metric)
    columns = [("condition", ""), (subject.model, metric)]
    rivals = [m for m in (best, CEILING) if m and not subject.values(metric, m).empty]
    columns += [(m.replace("_", " "), metric) for m in rivals]
    columns += [("cells", "observed"), ("significant genes", "observed")]
    rows = subject.scores[
        (subject.scores["method"] == subject.model) & (subject.scores["metric"] == metric)
    ].drop_duplicates(["context", "perturbation"])
    known = rows.set_index(["context", "perturbation"])
    others = {m: subject.values(metric, m).to_dict() for m in rivals}
    if len(values) > 2 * _EXTREMES:
        chosen = [*values.index[:_EXTREMES], *values.index[-_EXTREMES:]]
    else:
        chosen = list(values.index)
    lines = []
    for place, condition in enumerate(chosen):
        cells = [number(float(values.to_dict()[condition]))]
        cells += [number(others[m].get(condition, float("nan"))) for m in rivals]
        for name in ("num_cells_observed", "num_significant_observed"):
            cells.append(_count(known[name].to_dict().get(condition)))
        cut = len(values) > 2 * _EXTREMES and place == _EXTREMES
        lines.append(Row(subject.name(condition, 60), cells, "first" if cut else ""))
    caption = f"{len(values)} conditions were scored; ranked by {label_of(metric).lower()}."
    return html.table(columns, lines, caption=caption)


def _count(value: Any) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{int(value):,}"


def _excluded(findings: Findings) -> str:
    table: pd.DataFrame = findings.excluded
    if table.empty:
        return "<p>Nothing: every condition of the predictions was scored.</p>"
    rows = [
        Row(str(context), [str(perturbation), str(reason)])
        for context, perturbation, reason in table[["context", "perturbation", "reason"]]
        .head(MOST_EXCLUDED)
        .itertuples(index=False)
    ]
    note = "" if len(table) <= MOST_EXCLUDED else f"The first {MOST_EXCLUDED}; all in excluded.csv."
    columns = [("context", ""), ("perturbation", ""), ("reason", "")]
    return html.table(columns, rows, caption=note, text_columns=(0, 1))
