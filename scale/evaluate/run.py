"""The work of an evaluation, context by context.

Apart from the protocol, which says what is asked and returned; here every method meets the
observed side of every context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scale.config import Profile, ProtocolConfig
from scale.evaluate.across_contexts import AcrossContexts, add_rows, split_means
from scale.evaluate.aggregate import CEILING, CELLS, MEAN, ScoreTable
from scale.evaluate.baselines import (
    BASELINES,
    ORACLE,
    WITHOUT_TRAINING,
    Unavailable,
    baseline_cells,
    mean_of,
)
from scale.evaluate.cache import TableCache
from scale.evaluate.cells import Rows
from scale.evaluate.checks import CellTable, Condition
from scale.evaluate.collapse import Collapse
from scale.evaluate.context import (
    Context,
    Settings,
    control_of,
    generator,
    halves,
    input_of,
    make_context,
    mean_of_rows,
    read_conditions,
    side_of,
)
from scale.evaluate.distances import fit_space, random_directions
from scale.evaluate.gene_table import gene_table
from scale.evaluate.inputs import OBSERVED, Inputs
from scale.evaluate.scoring import Scores, score
from scale.evaluate.sides import Side, side_of_means
from scale.evaluate.statistics import Floats
from scale.evaluate.training import InputControl, Training
from scale.evaluate.values import are_identical, num_other_cells

Tables = dict[tuple[str, str], pd.DataFrame]


@dataclass(frozen=True, slots=True)
class Made:
    """What a baseline says of a condition: both forms, or why there is none."""

    mean_G: Floats | None
    cells: sp.csr_matrix | None
    reason: str = ""


def make_baseline(
    run: Run, method: str, condition: Condition, size: int, control: InputControl
) -> Made:
    """Return what a baseline says of a condition: ``size`` cells made from ``control``.

    The draws are the same for every baseline: their differences are not those of the draws.
    """
    context, label = condition
    try:
        change = BASELINES[method](run.training, context, label)
    except Unavailable as reason:
        return Made(None, None, str(reason))
    mean_G = mean_of(change, run.training.control_mean_G[context])
    draws = generator(run.seed, "baseline", context, label)
    try:
        cells = baseline_cells(method, run.training, condition, change, control, size, draws)
    except Unavailable as reason:
        return Made(mean_G, None, str(reason))
    return Made(mean_G, cells)


class Controls(Mapping[str, InputControl]):
    """Control cells that predictions may start from, by context; read when they are asked for."""

    def __init__(self, table: CellTable, rows: Mapping[str, Rows]) -> None:
        self._table, self._rows = table, rows

    def __getitem__(self, context: str) -> InputControl:
        return input_of(self._table, self._rows[context])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class Run:
    """The state of one evaluation: inputs, then tables that grow by context.

    Parameters
    ----------
    inputs
        Checked inputs.
    training
        Changes of the training conditions, for the baselines.
    settings
        What all contexts share.
    control
        Label of the control.
    protocol
        Rules.
    """

    CONTEXTS: ClassVar[str] = "each alone"

    def __init__(
        self,
        inputs: Inputs,
        training: Training,
        settings: Settings,
        control: str,
        protocol: ProtocolConfig,
    ) -> None:
        self.inputs, self.training, self.settings = inputs, training, settings
        self.control, self.protocol, self.seed = control, protocol, settings.seed
        self.contexts = inputs.contexts
        self.reference = training
        """Whose mean response residual metrics take off."""
        self.table = ScoreTable()
        self.deltas: Tables = {}
        self.fold_changes: Tables = {}
        self.gene_tables: dict[str, pd.DataFrame] = {}
        self.collapse: dict[str, Collapse] = {}
        self._across = AcrossContexts(strict=settings.strict)
        self._splits: list[tuple[int, str, str, str, float]] = []
        self._identical: Counter[str] = Counter()
        self._other_controls: dict[str, list[int]] = {}

    @classmethod
    def start(cls, inputs: Inputs, control: str, protocol: ProtocolConfig, seed: int) -> Run:
        """Return a run of checked inputs, with what all contexts share."""
        table, fold = inputs.observed, inputs.fold
        rows = {c: inputs.rows[(c, control)] for c in inputs.contexts}
        if fold is not None:
            rows = {c: r[fold[r] == 0] for c, r in rows.items()}
        blocks = [table.values.take(r) for r in rows.values()]
        if inputs.train is not None:
            blocks.append(inputs.train.values.take(np.arange(len(inputs.train.context))))
        strict = protocol.profile is Profile.strict
        space = fit_space(blocks, generator(seed, "principal components"))
        num_components = space.basis_GK.shape[1]
        settings = Settings(
            strict=strict,
            min_significant=protocol.min_significant,
            max_cells=protocol.max_control_cells,
            seed=seed,
            space=space,
            direction_KD=random_directions(num_components, generator(seed, "directions")),
            genes=table.genes,
            cache=_cache(table.genes, protocol, seed),
        )
        training = Training(inputs.train, control, Controls(table, rows))
        return cls(inputs, training, settings, control, protocol)

    def do_context(self, name: str) -> None:
        """Score every method in one context."""
        inputs = self.inputs
        context = make_context(
            name,
            self.contexts[name],
            inputs.observed,
            inputs.rows,
            control=self.control,
            fold=inputs.fold,
            training=self.reference,
            settings=self.settings,
        )
        self._keep(OBSERVED, context, context.labels, context.observed)
        if self.protocol.export_de:
            self.gene_tables[name] = gene_table(context, self.settings.genes)
        self._across.observe(name, context.labels, context.observed.delta_PG)
        for method, table in inputs.predicted.items():
            self._predicted(method, table, context)
        for method in self.baselines:
            self._baseline(method, context)
        if self.protocol.ceiling:
            self._ceiling(context)
            means, num_P = context.observed.mean_PG, context.observed.num_P
            oracle = side_of_means(means, num_P, context.input_control)
            self._score(ORACLE, MEAN, context, oracle)

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines to score."""
        if not self.protocol.baselines:
            return ()
        return tuple(BASELINES) if self.training.changes else WITHOUT_TRAINING

    def _predicted(self, method: str, table: CellTable, context: Context) -> None:
        rows = self.inputs.predicted_rows[method]
        control = context.input_control
        if not self.settings.strict:
            own = table.values[rows[(context.name, self.control)]]
            control = control_of(own, self.settings, context.name, "input")
            counts = self._other_controls.setdefault(method, [0, 0])
            counts[0] += num_other_cells(own, context.controls)
            counts[1] += own.shape[0]
        cells = read_conditions(table, [rows[(context.name, label)] for label in context.labels])
        self._identical[method] += sum(are_identical(c) for c in cells)
        self._score(method, CELLS, context, side_of(cells, control, self.settings))
        if whole := self.inputs.whole_rows.get(method):
            rows_P = [whole[(context.name, label)] for label in context.labels]
            mean_PG = np.stack([mean_of_rows(table, rows) for rows in rows_P])
            num_P = np.array([len(rows) for rows in rows_P])
            self._score(method, MEAN, context, side_of_means(mean_PG, num_P, control))

    def _baseline(self, method: str, context: Context) -> None:
        """Score both forms of a baseline on the conditions for which it exists."""
        places, cells, means, missing = [], [], [], {}
        cells_missing = ""
        for place, label in enumerate(context.labels):
            size = int(context.observed.num_P[place])
            made = self._make(method, context, label, size)
            if made.mean_G is None:
                missing[label] = made.reason
                continue
            places.append(place)
            means.append(made.mean_G)
            if made.cells is not None:
                cells.append(made.cells)
            else:
                cells_missing = made.reason
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

    def _make(self, method: str, context: Context, label: str, size: int) -> Made:
        """Return what a baseline says of a condition."""
        return make_baseline(self, method, (context.name, label), size, context.inputs)

    def warnings(self) -> list[str]:
        """Return what a reader must know of the inputs, and of what was found in them."""
        lines = list(self.inputs.warnings)
        total = len(self.inputs.scored)
        for method, count in self._identical.items():
            if count:
                lines.append(
                    f"{method}: within-set collapse: all predicted cells are the same in {count} "
                    f"of {total} conditions."
                )
        for method, (other, num_cells) in self._other_controls.items():
            if other:
                lines.append(
                    f"{method}: predicted controls differ from the observed ones: {other:,} of "
                    f"{num_cells:,} cells; its changes are measured against its own."
                )
        return lines

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
            place = (context.name, context.labels)
            self._across.observe(*place, observed.delta_PG, split)
            self._across.add(CEILING, CELLS, *place, predicted.delta_PG, split)
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

    def scores(self) -> pd.DataFrame:
        """Return the long table, with what only all contexts together can tell."""
        found = self._across.scores()
        self._splits += split_means(found[found["method"] == CEILING])
        return add_rows(self.table.frame(), found)

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
        self._across.add(method, form, context.name, labels, side.delta_PG)
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


def _cache(genes: tuple[str, ...], protocol: ProtocolConfig, seed: int) -> TableCache | None:
    """Return the folder of gene tables, if there is to be one."""
    if protocol.cache is None:
        return None
    rules = (protocol.profile.value, str(protocol.max_control_cells), str(seed))
    return TableCache(Path(protocol.cache), (*rules, *genes))
