"""Training cells in short: the change of every training condition against its control.

Apart from the baselines because residual metrics take their mean response from it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

import numpy as np
import scipy.sparse as sp

from scale.evaluate.cells import Rows
from scale.evaluate.checks import CellTable
from scale.evaluate.statistics import Floats, column_means, column_sums
from scale.runtime import derive

NUM_COMPONENTS = 10
RIDGE = 0.1
MINIMUM_ROWS = 2 * NUM_COMPONENTS
_POOL_CELLS = 2_000


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
        total_G = column_sums(self.counts) + 0.5
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
        self, train: CellTable | None, control: str, inputs: Mapping[str, InputControl]
    ) -> None:
        self.changes: dict[tuple[str, str], Change] = {}
        self.rows: dict[tuple[str, str], Rows] = {}
        self._train = train
        self._pool: tuple[str, sp.csr_matrix] | None = None
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
        rows: Rows,
        control_mean_G: Floats,
        control_fraction_G: Floats | None,
    ) -> None:
        mean_G = column_means(train.values[rows])
        log_fraction_G = None
        if train.counts is not None and control_fraction_G is not None:
            total_G = column_sums(train.counts[rows])
            # One pseudo-count per gene on average, spread like the control: it shrinks towards no
            # change whatever the depth, where a uniform one would make depth look like an effect.
            smoothed_G = total_G + total_G.size * control_fraction_G
            log_fraction_G = np.log(smoothed_G / smoothed_G.sum() / control_fraction_G)
        self.mean_G[pair] = mean_G
        self.rows[pair] = rows
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
        return np.asarray(np.mean(list(self._context_delta_G.values()), axis=0))

    def context_change(self, context: str) -> Change:
        """Mean change of the context's training cells, all perturbations together."""
        pairs = [pair for pair in self.changes if pair[0] == context]
        sizes = np.array([len(self.rows[pair]) for pair in pairs], dtype=np.float64)
        return Change.weighted([self.changes[pair] for pair in pairs], sizes / sizes.sum())

    def other_label(self, context: str, label: str) -> str | None:
        """Return another training perturbation of the context: random, but the same in every run.

        None where there is none.
        """
        others = sorted(p for c, p in self.changes if c == context and p != label)
        if not others:
            return None
        draw = derive(0, crc32(context.encode()), crc32(label.encode()))
        return others[draw % len(others)]

    def draw(
        self, context: str, label: str | None, count: int, generator: np.random.Generator
    ) -> sp.csr_matrix:
        """Return training cells, drawn with replacement.

        Parameters
        ----------
        context, label
            Whose; None = all perturbations of the context, of which 2,000 cells are read once.
        count
            Cells to draw.
        generator
            Of the draws.
        """
        assert self._train is not None
        if label is not None:
            rows = self.rows[context, label]
            return self._train.values[rows[generator.integers(0, rows.size, size=count)]]
        if self._pool is None or self._pool[0] != context:
            rows = np.concatenate([r for (c, _), r in self.rows.items() if c == context])
            order = np.random.default_rng(derive(0, crc32(context.encode()))).permutation(rows.size)
            self._pool = context, self._train.values[np.sort(rows[order[:_POOL_CELLS]])]
        pool = self._pool[1]
        return pool[generator.integers(0, pool.shape[0], size=count)]

    def effects(self, context: str, label: str) -> Floats | None:
        """Return an orthonormal basis [K, G] of what is known without their interaction.

        It spans the mean change over all training conditions, over those of the context (if there
        are any) and over those of the perturbation, each centred over the genes. None where the
        perturbation is not in training.
        """
        own = self.of_label(label)
        if not own:
            return None
        means = [self._mean_delta_G, np.mean([c.delta_G for c in own], axis=0)]
        if (mean_G := self._context_delta_G.get(context)) is not None:
            means.append(mean_G)
        effect_KG = np.stack(means)
        effect_KG -= effect_KG.mean(axis=1, keepdims=True)
        _, singular_K, basis_KG = np.linalg.svd(effect_KG, full_matrices=False)
        return np.asarray(basis_KG[singular_K > 1e-9 * max(float(singular_K[0]), 1e-300)])

    @cached_property
    def _mean_delta_G(self) -> Floats:
        return np.asarray(np.mean([c.delta_G for c in self.changes.values()], axis=0))

    @cached_property
    def _context_delta_G(self) -> dict[str, Floats]:
        return {c: Change.mean(self.of_context(c)).delta_G for c in self.contexts}

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

    def linear(self, context: str, label: str) -> Change:
        """Return a ridge regression on what the perturbation does in the other contexts.

        Perturbations are embedded by 10 principal components of their mean change over the other
        contexts; a ridge regression (strength .1 of the mean squared embedding) from there to the
        change, reduced to 10 principal components of genes, is solved on the context's own
        training perturbations, or on those of all contexts if it has fewer than 20.
        """
        changes = [c for (other, _), c in self.changes.items() if other != context]
        names = [p for other, p in self.changes if other != context]
        known = sorted(set(names))
        if label not in known:
            raise KeyError(label)
        profile_PG = np.stack(
            [
                np.mean([c.delta_G for c, n in zip(changes, names, strict=True) if n == p], axis=0)
                for p in known
            ]
        )
        centred_PG = profile_PG - profile_PG.mean(axis=0)
        left, singular, _ = np.linalg.svd(centred_PG, full_matrices=False)
        score_PK = (left * singular)[:, :NUM_COMPONENTS]
        own = [(c, p) for c, p in self.changes if c == context and p in known]
        rows = own if len(own) >= MINIMUM_ROWS else [k for k in self.changes if k[1] in known]
        x_RK = score_PK[[known.index(p) for _, p in rows]]
        centre_K = x_RK.mean(axis=0)
        x_RK = x_RK - centre_K
        penalty = RIDGE * max(float((x_RK**2).sum()) / x_RK.shape[1], 1e-12)
        gram_KK = x_RK.T @ x_RK + penalty * np.eye(x_RK.shape[1])
        query_K = score_PK[known.index(label)] - centre_K
        weight_R = x_RK @ np.linalg.solve(gram_KK, query_K)
        chosen = [self.changes[key] for key in rows]
        y_RG = np.stack([c.delta_G for c in chosen])
        axes = np.linalg.svd(y_RG - y_RG.mean(axis=0), full_matrices=False)[0][:, :NUM_COMPONENTS]
        weight_R = axes @ (axes.T @ weight_R)
        # weights act on centred changes: the mean itself has weight 1
        return Change.weighted(chosen, weight_R - weight_R.mean() + 1.0 / len(rows))
