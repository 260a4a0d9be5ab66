"""Predictions that need no model, made from training cells and input control cells only.

Each baseline gives, per (context, perturbation), an expected change of log1p expression and of
log expression fractions. From these come two forms: ``mean``, the exact mean vector, and
``cells``, made by count shift: control cells are drawn, counts thinned or added so that the
expected fractions are met, and the cells normalised again. It keeps zeros and dispersion, which
adding a change to log values and clipping at 0 does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from scale.evaluate.checks import CellTable
from scale.evaluate.statistics import Floats, column_means

SEPARATOR = "+"
"""Text between the names of a combination."""


@dataclass(frozen=True, slots=True)
class Change:
    """Expected change of a condition against its control.

    Parameters
    ----------
    delta_G
        Of mean log1p expression.
    log_fraction_G
        Of log expression fractions; None without counts.
    """

    delta_G: Floats
    log_fraction_G: Floats | None

    @staticmethod
    def mean(changes: Sequence[Change]) -> Change:
        """Return the average of changes."""
        return Change.weighted(changes, [1.0 / len(changes)] * len(changes))

    @staticmethod
    def weighted(changes: Sequence[Change], weights: Sequence[float] | Floats) -> Change:
        """Return a weighted sum of changes."""
        delta_G = sum(w * c.delta_G for w, c in zip(weights, changes, strict=True))
        fractions = [c.log_fraction_G for c in changes if c.log_fraction_G is not None]
        log_fraction_G = None
        if len(fractions) == len(changes):
            log_fraction_G = sum(w * f for w, f in zip(weights, fractions, strict=True))
        return Change(np.asarray(delta_G), None if log_fraction_G is None else log_fraction_G)


class Unavailable(ValueError):
    """A baseline cannot exist for a condition; the message says why."""


@dataclass(frozen=True, slots=True)
class InputControl:
    """Control cells that a prediction may start from."""

    values: sp.csr_matrix
    counts: sp.csr_matrix | None

    @property
    def fraction_G(self) -> Floats | None:
        """Expression fractions, half a count added to each gene; None without counts."""
        if self.counts is None:
            return None
        total_G = np.asarray(self.counts.sum(axis=0, dtype=np.float64)).ravel() + 0.5
        return np.asarray(total_G / total_G.sum())


class Training:
    """Changes of all training conditions, each against the control of its context.

    Parameters
    ----------
    train
        Training cells with control cells, or None.
    control
        Label of the control.
    inputs
        Input control cells of the scored contexts: they stand in for the training file's own, so
        that no control cell of the reference half is read.
    """

    def __init__(
        self, train: CellTable | None, control: str, inputs: dict[str, InputControl]
    ) -> None:
        self.changes: dict[tuple[str, str], Change] = {}
        self.mean_G: dict[tuple[str, str], Floats] = {}
        self.control_mean_G = {c: column_means(i.values) for c, i in inputs.items()}
        if train is None:
            return
        groups = train.rows()
        for context in sorted({c for c, _ in groups}):
            source = inputs.get(context)
            if source is None and (rows := groups.get((context, control))) is not None:
                counts = None if train.counts is None else train.counts[rows]
                source = InputControl(train.values[rows], counts)
            if source is None:
                continue
            mean_G, fraction_G = column_means(source.values), source.fraction_G
            self.control_mean_G[context] = mean_G
            for pair in sorted(p for p in groups if p[0] == context and p[1] != control):
                self._add(pair, train, groups[pair], mean_G, fraction_G)

    def _add(
        self,
        pair: tuple[str, str],
        train: CellTable,
        rows: np.ndarray[tuple[int], np.dtype[np.int64]],
        control_mean_G: Floats,
        control_fraction_G: Floats | None,
    ) -> None:
        mean_G = column_means(train.values[rows])
        log_fraction_G = None
        if train.counts is not None and control_fraction_G is not None:
            total_G = np.asarray(train.counts[rows].sum(axis=0, dtype=np.float64)).ravel()
            # One pseudo-count per gene on average, spread like the control: it shrinks towards no
            # change whatever the depth, where a uniform one would make depth look like an effect.
            smoothed_G = total_G + total_G.size * control_fraction_G
            log_fraction_G = np.log(smoothed_G / smoothed_G.sum() / control_fraction_G)
        self.mean_G[pair] = mean_G
        self.changes[pair] = Change(mean_G - control_mean_G, log_fraction_G)

    @cached_property
    def contexts(self) -> list[str]:
        """Contexts with training perturbations."""
        return sorted({context for context, _ in self.changes})

    @cached_property
    def labels(self) -> list[str]:
        """Training perturbations of all contexts."""
        return sorted({label for _, label in self.changes})

    def of_context(self, context: str) -> list[Change]:
        """Changes of a context's training perturbations."""
        return [change for (c, _), change in self.changes.items() if c == context]

    def of_label(self, label: str) -> list[Change]:
        """Changes of a perturbation over the training contexts."""
        return [change for (_, p), change in self.changes.items() if p == label]

    def reference_mean_G(self, context: str) -> Floats | None:
        """Mean expression over the context's training perturbations, or None."""
        means = [mean_G for (c, _), mean_G in self.mean_G.items() if c == context]
        return np.mean(means, axis=0) if means else None

    @cached_property
    def reference_delta_G(self) -> Floats | None:
        """Mean change over training contexts of their mean change, or None."""
        if not self.contexts:
            return None
        return np.asarray(
            np.mean([Change.mean(self.of_context(c)).delta_G for c in self.contexts], axis=0)
        )

    @cached_property
    def _additive(self) -> tuple[Floats, list[Change]]:
        """Pseudo-inverse of the additive design, and the changes it multiplies."""
        pairs = list(self.changes)
        design = np.zeros((len(pairs), 1 + len(self.contexts) + len(self.labels)))
        design[:, 0] = 1.0
        for row, (context, label) in enumerate(pairs):
            design[row, 1 + self.contexts.index(context)] = 1.0
            design[row, 1 + len(self.contexts) + self.labels.index(label)] = 1.0
        inverse = np.asarray(np.linalg.pinv(design), dtype=np.float64)
        return inverse, [self.changes[pair] for pair in pairs]

    def additive(self, context: str, label: str) -> Change:
        """Return context effect + perturbation effect - grand mean, by least squares."""
        inverse, changes = self._additive
        query = np.zeros(inverse.shape[0])
        query[0] = 1.0
        first = 1 + len(self.contexts)
        if context in self.contexts:
            query[1 + self.contexts.index(context)] = 1.0
        else:
            query[1:first] = 1.0 / len(self.contexts)
        query[first + self.labels.index(label)] = 1.0
        return Change.weighted(changes, query @ inverse)


