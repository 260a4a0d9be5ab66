"""Which cells are compared with which: the whole evaluation, from inputs to tables.

Everything is judged by one code on the same conditions: predictions, baselines, and the split-half
ceiling. In the ``strict`` profile control cells are split in an input half, which predictions
start from and are measured against, and a reference half for the observed change, so that the noise
of a shared control mean is no skill. The ``cell_eval`` profile does as cell-eval 0.8.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scale.config import Profile, ProtocolConfig
from scale.evaluate.aggregate import CEILING, CELLS, MEAN, ScoreTable, aggregate
from scale.evaluate.baselines import (
    BASELINES,
    WITHOUT_TRAINING,
    Training,
    Unavailable,
    count_shift,
    mean_of,
)
from scale.evaluate.checks import CellTable, Keys
from scale.evaluate.collapse import Collapse
from scale.evaluate.context import (
    Context,
    Settings,
    control_of,
    generator,
    halves,
    input_of,
    make_context,
    side_of,
)
from scale.evaluate.distances import fit_space
from scale.evaluate.inputs import OBSERVED, floors, halve_controls, read_inputs, table_hash
from scale.evaluate.sample import sample_cells
from scale.evaluate.scoring import Scores, score
from scale.evaluate.sides import Side, side_of_means
from scale.runtime import versions

if TYPE_CHECKING:
    from anndata import AnnData

Tables = dict[tuple[str, str], pd.DataFrame]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Parameters
    ----------
    scores
        One row per method, form, context, perturbation and metric: value (NaN = undefined),
        reason, cell numbers, significant genes observed. Method ``replicate`` is the ceiling.
    aggregate
        One row per method, form and metric: mean over units, interval, counts.
    deltas
        (method, context) -> mean change, perturbations x genes; also for ``observed``.
    fold_changes
        The same for log2 fold changes.
    cells
        A sample of control, observed and predicted cells, for pictures.
    excluded
        Conditions that were left out, with the reason.
    collapse
        Method -> spread_ratio, within_variance_ratio, verdict.
    meta
        Profile, control rule, hashes, versions, counts, warnings.
    """

    scores: pd.DataFrame
    aggregate: pd.DataFrame
    deltas: Tables
    fold_changes: Tables
    cells: AnnData
    excluded: pd.DataFrame
    collapse: dict[str, dict[str, Any]]
    meta: dict[str, Any]


def split_controls(
    observed: AnnData,
    *,
    perturbation_key: str,
    cell_type_key: str,
    control: str,
    batch_key: str | None = None,
    seed: int = 0,
) -> AnnData:
    """Return a copy with ``obs["control_fold"]``: halves of the control cells, -1 for treated.

    The control cells of every (context, batch) are halved by a keyed order: 0 = input, the cells a
    model may start from, 1 = reference, the cells the observed change is measured against.

    Parameters
    ----------
    observed
        Cells with their controls.
    perturbation_key, cell_type_key, batch_key
        Columns of ``.obs``.
    control
        Label of the control.
    seed
        Of the order.
    """
    copy = observed.copy()
    is_control = copy.obs[perturbation_key].astype(str).str.strip() == control
    groups = copy.obs[cell_type_key].astype(str).str.strip()
    if batch_key is not None:
        groups = groups + "\x1f" + copy.obs[batch_key].astype(str)
    copy.obs["control_fold"] = halve_controls(is_control.to_numpy(), groups.to_numpy(), seed)
    return copy


