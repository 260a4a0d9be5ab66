"""Where the numbers of a report come from: every fact by name, those that nobody gave as unknown.

A reader of a report has to know what the numbers rest on (split, genes, controls, normalisation,
seeds, weights), and also which of these things cannot be told from what was given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py

from scale.config import Profile
from scale.runtime import versions

if TYPE_CHECKING:
    from anndata import AnnData

UNKNOWN = "unknown"

_UNDEFINED = {
    Profile.strict.value: "left out for every method where the data has no answer; the value of no "
    "skill where the prediction has none",
    Profile.cell_eval.value: "as cell-eval 0.8.2: left out of the mean, and counted",
    Profile.paper_pooled.value: "as cell-eval 0.8.2: left out of the mean, and counted",
}
_TO_BE_GIVEN = (
    "split",
    "split_sha256",
    "part",
    "held_out_controls_in_training",
    "genes_chosen_on",
    "checkpoint",
    "training_seed",
    "prediction_seed",
    "target_sum",
    "command",
)
"""Facts that the cells of an evaluation do not tell: whoever calls it has to."""

NAMES = {
    "profile": "protocol",
    "contexts": "contexts",
    "unit": "independent unit",
    "control_rule": "controls",
    "control_floor": "correlation of no effect, by shared controls",
    "undefined": "undefined values",
    "normalize": "normalised here",
    "target_sum": "counts per cell (target sum)",
    "num_conditions": "conditions scored",
    "num_contexts": "contexts scored",
    "num_predicted_not_scored": "predicted, but not observed",
    "num_genes": "genes",
    "genes_sha256": "gene list, SHA-256",
    "genes_chosen_on": "genes chosen on",
    "split": "split",
    "split_sha256": "split, SHA-256",
    "part": "part of the split",
    "held_out_controls_in_training": "controls of held-out contexts in training",
    "methods": "predictions",
    "predicted_sha256": "predicted cells, SHA-256",
    "observed_sha256": "observed cells, SHA-256",
    "train_sha256": "training cells of the baselines, SHA-256",
    "control_folds_sha256": "halves of the controls, SHA-256",
    "store_fingerprint": "store",
    "checkpoint": "weights, SHA-256",
    "predictor": "sampling",
    "training_seed": "seed of the training",
    "prediction_seed": "seed of the prediction",
    "seed": "seed of the evaluation",
    "num_splits": "halvings for the ceiling",
    "max_control_cells": "control cells per context, at most",
    "min_cells": "cells of a condition, at least",
    "min_significant": "significant genes for gene metrics, at least",
    "missing": "conditions that a prediction lacks",
    "match_cells": "equal numbers of cells drawn",
    "versions": "versions",
    "command": "command",
}
"""Facts in the order and the words of the page; others follow under their own names."""


def provenance(found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all facts of a report: what the evaluation found, what was given, and what is unknown.

    Parameters
    ----------
    found
        Of the evaluation; ``train_sha256`` is None without training cells.
    given
        By the caller. A fact that is neither found nor given is there as ``unknown``.
    """
    facts = {**found, **given}
    facts.setdefault("undefined", _UNDEFINED.get(str(facts.get("profile")), UNKNOWN))
    facts.setdefault("versions", versions())
    for name in _TO_BE_GIVEN:
        if facts.get(name) is None:
            facts[name] = UNKNOWN
    return facts


def of_predictions(predicted: Mapping[str, AnnData | Path | str]) -> dict[str, Any]:
    """Return what predictions say of their making in ``uns["scale"]``, by method.

    Parameters
    ----------
    predicted
        Method -> predicted cells, or the path of their h5ad; those that say nothing are unknown.
    """
    written = {method: _written(source) for method, source in predicted.items()}
    if not any(written.values()):
        return {}
    return {
        "checkpoint": {m: str(w.get("weights_sha256", UNKNOWN)) for m, w in written.items()},
        "prediction_seed": {m: str(w.get("seed", UNKNOWN)) for m, w in written.items()},
        "predictor": {
            m: f"version {w['version']}, steps {w['num_steps']}, guidance {w['guidance']}"
            if {"version", "num_steps", "guidance"} <= set(w)
            else UNKNOWN
            for m, w in written.items()
        },
    }


def _written(source: AnnData | Path | str) -> Mapping[str, Any]:
    if not isinstance(source, Path | str):
        found: Mapping[str, Any] = source.uns.get("scale", {})
        return found
    from anndata.io import read_elem

    with h5py.File(source, "r") as file:
        return dict(read_elem(file["uns/scale"])) if "uns/scale" in file else {}


def in_words(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts under their names on the page, each as one text; empty ones left out."""
    order = [*(n for n in NAMES if n in facts), *(n for n in facts if n not in NAMES)]
    words: dict[str, str] = {}
    for name in order:
        if name == "warnings" or (text := _text(name, facts[name])) == "":
            continue
        words[NAMES.get(name, name.replace("_", " "))] = text
    return words


_ABSENT = {
    "normalize": "no: the files hold log1p values",
    "train_sha256": "none given",
    "control_folds_sha256": "none: controls are not halved",
}


def _text(name: str, value: Any) -> str:
    if value is None:
        return _ABSENT.get(name, "")
    if isinstance(value, Mapping):
        return "; ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value)
    return _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)