# --- the baselines ------------------------------------------------------------------------------


def _no_change(training: Training, context: str, label: str) -> Change:
    zero_G = np.zeros_like(training.control_mean_G[context])
    return Change(zero_G, zero_G)


def _perturbation_mean(training: Training, context: str, label: str) -> Change:
    own = training.of_context(context)
    if own:
        return Change.mean(own)
    if not training.contexts:
        raise Unavailable("no training perturbation")
    return Change.mean([Change.mean(training.of_context(c)) for c in training.contexts])


def _context_transfer(training: Training, context: str, label: str) -> Change:
    changes = training.of_label(label)
    if not changes:
        raise Unavailable("perturbation not in training")
    return Change.mean(changes)


def _additive(training: Training, context: str, label: str) -> Change:
    if label in training.labels:
        return training.additive(context, label)
    parts = [part.strip() for part in label.split(SEPARATOR)]
    missing = [part for part in parts if part not in training.labels]
    if len(parts) == 1 or missing:
        raise Unavailable(f"perturbation not in training: {', '.join(missing)}")
    singles = [
        training.changes.get((context, part)) or training.additive(context, part) for part in parts
    ]
    return Change.weighted(singles, [1.0] * len(singles))


def _nearest(training: Training, context: str, label: str) -> Change:
    """Change in the training context whose control profile correlates best with this one's."""
    known = [c for c, p in training.changes if p == label and c in training.control_mean_G]
    if not known:
        raise Unavailable("perturbation not in training")
    own_G = training.control_mean_G[context]
    closeness = [float(np.corrcoef(own_G, training.control_mean_G[c])[0, 1]) for c in known]
    return training.changes[(known[int(np.argmax(closeness))], label)]


BASELINES: dict[str, Callable[[Training, str, str], Change]] = {
    "control_copy": _no_change,
    "perturbation_mean": _perturbation_mean,
    "context_transfer": _context_transfer,
    "additive": _additive,
    "nearest": _nearest,
}
"""Expected change by baseline: (training, context, perturbation) -> change, or Unavailable."""
WITHOUT_TRAINING = ("control_copy",)


# --- cells --------------------------------------------------------------------------------------


def mean_of(change: Change, control_mean_G: Floats) -> Floats:
    """Return the mean expression of a condition, not below 0."""
    return np.maximum(control_mean_G + change.delta_G, 0.0)


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
    values = control.values[rows]
    if not change.delta_G.any():
        return values
    fraction_G = control.fraction_G
    if control.counts is None or fraction_G is None:
        raise Unavailable('no layers["counts"] of the control cells in observed')
    if change.log_fraction_G is None:
        raise Unavailable('no layers["counts"] in train')
    wanted_G = fraction_G * np.exp(change.log_fraction_G)
    wanted_G /= wanted_G.sum()
    counts = sp.csr_matrix(control.counts[rows], dtype=np.float64)
    library_S = np.asarray(counts.sum(axis=1)).ravel()
    scale_S = np.asarray(values.expm1().sum(axis=1, dtype=np.float64)).ravel()
    kept_G = np.minimum(1.0, wanted_G / fraction_G)
    thinned = generator.binomial(np.rint(counts.data).astype(np.int64), kept_G[counts.indices])
    counts = sp.csr_matrix(
        (thinned.astype(np.float64), counts.indices, counts.indptr), counts.shape
    )
    gains = np.flatnonzero(wanted_G > fraction_G)
    added = generator.poisson(library_S[:, None] * (wanted_G - fraction_G)[gains])
    row, column = np.nonzero(added)
    counts = counts + sp.csr_matrix(
        (added[row, column].astype(np.float64), (row, gains[column])), shape=counts.shape
    )
    counts.eliminate_zeros()
    total_S = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0)
    shifted = sp.csr_matrix(sp.diags(scale_S / total_S) @ counts)
    return sp.csr_matrix(shifted.log1p(), dtype=np.float32)
