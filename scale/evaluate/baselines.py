"""Predictions that need no model, made from training cells and input control cells only.

Each baseline gives, per (context, perturbation), an expected change of log1p expression and of
log expression fractions. From these come two forms: ``mean``, the exact mean vector, and
``cells``, made by count shift: control cells are drawn, counts thinned or added so that the
expected fractions are met, and the cells normalised again. It keeps zeros and dispersion, which
adding a change to log values and clipping at 0 does not. Two baselines are training cells
themselves, drawn again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from scale.evaluate.statistics import Floats
from scale.evaluate.training import Change, InputControl, Training

SEPARATOR = "+"
"""Text between the names of a combination."""


class Unavailable(ValueError):
    """A baseline cannot exist for a condition; the message says why."""


# --- the baselines ------------------------------------------------------------------------------


def _no_change(training: Training, context: str, label: str) -> Change:
    zero_G = np.zeros_like(training.control_mean_G[context])
    return Change(zero_G, zero_G)


def _perturbation_mean(training: Training, context: str, label: str) -> Change:
    found = training.mean_changes.get(context, training.mean_change)
    if found is None:
        raise Unavailable("no training perturbation")
    return found


def _context_transfer(training: Training, context: str, label: str) -> Change:
    if label not in training.of_label:
        raise Unavailable("perturbation not in training")
    return Change.mean(list(training.of_label[label].values()))


def _context_mean(training: Training, context: str, label: str) -> Change:
    if context not in training.of_context:
        raise Unavailable("no training perturbation in this context")
    return training.mean_cells[context]


def _other_perturbation(training: Training, context: str, label: str) -> Change:
    """Change of a random other perturbation: what cells that know nothing of this one score."""
    other = training.other_label(context, label)
    if other is None:
        raise Unavailable("no other training perturbation in this context")
    return training.changes[(context, other)]


def _additive(training: Training, context: str, label: str) -> Change:
    if label in training.of_label:
        return training.additive(context, label)
    parts = [part.strip() for part in label.split(SEPARATOR)]
    missing = [part for part in parts if part not in training.of_label]
    if len(parts) == 1 or missing:
        raise Unavailable(f"perturbation not in training: {', '.join(missing)}")
    singles = [
        training.changes.get((context, part)) or training.additive(context, part) for part in parts
    ]
    return Change.weighted(singles, np.ones(len(singles)))


def _nearest(training: Training, context: str, label: str) -> Change:
    """Change in the training context whose control profile correlates best with this one's."""
    known = [c for c in training.of_label.get(label, ()) if c in training.control_mean_G]
    if not known:
        raise Unavailable("perturbation not in training")
    own_G = training.control_mean_G[context]
    closeness = [float(np.corrcoef(own_G, training.control_mean_G[c])[0, 1]) for c in known]
    return training.changes[(known[int(np.argmax(closeness))], label)]


def _linear(training: Training, context: str, label: str) -> Change:
    if len(training.of_context) < 2:
        raise Unavailable("perturbation not in training in another context")
    try:
        return training.linear(context, label)
    except KeyError as error:
        raise Unavailable("perturbation not in training in another context") from error


BASELINES: dict[str, Callable[[Training, str, str], Change]] = {
    "control_copy": _no_change,
    "perturbation_mean": _perturbation_mean,
    "context_transfer": _context_transfer,
    "context_mean": _context_mean,
    "additive": _additive,
    "linear": _linear,
    "nearest": _nearest,
    "other_perturbation": _other_perturbation,
}
"""Expected change by baseline: (training, context, perturbation) -> change, or Unavailable."""
WITHOUT_TRAINING = ("control_copy",)
DRAWN = ("context_mean", "other_perturbation")
"""Baselines whose cells are training cells, drawn again."""
ORACLE = "oracle_mean"
"""The observed mean itself: a ceiling for the form ``mean``, and no baseline."""


# --- cells --------------------------------------------------------------------------------------


def mean_of(change: Change, control_mean_G: Floats) -> Floats:
    """Return the mean expression of a condition, not below 0."""
    return np.maximum(control_mean_G + change.delta_G, 0.0)


def baseline_cells(
    name: str,
    training: Training,
    condition: tuple[str, str],
    change: Change,
    control: InputControl,
    num_cells: int,
    generator: np.random.Generator,
) -> sp.csr_matrix:
    """Return the cells of a baseline for one (context, perturbation).

    Parameters
    ----------
    name
        Baseline, a key of ``BASELINES``.
    training
        Training cells.
    condition
        Context and perturbation.
    change
        What ``BASELINES[name]`` expects of it.
    control
        Control cells of the context that a prediction may start from.
    num_cells
        Cells to make.
    generator
        Of every draw.

    Raises
    ------
    Unavailable
        If there are no counts to shift.
    """
    if name not in DRAWN:
        return count_shift(control, change, num_cells, generator)
    context, label = condition
    source = training.other_label(context, label) if name == "other_perturbation" else None
    return training.draw(context, source, num_cells, generator)


def count_shift(
    control: InputControl, change: Change, num_cells: int, generator: np.random.Generator
) -> sp.csr_matrix:
    """Return log1p cells whose expected expression fractions are those of the change.

    Control cells are drawn with replacement. With f the control's and f* the wanted fractions of a
    gene and l the counts of a cell, its count becomes Binomial(count, min(1, f*/f)) +
    Poisson(l max(0, f* - f)); then the cell is normalised to its old total and log1p taken.

    Raises
    ------
    Unavailable
        If there are no counts to shift.
    """
    rows = generator.integers(0, control.values.shape[0], size=num_cells)
    if not change.delta_G.any():
        return control.values[rows]
    fraction_G = control.fraction_G
    if control.counts is None or fraction_G is None:
        raise Unavailable('no layers["counts"] of the control cells in observed')
    if change.log_fraction_G is None:
        raise Unavailable('no layers["counts"] in train')
    wanted_G = fraction_G * np.exp(change.log_fraction_G)
    wanted_G /= wanted_G.sum()
    counts = sp.csr_matrix(control.counts[rows], dtype=np.float64)
    library_S = np.asarray(counts.sum(axis=1)).ravel()
    kept_G = np.minimum(1.0, wanted_G / fraction_G)
    counts.data = generator.binomial(
        np.rint(counts.data).astype(np.int64), kept_G[counts.indices]
    ).astype(np.float64)
    gains = np.flatnonzero(wanted_G > fraction_G)
    added = generator.poisson(library_S[:, None] * (wanted_G - fraction_G)[gains])
    row, column = np.nonzero(added)
    counts = counts + sp.csr_matrix(
        (added[row, column].astype(np.float64), (row, gains[column])), shape=counts.shape
    )
    counts.eliminate_zeros()
    total_S = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0)
    counts.data *= np.repeat(control.total_N[rows] / total_S, np.diff(counts.indptr))
    return sp.csr_matrix(counts.log1p(), dtype=np.float32)