def run_protocol(
    predicted: Mapping[str, AnnData],
    observed: AnnData,
    *,
    perturbation_key: str,
    cell_type_key: str,
    control: str,
    unit_key: str | None = None,
    train: AnnData | None = None,
    protocol: ProtocolConfig,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Return the scores of predictions, baselines and ceiling on the observed conditions.

    Parameters
    ----------
    predicted
        Method -> predicted cells, log1p of normalised counts.
    observed
        Observed cells and their control cells; ``layers["counts"]`` for baselines of cells;
        ``obs["control_fold"]`` (0 input, 1 reference) where the halves are given.
    perturbation_key, cell_type_key
        Columns of ``.obs`` in every input.
    control
        Label of the control, exact after stripping.
    unit_key
        Column of the independent unit (cell line, donor); None = the cell type.
    train
        Training cells with control cells, for baselines and residual metrics.
    protocol
        Rules.
    seed
        Of every draw.
    progress
        Called with one line per context.

    Raises
    ------
    ValueError
        If an input cannot be used, with what to do.
    """
    keys = Keys(
        perturbation=perturbation_key, cell_type=cell_type_key, unit=unit_key, control=control
    )
    strict = protocol.profile is Profile.strict
    run = _Run(predicted, observed, train, keys, protocol, strict=strict, seed=seed)
    for name in run.contexts:
        run.do_context(name)
        if progress is not None:
            progress(f"{name}: {len(run.contexts[name])} perturbations scored")
    return run.result()


class _Run:
    """The state of one evaluation: inputs, then tables that grow by context."""

    def __init__(
        self,
        predicted: Mapping[str, AnnData],
        observed: AnnData,
        train: AnnData | None,
        keys: Keys,
        protocol: ProtocolConfig,
        *,
        strict: bool,
        seed: int,
    ) -> None:
        self.keys, self.protocol, self.seed = keys, protocol, seed
        self.inputs = read_inputs(
            predicted, observed, train, keys, protocol, strict=strict, seed=seed
        )
        self.contexts = self.inputs.contexts
        table, control = self.inputs.observed, keys.control
        folds = {
            c: r if (f := self.inputs.fold) is None else r[f[r] == 0]
            for c in self.contexts
            for r in [self.inputs.rows[(c, control)]]
        }
        controls = {c: input_of(table, rows) for c, rows in folds.items()}
        blocks = [c.values for c in controls.values()]
        if self.inputs.train is not None:
            blocks.append(self.inputs.train.values)
        self.settings = Settings(
            strict=strict,
            max_cells=protocol.max_control_cells,
            seed=seed,
            space=fit_space(blocks, generator(seed, "principal components")),
            genes=table.genes,
        )
        self.training = Training(self.inputs.train, control, controls)
        self.table = ScoreTable()
        self.deltas: Tables = {}
        self.fold_changes: Tables = {}
        self.collapse: dict[str, Collapse] = {}

    def do_context(self, name: str) -> None:
        """Score every method in one context."""
        inputs = self.inputs
        context = make_context(
            name,
            self.contexts[name],
            inputs.observed,
            inputs.rows,
            control=self.keys.control,
            fold=inputs.fold,
            training=self.training,
            settings=self.settings,
        )
        self._keep(OBSERVED, context, context.labels, context.observed)
        for method, table in inputs.predicted.items():
            self._predicted(method, table, context)
        if self.protocol.baselines:
            for method in BASELINES:
                self._baseline(method, context)
        if self.protocol.ceiling:
            self._ceiling(context)

    def _predicted(self, method: str, table: CellTable, context: Context) -> None:
        rows = self.inputs.predicted_rows[method]
        control = context.input_control
        if not self.settings.strict:
            own = table.values[rows[(context.name, self.keys.control)]]
            control = control_of(own, self.settings, context.name, "input")
        cells = [table.values[rows[(context.name, label)]] for label in context.labels]
        self._score(method, CELLS, context, side_of(cells, control, self.settings))

    def _baseline(self, method: str, context: Context) -> None:
        """Score both forms of a baseline on the conditions for which it exists."""
        if not self.training.changes and method not in WITHOUT_TRAINING:
            return
        inputs = context.inputs
        places, cells, means, missing = [], [], [], {}
        cells_missing = ""
        for place, label in enumerate(context.labels):
            try:
                change = BASELINES[method](self.training, context.name, label)
            except Unavailable as reason:
                missing[label] = str(reason)
                continue
            places.append(place)
            means.append(mean_of(change, context.input_control.mean_G))
            size = int(context.observed.num_P[place])
            # The same draws for every baseline: their differences are not those of the draws.
            draws = generator(self.seed, "baseline", context.name, label)
            try:
                cells.append(count_shift(inputs, change, size, draws))
            except Unavailable as reason:
                cells_missing = str(reason)
        if places:
            num_P = context.observed.num_P[places]
            side = side_of_means(np.stack(means), num_P, context.input_control)
            self._score(method, MEAN, context, side, places)
            if not cells_missing:
                side = side_of(cells, context.input_control, self.settings)
                self._score(method, CELLS, context, side, places)
            else:
                missing.update({context.labels[p]: cells_missing for p in places})
        if missing:
            self._add_missing(method, context, missing)

    def _add_missing(self, method: str, context: Context, missing: dict[str, str]) -> None:
        self.table.add_missing(
            missing,
            method=method,
            form=CELLS,
            context=context.name,
            unit=context.unit,
            observed=context.observed,
            num_significant=dict(
                zip(context.labels, context.num_significant_P.tolist(), strict=True)
            ),
            num_observed=dict(zip(context.labels, context.observed.num_P.tolist(), strict=True)),
        )

    def _ceiling(self, context: Context) -> None:
        """Score one half of the observed cells against the other; mean over splits."""
        found: list[Scores] = []
        for split in range(self.protocol.num_splits):
            observed, predicted = halves(context, self.settings, split)
            found.append(score(predicted, observed, context.facts))
        mean = Scores()
        for name in found[0].values:
            stacked = np.stack([s.values[name] for s in found])
            defined_P = np.isfinite(stacked).any(axis=0)
            total_P = np.nansum(stacked, axis=0)
            count_P = np.maximum(np.isfinite(stacked).sum(axis=0), 1)
            mean.values[name] = np.where(defined_P, total_P / count_P, np.nan)
            mean.reasons[name] = np.where(defined_P, "", found[-1].reasons[name])
        self._add(CEILING, CELLS, context, mean, predicted, observed, context.labels)

    def _score(
        self,
        method: str,
        form: str,
        context: Context,
        side: Side,
        places: list[int] | None = None,
    ) -> None:
        """Score a side; ``places``: which of the context's conditions it covers (None = all)."""
        observed, facts, labels = context.observed, context.facts, context.labels
        if places is not None and len(places) < len(labels):
            observed, facts = observed.take(places), facts.take(places)
            labels = facts.labels
        self._add(method, form, context, score(side, observed, facts), side, observed, labels)
        if side.cells is not None:
            self.collapse.setdefault(method, Collapse()).add(side, observed)
            self._keep(method, context, labels, side)

    def _add(
        self,
        method: str,
        form: str,
        context: Context,
        scores: Scores,
        predicted: Side,
        observed: Side,
        labels: tuple[str, ...],
    ) -> None:
        places = [context.labels.index(label) for label in labels]
        self.table.add(
            scores,
            method=method,
            form=form,
            context=context.name,
            unit=context.unit,
            labels=labels,
            predicted=predicted,
            observed=observed,
            num_significant_P=context.num_significant_P[places],
        )

    def _keep(self, method: str, context: Context, labels: tuple[str, ...], side: Side) -> None:
        """Keep mean changes and fold changes for figures."""
        assert side.cells is not None
        index, columns = pd.Index(labels), pd.Index(self.settings.genes)
        self.deltas[(method, context.name)] = pd.DataFrame(
            side.delta_PG.astype(np.float32), index=index, columns=columns
        )
        self.fold_changes[(method, context.name)] = pd.DataFrame(
            side.cells.tests.lfc_PG, index=index, columns=columns
        )

    def result(self) -> Evaluation:
        """Return everything that was found."""
        scores = self.table.frame()
        return Evaluation(
            scores=scores,
            aggregate=aggregate(scores),
            deltas=self.deltas,
            fold_changes=self.fold_changes,
            cells=sample_cells(
                self.inputs.observed,
                self.inputs.predicted,
                self.contexts,
                control=self.keys.control,
                seed=self.seed,
            ),
            excluded=pd.DataFrame(
                self.inputs.excluded, columns=["context", "perturbation", "reason"]
            ),
            collapse={method: c.result() for method, c in self.collapse.items()},
            meta=self._meta(),
        )

    def _meta(self) -> dict[str, Any]:
        inputs = self.inputs
        rule = "all control cells, as each file brings them"
        if inputs.fold is not None:
            rule = "disjoint halves: input for predictions, reference for the observed change"
        return {
            "profile": self.protocol.profile.value,
            "control_rule": rule,
            "control_floor": floors(inputs, self.keys.control),
            "seed": self.seed,
            "num_splits": self.protocol.num_splits if self.protocol.ceiling else 0,
            "max_control_cells": self.protocol.max_control_cells,
            "min_cells": self.protocol.min_cells,
            "num_genes": len(inputs.observed.genes),
            "num_conditions": sum(len(labels) for labels in self.contexts.values()),
            "num_contexts": len(self.contexts),
            "methods": list(inputs.predicted),
            "genes_sha256": sha256("\n".join(inputs.observed.genes).encode()).hexdigest(),
            "observed_sha256": table_hash(inputs.observed),
            "predicted_sha256": {m: table_hash(t) for m, t in inputs.predicted.items()},
            "train_sha256": None if inputs.train is None else table_hash(inputs.train),
            "versions": versions(),
            "warnings": inputs.warnings,
        }
