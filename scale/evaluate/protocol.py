"""Which cells are compared with which: the whole evaluation, from inputs to tables.

Everything is judged by one code on the same conditions: predictions, baselines, and the split-half
ceiling. In the ``strict`` profile control cells are split in an input half, which predictions
start from and are measured against, and a reference half for the observed change, so that the noise
of a shared control mean is no skill. The ``cell_eval`` profile does as cell-eval 0.8.2;
``paper_pooled`` does so too, and adds what the same predictions score with all contexts as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pandas as pd

from scale.config import Profile, ProtocolConfig
from scale.evaluate.aggregate import aggregate
from scale.evaluate.baselines import BASELINES
from scale.evaluate.cells import CellSource
from scale.evaluate.checks import Keys
from scale.evaluate.collapse import judge
from scale.evaluate.inputs import OBSERVED, TRAIN, floors, halve_controls, read_inputs
from scale.evaluate.pooled import PooledRun, beside_copy
from scale.evaluate.run import Run, Tables
from scale.evaluate.sample import sample_cells
from scale.evaluate.scaled import add_scaled
from scale.runtime import versions

if TYPE_CHECKING:
    from anndata import AnnData

    Source: TypeAlias = AnnData | CellSource | Path | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Parameters
    ----------
    scores
        One row per method, form, context, perturbation and metric: value (NaN = undefined),
        reason, cell numbers, significant genes observed. Method ``replicate`` is the ceiling.
    aggregate
        One row per method, form and metric: mean over units, interval, counts, the ceiling at
        full depth (``mean_full_depth``), the scaled score and the two ends of its scale.
    deltas
        (method, context) -> mean change, perturbations x genes; also for ``observed``.
    fold_changes
        The same for log2 fold changes.
    cells
        A sample of control, observed and predicted cells, for pictures.
    excluded
        Conditions that were left out, with the reason.
    collapse
        Method -> spread_ratio, within_variance_ratio, copied_share, verdict.
    meta
        Profile, control rule, hashes, versions, counts, warnings.
    gene_tables
        With ``protocol.export_de``: context -> gene tests of the observed cells, in the columns
        that cell-eval takes as ``de_real``.
    pooled
        In the profile ``paper_pooled`` the same predictions with all contexts as one; else None.
        An evaluation of its own: its only context and unit is called ``pooled over contexts``
        (``scale.evaluate.pooled.POOLED``), which is also ``meta["contexts"]``; it has no intervals,
        no residual metrics and no ``pooled``. Its ``scores`` and ``aggregate`` have a column more,
        ``control_copy``: what control cells in the contexts of the observed cells get in that row.
        The evaluation that holds it is that of each context alone, with the rules of ``cell_eval``.
    """

    scores: pd.DataFrame
    aggregate: pd.DataFrame
    deltas: Tables
    fold_changes: Tables
    cells: AnnData
    excluded: pd.DataFrame
    collapse: dict[str, dict[str, Any]]
    meta: dict[str, Any]
    gene_tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    pooled: Evaluation | None = None


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
    predicted: Mapping[str, Source],
    observed: Source,
    *,
    perturbation_key: str,
    cell_type_key: str,
    control: str,
    unit_key: str | None = None,
    batch_key: str | None = None,
    train: Source | None = None,
    protocol: ProtocolConfig,
    seed: int = 0,
    ignore_others: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Return the scores of predictions, baselines and ceiling on the observed conditions.

    Parameters
    ----------
    predicted
        Method -> predicted cells, log1p of normalised counts: AnnData, or the path of an h5ad,
        which is read context by context.
    observed
        Observed cells and their control cells; ``layers["counts"]`` for baselines of cells;
        ``obs["control_fold"]`` (0 input, 1 reference) where the halves are given.
    perturbation_key, cell_type_key
        Columns of ``.obs`` in every input.
    control
        Label of the control, exact after stripping.
    unit_key
        Column of the independent unit (cell line, donor); None = the cell type.
    batch_key
        Column of the batch (plate): conditions are compared with control cells of their own batch,
        and a context is a cell type in a batch. None = with those of all batches, so that the
        effect of a batch on its cells counts as one of the perturbation.
    train
        Training cells with control cells, for baselines and residual metrics.
    protocol
        Rules.
    seed
        Of every draw.
    ignore_others
        Predicted conditions that are not observed are no error, but counted.
    progress
        Called with one line per context.

    Raises
    ------
    ValueError
        If an input cannot be used, with what to do.
    """
    keys = Keys(
        perturbation=perturbation_key,
        cell_type=cell_type_key,
        unit=unit_key,
        batch=batch_key,
        control=control,
    )
    with ExitStack() as files:

        def opened(source: Source) -> CellSource:
            cells = CellSource.of(source)
            if cells is not source:
                files.callback(cells.close)
            return cells

        inputs = read_inputs(
            {method: opened(source) for method, source in predicted.items()},
            opened(observed),
            None if train is None else opened(train),
            keys,
            protocol,
            ignore_others=ignore_others,
            seed=seed,
        )
        run = Run.start(inputs, control, protocol, seed)
        evaluation = _evaluate(run, progress)
        if protocol.profile is not Profile.paper_pooled:
            return evaluation
        pooled = _evaluate(PooledRun.of(run), progress)
    pooled = replace(
        pooled,
        scores=beside_copy(pooled.scores, "value", ["perturbation", "metric"]),
        aggregate=beside_copy(pooled.aggregate, "mean", ["metric"]),
    )
    return replace(evaluation, pooled=pooled)


def _evaluate(run: Run, progress: Callable[[str], None] | None) -> Evaluation:
    for name in run.contexts:
        run.do_context(name)
        if progress is not None:
            progress(f"{name}: {len(run.contexts[name])} perturbations scored")
    inputs, scores = run.inputs, run.scores()
    table = add_scaled(aggregate(scores), scores, run.splits, tuple(BASELINES))
    return Evaluation(
        scores=scores,
        aggregate=table,
        deltas=run.deltas,
        fold_changes=run.fold_changes,
        gene_tables=run.gene_tables,
        cells=sample_cells(
            inputs.observed, inputs.predicted, run.contexts, control=run.control, seed=run.seed
        ),
        excluded=pd.DataFrame(inputs.excluded, columns=["context", "perturbation", "reason"]),
        collapse=judge(run.collapse, table),
        meta=_meta(run),
    )


def _meta(run: Run) -> dict[str, Any]:
    inputs, protocol, hashes = run.inputs, run.protocol, run.inputs.sha256
    rule = "all control cells, as each file brings them"
    if inputs.fold is not None:
        rule = "disjoint halves: input for predictions, reference for the observed change"
    elif protocol.profile is Profile.strict:
        rule = "all observed control cells, shared by both sides"
    if inputs.batch_key is not None:
        rule += f"; each condition against those of its own {inputs.batch_key}"
    return {
        "profile": protocol.profile.value,
        "contexts": run.CONTEXTS,
        "control_rule": rule,
        "control_floor": floors(inputs, run.control),
        "seed": run.seed,
        "num_splits": protocol.num_splits if protocol.ceiling else 0,
        "max_control_cells": protocol.max_control_cells,
        "min_cells": protocol.min_cells,
        "min_significant": protocol.min_significant,
        "missing": protocol.missing.value,
        "match_cells": protocol.match_cells,
        "normalize": protocol.normalize,
        "num_genes": len(inputs.observed.genes),
        "num_conditions": len(inputs.scored),
        "num_contexts": len(run.contexts),
        "num_predicted_not_scored": inputs.num_not_scored,
        "methods": list(inputs.predicted),
        "genes_sha256": sha256("\n".join(inputs.observed.genes).encode()).hexdigest(),
        "observed_sha256": hashes[OBSERVED],
        "control_folds_sha256": None
        if inputs.fold is None
        else sha256(inputs.fold.tobytes()).hexdigest(),
        "predicted_sha256": {m: hashes[m] for m in inputs.predicted},
        "train_sha256": hashes.get(TRAIN),
        "versions": versions(),
        "warnings": run.warnings(),
    }
