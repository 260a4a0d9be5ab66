"""The work of an evaluation, context by context.

Apart from the protocol, which says what is asked and returned; here every method meets the
observed side of every context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scale.config import ProtocolConfig
from scale.evaluate.aggregate import CEILING, CELLS, MEAN, ScoreTable
from scale.evaluate.baselines import (
    BASELINES,
    WITHOUT_TRAINING,
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
from scale.evaluate.inputs import OBSERVED, read_inputs
from scale.evaluate.scoring import Scores, score
from scale.evaluate.sides import Side, side_of_means
from scale.evaluate.statistics import Floats
from scale.evaluate.training import Training

if TYPE_CHECKING:
    from anndata import AnnData

Tables = dict[tuple[str, str], pd.DataFrame]


class Run:
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
        self._splits: list[tuple[int, str, str, str, float]] = []

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
            scores = score(predicted, observed, context.facts)
            found.append(scores)
            self._splits += [
                (split, context.unit, context.name, name, _mean(values))
                for name, values in scores.values.items()
            ]
        mean = Scores()
        for name in found[0].values:
            stacked = np.stack([s.values[name] for s in found])
            defined_P = np.isfinite(stacked).any(axis=0)
            total_P = np.nansum(stacked, axis=0)
            count_P = np.maximum(np.isfinite(stacked).sum(axis=0), 1)
            mean.values[name] = np.where(defined_P, total_P / count_P, np.nan)
            mean.reasons[name] = np.where(defined_P, "", found[-1].reasons[name])
        self._add(CEILING, CELLS, context, mean, predicted, observed, context.labels)

    @property
    def splits(self) -> pd.DataFrame:
        """Ceiling by split: mean over the conditions of each context."""
        columns = ["split", "unit", "context", "metric", "value"]
        return pd.DataFrame(self._splits, columns=columns)

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


def _mean(values_P: Floats) -> float:
    """Mean of what is defined; NaN if nothing is."""
    defined = values_P[np.isfinite(values_P)]
    return float(defined.mean()) if defined.size else float("nan")
