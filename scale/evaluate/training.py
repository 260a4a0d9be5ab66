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

from scale.draws import derive
from scale.evaluate.cells import Rows
from scale.evaluate.checks import CellTable
from scale.evaluate.statistics import Floats, column_means, column_sums

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
        return Change.weighted(changes, np.full(len(changes), 1.0 / len(changes)))

    @staticmethod
    def weighted(changes: Sequence[Change], weight_C: Floats) -> Change:
        """Return a weighted sum of changes."""
        return Change.combined(changes, weight_C[None])[0]

    @staticmethod
    def combined(changes: Sequence[Change], weight_KC: Floats) -> list[Change]:
        """Return a weighted sum of changes for each row of weights."""
        delta_KG = weight_KC @ np.stack([c.delta_G for c in changes])
        fractions = [c.log_fraction_G for c in changes if c.log_fraction_G is not None]
        if len(fractions) < len(changes):
            return [Change(delta_G, None) for delta_G in delta_KG]
        pairs = zip(delta_KG, weight_KC @ np.stack(fractions), strict=True)
        return [Change(delta_G, log_fraction_G) for delta_G, log_fraction_G in pairs]


@dataclass(frozen=True)
class InputControl:
    """Control cells that a prediction may start from."""

    values: sp.csr_matrix
    counts: sp.csr_matrix | None

    @cached_property
    def fraction_G(self) -> Floats | None:
        """Expression fractions, half a count added to each gene; None without counts."""
        if self.counts is None:
            return None
        total_G = column_sums(self.counts) + 0.5
        return np.asarray(total_G / total_G.sum())

    @cached_property
    def total_N(self) -> Floats:
        """Normalised counts of each cell, undone from its log values."""
        return np.asarray(self.values.expm1() @ np.ones(self.values.shape[1]))


@dataclass(frozen=True, slots=True)
class _Additive:
    """Effects of an additive model of the changes."""

    grand: Change
    by_context: dict[str, Change]
    by_label: dict[str, Change]


