"""A report as one page: verdict, table, pictures, what was left out, how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scale.evaluate import html
from scale.evaluate.findings import POOLED_TITLE, POOLED_WARNING, Findings
from scale.evaluate.html import Cell, Row
from scale.evaluate.notices import banners, collapse_sentence, is_alarm
from scale.evaluate.pictures import Picture, Subject
from scale.evaluate.provenance import in_words
from scale.evaluate.text import left_out
from scale.evaluate.verdict import (
    MEANINGS,
    Comparison,
    gain_in_short,
    label_of,
    overall,
    sentence,
    short_verdict,
)
from scale.plot.bars import CEILING, arrow, number
from scale.plot.canvas import CAN_DRAW, method_name

MOST_EXCLUDED = 100
"""Rows of left-out conditions on the page; the file has them all."""
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
        "figures": ("Figures", _not_drawn(subject) + figures if figures else _no_figures()),
        "conditions": ("Best and worst conditions", _conditions(subject)),
        "left-out": (left_out(len(findings.excluded)), _excluded(findings)),
        "made": ("How it was made", html.facts(in_words(meta))),
    }
    return html.page(
        title=title,
        subtitle=subtitle,
        sections={name: parts for name, parts in sections.items() if parts[1]},
    )


def _no_figures() -> str:
    if CAN_DRAW:
        return html.paragraph("No figure could be drawn.")
    return html.paragraph(
        "matplotlib is not installed, so there are no figures: pip install matplotlib."
    )


def _not_drawn(subject: Subject) -> str:
    """Say which models only the tables and the bars have."""
    rest = subject.models[len(subject.shown) :]
    if not rest:
        return ""
    return html.paragraph(
        f"Figures of conditions, genes and cells show {', '.join(subject.shown)}; "
        f"{', '.join(rest)} stand{'s' if len(rest) == 1 else ''} in the tables, the bars and the "
        "figures of all methods.",
        "quiet",
    )


def _verdict(findings: Findings) -> str:
    """The answer of each model, what limits it, and the claim metrics one by one."""
    answers = "".join(
        html.answer(
            overall(model, comparisons, findings.verdict(model)),
            "Mean-collapse check.",
            _capital(collapse_sentence(findings.evaluation.collapse.get(model, {}))),
            alarm=is_alarm(findings.verdict(model)),
        )
        for model, comparisons in findings.comparisons.items()
    )
    limits = html.points((("", line) for line in banners(findings)), kind="limits")
    claims = _claim_cards if len(findings.models) == 1 else _claim_table
    return answers + limits + claims(findings)


def _claim_cards(findings: Findings) -> str:
    """One card per claim metric of the only model, and its other comparisons as a list."""
    comparisons = findings.comparisons[findings.models[0]]
    cards = [
        html.verdict(
            title=_titled(c),
            chip=short_verdict(c),
            outcome=c.outcome,
            text=_capital(sentence(c)),
            small=_capital(MEANINGS.get(c.metric, "")),
        )
        for c in comparisons
        if c.is_claim
    ]
    others = [(_titled(c), sentence(c)) for c in comparisons if not c.is_claim]
    return html.cards(cards) + _described(others)


def _claim_table(findings: Findings) -> str:
    """Claim metrics beside each other, a row per model, and every comparison in words."""
    by_metric: dict[str, dict[str, Comparison]] = {}
    for model, comparisons in findings.comparisons.items():
        for c in comparisons:
            by_metric.setdefault(c.metric, {})[model] = c
    claims = {m: found for m, found in by_metric.items() if next(iter(found.values())).is_claim}
    columns = [("", ""), *((_titled(next(iter(c.values()))), m) for m, c in claims.items())]
    rows = [
        Row(model, [_claim_cell(found.get(model)) for found in claims.values()], "model")
        for model in findings.models
    ]
    first = [next(iter(found.values())) for found in claims.values()]
    rows.append(Row("best baseline", [_baseline_cell(c) for c in first], "first"))
    rows.append(Row("repeated experiment", [_ceiling_cell(c) for c in first], "ceiling"))
    table = html.table(
        columns,
        rows,
        caption="Claim metrics: the score, the paired gain over the best baseline with its "
        "interval over independent units, and in how many of them the model is better.",
    )
    words = [
        html.heading(_titled(next(iter(found.values()))))
        + html.paragraph(_capital(MEANINGS.get(metric, "")), "quiet")
        + html.points((f"{model}:", sentence(c)) for model, c in found.items())
        for metric, found in claims.items()
    ]
    others = [
        (f"{_titled(c)}, {model}:", sentence(c))
        for metric, found in by_metric.items()
        for model, c in found.items()
        if metric not in claims
    ]
    return table + html.fold("Every comparison in words", "".join(words) + _described(others))


def _titled(comparison: Comparison) -> str:
    return f"{label_of(comparison.metric)}\N{NO-BREAK SPACE}{arrow(comparison.better)}"


def _claim_cell(c: Comparison | None) -> Cell:
    if c is None:
        return Cell("–")
    gain = "" if c.baseline is None else gain_in_short(c)
    return Cell(number(c.value), gain, chip=short_verdict(c), outcome=c.outcome)


def _baseline_cell(c: Comparison) -> Cell:
    if c.baseline is None:
        return Cell("–")
    return Cell(number(c.baseline_value), method_name(c.baseline))


def _ceiling_cell(c: Comparison) -> Cell:
    bound = np.isfinite(c.ceiling_bound) and number(c.full_ceiling) == number(c.ceiling)
    return Cell(number(c.full_ceiling), f"to {number(c.ceiling_bound)}" if bound else "")


def _described(others: Sequence[tuple[str, str]]) -> str:
    if not others:
        return ""
    return html.paragraph("Not claim metrics, for description:", "quiet") + html.points(others)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _scores(findings: Findings) -> str:
    columns = [("", "")]
    columns += [
        (f"{label_of(m)}\N{NO-BREAK SPACE}{arrow(findings.better(m))}", m)
        for m in findings.headline
    ]
    rows = []
    previous = "model"
    for line in findings.best_lines:
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
        "three or more. The best of models and baselines is marked; a baseline stands in the "
        "better of its two forms, dispersed cells or their exact mean. The replicate, one half of "
        "the observed cells as a prediction of the other half, is the ceiling; it is "
        "carried to all cells where that is possible, else it lies between the two numbers in "
        "brackets. The oracle is the observed mean itself. ↑ higher is better, ↓ lower.",
    )
    first += html.points((("", line) for line in findings.without_interval()), kind="limits")
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
    """The best and the worst conditions of each model; those of the first model stand open."""
    tables = {m: _extremes(subject, m) for m in subject.models}
    tables = {m: table for m, table in tables.items() if table}
    if len(tables) == 1:
        return "".join(tables.values())
    return "".join(
        html.fold(f"Best and worst conditions of {model}", table, is_open=place == 0)
        for place, (model, table) in enumerate(tables.items())
    )


def _extremes(subject: Subject, model: str) -> str:
    """The conditions at both ends of a model's ranking, with what the others score there."""
    ranked = subject.ranking(model)
    if ranked is None:
        return ""
    metric, values = ranked
    others = [m for m in subject.models if m != model]
    methods = [model, *others, subject.best_baseline(metric), CEILING]
    scores = {m: subject.values(metric, m).to_dict() for m in methods if m is not None}
    scores = {m: known for m, known in scores.items() if known}
    columns = [("condition", ""), *((method_name(m), metric) for m in scores)]
    columns += [("cells", "observed"), ("significant genes", "observed")]
    rows = subject.scores[
        (subject.scores["method"] == model) & (subject.scores["metric"] == metric)
    ].drop_duplicates(["context", "perturbation"])
    known = rows.set_index(["context", "perturbation"])
    counts = [known[n].to_dict() for n in ("num_cells_observed", "num_significant_observed")]
    is_cut = len(values) > 2 * _EXTREMES
    chosen = list(values.index)
    if is_cut:
        chosen = [*chosen[:_EXTREMES], *chosen[-_EXTREMES:]]
    lines = [
        Row(
            subject.name(condition, 60),
            [
                *(number(of_method.get(condition, float("nan"))) for of_method in scores.values()),
                *(_count(of_count.get(condition)) for of_count in counts),
            ],
            "first" if is_cut and place == _EXTREMES else "",
        )
        for place, condition in enumerate(chosen)
    ]
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
