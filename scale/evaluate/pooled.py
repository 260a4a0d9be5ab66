"""All contexts as one, as some papers evaluate: always labelled, and never alone.

A perturbed pool and a control pool whose contexts have other shares differ without any effect, and
predictions that copy control cells in the shares of the observed cells are rewarded for it. What
such copies score stands beside every row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scale.evaluate.aggregate import CELLS
from scale.evaluate.baselines import WITHOUT_TRAINING
from scale.evaluate.cells import Rows
from scale.evaluate.checks import CellTable, Condition
from scale.evaluate.context import Context
from scale.evaluate.inputs import Inputs
from scale.evaluate.metrics import METRICS
from scale.evaluate.run import Controls, Made, Run, make_baseline
from scale.evaluate.training import InputControl, Training

POOLED = "pooled over contexts"
"""Context and unit of everything that was pooled: tables that are saved or shown say so."""
COPY = "control_copy"
_WARNING = (
    "Pooled over contexts: where contexts have other shares among treated than among control "
    "cells, that counts as effect. The column control_copy has what control cells in the observed "
    "shares score, without any knowledge of a perturbation; no claim can be made here."
)


class PooledRun(Run):
    """The conditions of a run, pooled by perturbation; nothing is subtracted.

    Baselines are those of each context, pooled: ``control_copy`` is the control cells of every
    context, as many as the pooled condition has of it.
    """

    CONTEXTS: ClassVar[str] = POOLED
    _controls: dict[str, InputControl]
    _sizes: dict[str, dict[str, int]]

    @classmethod
    def of(cls, run: Run) -> PooledRun:
        """Return the run of the same conditions and cells, pooled."""
        inputs, control = run.inputs, run.control
        controls = {c: inputs.rows[(c, control)] for c in inputs.contexts}
        labels = sorted({label for _, label in inputs.scored})
        pooled = Inputs(
            _relabelled(inputs.observed),
            {method: _relabelled(table) for method, table in inputs.predicted.items()},
            inputs.train,
            _pooled(inputs.rows, inputs, control),
            {m: _pooled(rows, inputs, control) for m, rows in inputs.predicted_rows.items()},
            contexts={POOLED: labels},
            excluded=list(inputs.excluded),
            sha256=inputs.sha256,
            num_not_scored=inputs.num_not_scored,
            warnings=[_WARNING, *inputs.warnings],
        )
        made = cls(pooled, run.training, run.settings, control, run.protocol)
        made.reference = Training(None, control, {})
        made._controls = dict(Controls(inputs.observed, controls))
        made._sizes = {
            label: {c: len(inputs.rows[(c, label)]) for c, p in inputs.scored if p == label}
            for label in labels
        }
        return made

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines: never without the copy of the controls."""
        return super().baselines or WITHOUT_TRAINING

    def _make(self, method: str, context: Context, label: str, size: int) -> Made:
        means, blocks, reason = [], [], ""
        for name, count in self._sizes[label].items():
            made = make_baseline(self, method, (name, label), count, self._controls[name])
            if made.mean_G is None:
                return Made(None, None, f"{name}: {made.reason}")
            means.append(count / size * made.mean_G)
            if made.cells is None:
                reason = f"{name}: {made.reason}"
            else:
                blocks.append(made.cells)
        cells = None if reason else sp.vstack(blocks, format="csr")
        return Made(np.sum(means, axis=0), cells, reason)

    def scores(self) -> pd.DataFrame:
        """Return the long table, without what subtracts a mean response or needs contexts."""
        scores = super().scores()
        group = scores["metric"].map({name: metric.group for name, metric in METRICS.items()})
        return scores[~group.isin(("residual", "contexts"))].reset_index(drop=True)


def _relabelled(table: CellTable) -> CellTable:
    label = np.full(len(table.context), POOLED, dtype=object)
    return replace(table, context=label, unit=label)


def _pooled(rows: dict[Condition, Rows], inputs: Inputs, control: str) -> dict[Condition, Rows]:
    """Row numbers of all scored contexts, by perturbation."""
    groups: dict[Condition, list[Rows]] = {}
    for context, label in [*inputs.scored, *((c, control) for c in inputs.contexts)]:
        groups.setdefault((POOLED, label), []).append(rows[(context, label)])
    return {pair: np.concatenate(parts) for pair, parts in groups.items()}


def beside_copy(table: pd.DataFrame, value: str, columns: list[str]) -> pd.DataFrame:
    """Return a table with a column of what ``control_copy`` (cells) has in the same ``columns``."""
    is_copy = (table["method"] == COPY) & (table["form"] == CELLS)
    copies = table.loc[is_copy, [*columns, value]].rename(columns={value: COPY})
    return table.merge(copies, on=columns, how="left", validate="many_to_one")
