"""A report as text: Markdown that lines up in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scale.evaluate.findings import POOLED_TITLE, POOLED_WARNING, Findings
from scale.evaluate.notices import banners, collapse_sentence
from scale.evaluate.provenance import in_words
from scale.evaluate.verdict import label_of, overall, sentence
from scale.plot.bars import arrow, number
from scale.plot.canvas import method_name

MOST_EXCLUDED = 40
"""Lines of left-out conditions in the text; the file has them all."""


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = [
            text.ljust(width) if place == 0 else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def main_table(findings: Findings) -> str:
    """Return the first table: methods x headline metrics; ``*`` marks the best."""
    rows = [["", *(f"{m} {arrow(findings.better(m))}" for m in findings.headline)]]
    for line in findings.best_lines:
        cells = []
        for metric in findings.headline:
            mark = "*" if findings.is_best(line, metric) else " "
            cells.append(number(findings.score(line, metric).mean) + mark)
        rows.append([line.name, *cells])
    return columns(rows)


def full_table(findings: Findings) -> str:
    """Return every metric of every method, a baseline in its better form."""
    means = findings.summary()
    rows = [["", *map(method_name, means)]]
    for metric in findings.metrics:
        name = f"{metric} {arrow(findings.better(metric))}".rstrip()
        rows.append([name, *(number(each[metric]) for each in means.values())])
    return columns(rows)


def _pooled(findings: Findings) -> list[str]:
    """Return the section of the pooled result, nothing where nothing was pooled."""
    if not findings.pooled:
        return []
    rows = [["pooled over contexts"]]
    for method in findings.pooled_methods:
        rows[0] += [f"{method}, pooled", "control copy, pooled"]
    for line in findings.pooled:
        cells = [number(value) for pair in line.pairs for value in pair]
        rows.append([f"{line.metric} {arrow(line.better)}".rstrip(), *cells])
    return [f"## {POOLED_TITLE}", "", POOLED_WARNING, "", columns(rows), ""]


def left_out(count: int) -> str:
    """Return the heading over the conditions that were left out."""
    return f"Left out: {count:,} condition{'' if count == 1 else 's'}"


def markdown(findings: Findings, *, title: str, subtitle: str, meta: Mapping[str, Any]) -> str:
    """Return the whole report as text."""
    lines = [f"# {title}", "", subtitle, "", "## Verdict", ""]
    for model, comparisons in findings.comparisons.items():
        check = collapse_sentence(findings.evaluation.collapse.get(model, {}))
        lines += [overall(model, comparisons, findings.verdict(model)), ""]
        lines += [f"- Mean-collapse check of {model}: {check}", ""]
    lines += [f"- {line}" for line in banners(findings)]
    for model, comparisons in findings.comparisons.items():
        lines += ["", f"{model} against the best baseline:", ""]
        lines += [f"- {label_of(c.metric)}: {sentence(c)}" for c in comparisons]
    lines += ["", "## Scores", "", main_table(findings), ""]
    lines += [
        "Means over contexts; `*` = best of models and baselines. A baseline stands in the "
        "better of its forms; the replicate is the ceiling.",
        *findings.without_interval(),
        "",
        *_pooled(findings),
        "## All metrics",
        "",
        "A baseline in its better form; intervals stand in aggregate.csv.",
        "",
        full_table(findings),
        "",
        f"## {left_out(len(findings.excluded))}",
        "",
    ]
    if len(findings.excluded):
        shown = findings.excluded.head(MOST_EXCLUDED).astype(str)
        names = ["context", "perturbation", "reason"]
        lines.append(columns([names, *shown[names].to_numpy().tolist()]))
        if len(findings.excluded) > MOST_EXCLUDED:
            lines.append(f"... {len(findings.excluded) - MOST_EXCLUDED} more in excluded.csv")
        lines.append("")
    lines += ["## How it was made", ""]
    lines += [f"- {name}: {value}" for name, value in in_words(meta).items()]
    return "\n".join(lines) + "\n"