@dataclass(frozen=True, slots=True)
class _Regression:
    """The change of a perturbation as a linear function of K numbers that are known of it."""

    known: dict[str, Floats]
    mean: Change
    slopes: list[Change]


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
        self._regressions: dict[str, _Regression] = {}
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
        self.rows[pair] = rows
        self.changes[pair] = Change(mean_G - control_mean_G, log_fraction_G)

    @cached_property
    def of_context(self) -> dict[str, dict[str, Change]]:
        """Training context -> perturbation -> change."""
        found: dict[str, dict[str, Change]] = {}
        for (context, label), change in self.changes.items():
            found.setdefault(context, {})[label] = change
        return dict(sorted(found.items()))

    @cached_property
    def of_label(self) -> dict[str, dict[str, Change]]:
        """Training perturbation -> context -> change."""
        found: dict[str, dict[str, Change]] = {}
        for (context, label), change in self.changes.items():
            found.setdefault(label, {})[context] = change
        return dict(sorted(found.items()))

    @cached_property
    def mean_changes(self) -> dict[str, Change]:
        """Training context -> mean over its perturbations."""
        return {c: Change.mean(list(changes.values())) for c, changes in self.of_context.items()}

    @cached_property
    def mean_change(self) -> Change | None:
        """Mean over training contexts of their mean change, or None."""
        return Change.mean(list(self.mean_changes.values())) if self.changes else None

    @cached_property
    def mean_cells(self) -> dict[str, Change]:
        """Training context -> mean over its cells, all perturbations together."""
        found = {}
        for context, changes in self.of_context.items():
            size_P = np.array([len(self.rows[context, p]) for p in changes], dtype=np.float64)
            found[context] = Change.weighted(list(changes.values()), size_P / size_P.sum())
        return found

    def reference_mean_G(self, context: str) -> Floats | None:
        """Mean expression over the context's training perturbations, or None."""
        if context not in self.mean_changes:
            return None
        return self.control_mean_G[context] + self.mean_changes[context].delta_G

    def other_label(self, context: str, label: str) -> str | None:
        """Return another training perturbation of the context: random, but the same in every run.

        None where there is none.
        """
        others = sorted(p for p in self.of_context.get(context, ()) if p != label)
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
        if label not in self.of_label:
            return None
        own = self.of_label[label].values()
        means = [self._mean_delta_G, np.mean([c.delta_G for c in own], axis=0)]
        if context in self.mean_changes:
            means.append(self.mean_changes[context].delta_G)
        effect_KG = np.stack(means)
        effect_KG -= effect_KG.mean(axis=1, keepdims=True)
        _, singular_K, basis_KG = np.linalg.svd(effect_KG, full_matrices=False)
        return np.asarray(basis_KG[singular_K > 1e-9 * max(float(singular_K[0]), 1e-300)])

    @cached_property
    def _mean_delta_G(self) -> Floats:
        return np.asarray(np.mean([c.delta_G for c in self.changes.values()], axis=0))

    @cached_property
    def _additive(self) -> _Additive:
        groups = [list(self.changes.values())]
        for grouped in (self.of_context, self.of_label):
            groups += [list(changes.values()) for changes in grouped.values()]
        place = {c: 1 + i for i, c in enumerate(self.of_context)}
        first = 1 + len(place)
        place_of_label = {p: first + i for i, p in enumerate(self.of_label)}
        # Normal equations: entries count the conditions that two effects share.
        gram_KK = np.diag(np.array([float(len(changes)) for changes in groups]))
        gram_KK[0, 1:] = gram_KK[1:, 0] = np.diag(gram_KK)[1:]
        for context, label in self.changes:
            row, column = place[context], place_of_label[label]
            gram_KK[row, column] = gram_KK[column, row] = 1.0
        sums = [Change.weighted(changes, np.ones(len(changes))) for changes in groups]
        inverse_KK = np.linalg.pinv(gram_KK, rcond=1e-10, hermitian=True)
        effects = Change.combined(sums, inverse_KK)
        by_context = dict(zip(self.of_context, effects[1:first], strict=True))
        return _Additive(
            effects[0], by_context, dict(zip(self.of_label, effects[first:], strict=True))
        )

    def additive(self, context: str, label: str) -> Change:
        """Return grand mean + context effect + perturbation effect, by least squares.

        A context without training perturbations has the mean effect of the others.
        """
        effects = self._additive
        of_context = effects.by_context.get(context)
        if of_context is None:
            of_context = Change.mean(list(effects.by_context.values()))
        return Change.weighted([effects.grand, of_context, effects.by_label[label]], np.ones(3))

    def linear(self, context: str, label: str) -> Change:
        """Return a ridge regression on what the perturbation does in the other contexts.

        Perturbations are embedded by 10 principal components of their mean change over the other
        contexts; a ridge regression (strength .1 of the mean squared embedding) from there to the
        change, reduced to 10 principal components of genes, is solved on the context's own
        training perturbations, or on those of all contexts if it has fewer than 20.

        Raises
        ------
        KeyError
            If no other context has the perturbation.
        """
        if context not in self._regressions:
            self._regressions[context] = self._regress(context)
        found = self._regressions[context]
        return Change.weighted([found.mean, *found.slopes], np.append(1.0, found.known[label]))

    def _regress(self, context: str) -> _Regression:
        elsewhere = {
            label: [change.delta_G for c, change in changes.items() if c != context]
            for label, changes in self.of_label.items()
        }
        profiles = {label: np.mean(found, axis=0) for label, found in elsewhere.items() if found}
        if not profiles:
            return _Regression({}, Change(np.zeros(0), None), [])
        profile_PG = np.stack(list(profiles.values()))
        left, singular, _ = np.linalg.svd(profile_PG - profile_PG.mean(axis=0), full_matrices=False)
        score_PK = (left * singular)[:, :NUM_COMPONENTS]
        place = {label: p for p, label in enumerate(profiles)}
        own = [(context, p) for p in self.of_context.get(context, ()) if p in place]
        rows = own if len(own) >= MINIMUM_ROWS else [k for k in self.changes if k[1] in place]
        x_RK = score_PK[[place[p] for _, p in rows]]
        centre_K = x_RK.mean(axis=0)
        x_RK = x_RK - centre_K
        penalty = RIDGE * max(float((x_RK**2).sum()) / x_RK.shape[1], 1e-12)
        gram_KK = x_RK.T @ x_RK + penalty * np.eye(x_RK.shape[1])
        chosen = [self.changes[key] for key in rows]
        y_RG = np.stack([c.delta_G for c in chosen])
        axes = np.linalg.svd(y_RG - y_RG.mean(axis=0), full_matrices=False)[0][:, :NUM_COMPONENTS]
        weight_RK = axes @ (axes.T @ np.linalg.solve(gram_KK, x_RK.T).T)
        # weights act on centred changes: the mean itself has weight 1
        slopes = Change.combined(chosen, (weight_RK - weight_RK.mean(axis=0)).T)
        known = dict(zip(place, score_PK - centre_K, strict=True))
        return _Regression(known, Change.mean(chosen), slopes)
