"""What a reader must know before any number: the mean-collapse check, and what limits a claim.

Apart from the verdict because these lines hold whatever the comparisons say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from scale.evaluate.aggregate import unit_word
from scale.evaluate.collapse import ACROSS, COPY, OVER_DISPERSED, SHRUNK, WITHIN
from scale.evaluate.statistics import MINIMUM_UNITS, count_signs
from scale.plot.bars import CEILING, number

if TYPE_CHECKING:
    import pandas as pd

    from scale.evaluate.findings import Findings

_IN_WORDS = {
    ACROSS: "one response for every perturbation, or nearly so",
    COPY: "the control cells under other names",
    SHRUNK: "responses to different perturbations differ far less than the observed ones",
    WITHIN: "the cells of a predicted set are alike",
    OVER_DISPERSED: "the cells of a predicted set differ more than the observed ones",
}
_SIGN_LEVEL = 0.05


def is_alarm(verdict: str) -> bool:
    """Return whether a verdict of the mean-collapse check is one to be alarmed by."""
    return any(word in verdict for word in _IN_WORDS)


def collapse_sentence(facts: Mapping[str, object]) -> str:
    """Return what the mean-collapse check found of a model, in words; also that it found none."""
    parts = [
        f"{name} ({_IN_WORDS[name]})" if name in _IN_WORDS else name
        for name in str(facts.get("verdict", "not checked")).split(", ")
    ]
    parts = [", ".join(parts)]
    for name, words in (
        (
            "spread_ratio",
            "spread of the predicted responses over perturbations is {} of the "
            "observed (noise taken out)",
        ),
        ("within_variance_ratio", "variance within a predicted set is {} of the observed"),
    ):
        value = facts.get(name)
        if isinstance(value, int | float) and np.isfinite(value):
            parts.append(words.format(number(float(value))))
    if facts.get("no_skill"):
        parts.append(
            "intervals of residual_pearson and retrieval_l2 both hold the value of no skill, and "
            "end below those of a replicate"
        )
    return f"{'; '.join(parts)}."


def banners(findings: Findings) -> list[str]:
    """Return what limits every claim of the report, each in a line."""
    evaluation = findings.evaluation
    scores: pd.DataFrame = evaluation.scores
    lines = []
    if findings.pooled_evaluation is not None:
        lines.append(
            "Scores pooled over contexts stand in a section of their own: there a difference in "
            "the mix of contexts counts as an effect. The verdict is that of each context alone."
        )
    lines += _of_units(scores[scores["metric"] == "pearson_delta"])
    if not findings.baselines:
        lines.append("No baseline was scored (no training cells were given): no claim is possible.")
    if CEILING not in set(scores["method"]):
        lines.append("No ceiling was computed: how far a repeated experiment gets is not known.")
    lines += _once(map(str, evaluation.meta.get("warnings", [])), findings.models)
    lines.append("One trained model per method: the variance over training seeds is not covered.")
    return lines


def _of_units(scores: pd.DataFrame) -> list[str]:
    """What the number of independent units allows."""
    units = list(dict.fromkeys(scores["unit"].astype(str)))
    if len(units) == 1:
        another = "context" if unit_word(scores) == "contexts" else "unit"
        return [
            f"One independent unit only ({units[0]}), fewer than {MINIMUM_UNITS}: no interval. The "
            f"scores say nothing about another {another}."
        ]
    if len(units) < MINIMUM_UNITS:
        return [
            f"{len(units)} independent units only ({', '.join(units)}), fewer than "
            f"{MINIMUM_UNITS}: no intervals."
        ]
    if (best_p := count_signs(np.ones(len(units))).best_p) > _SIGN_LEVEL:
        return [
            f"A count of units proves little here: {len(units)} of {len(units)} is "
            f"p = {best_p:.4g} two-sided at best."
        ]
    return []


def _once(lines: Iterable[str], models: Iterable[str]) -> list[str]:
    """Say once what is true of several models: ``a: x`` and ``b: x`` are ``a, b: x``."""
    found: dict[str, list[str]] = {}
    known = set(models)
    for line in lines:
        name, _, rest = line.partition(": ")
        if rest and name in known:
            found.setdefault(rest, []).append(name)
        else:
            found.setdefault(line, [])
    return [f"{', '.join(names)}: {text}" if names else text for text, names in found.items()]
