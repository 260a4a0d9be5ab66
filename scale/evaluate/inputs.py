"""All inputs of an evaluation together: read, checked, halved.

Apart from the protocol so that nothing is computed before every input has passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scale.config import ProtocolConfig
from scale.evaluate import checks
from scale.evaluate.aggregate import CEILING
from scale.evaluate.baselines import BASELINES
from scale.evaluate.checks import CellTable, Keys, Rows
from scale.evaluate.context import keyed_order

if TYPE_CHECKING:
    from anndata import AnnData

OBSERVED = "observed"


@dataclass
class Inputs:
    """Tables that were read and checked."""

    observed: CellTable
    predicted: dict[str, CellTable]
    train: CellTable | None
    rows: dict[tuple[str, str], Rows]
    predicted_rows: dict[str, dict[tuple[str, str], Rows]]
    contexts: dict[str, list[str]]
    excluded: list[tuple[str, str, str]]
    fold: npt.NDArray[np.int8] | None
    warnings: list[str] = field(default_factory=list)


def read_inputs(
    predicted: Mapping[str, AnnData],
    observed: AnnData,
    train: AnnData | None,
    keys: Keys,
    protocol: ProtocolConfig,
    *,
    strict: bool,
    seed: int,
) -> Inputs:
    """Read and check every input; nothing is computed before all of them passed."""
    table = checks.read_table(observed, OBSERVED, keys, None)
    tables = {m: checks.read_table(a, m, keys, table.genes) for m, a in predicted.items()}
    reserved = {OBSERVED, CEILING, *BASELINES} & set(tables)
    if reserved:
        raise ValueError(
            f"predictions may not be called {', '.join(sorted(reserved))}: the names of baselines, "
            "of the ceiling and of the observed cells are taken; choose others"
        )
    trained = None if train is None else checks.read_table(train, "train", keys, table.genes)
    rows = table.rows()
    names = sorted({c for c, p in rows if p != keys.control})
    if not names:
        raise ValueError(f"observed: every cell is labelled {keys.control!r}; nothing to score")
    checks.check_controls(table, keys.control, names)
    predicted_rows = {method: t.rows() for method, t in tables.items()}
    inputs = Inputs(table, tables, trained, rows, predicted_rows, {}, [], None)
    for other in tables.values():
        checks.check_conditions(table, other, keys.control)
        checks.check_totals(table, other, keys.control)
        if not strict:
            checks.check_controls(other, keys.control, names)
    _choose_conditions(inputs, keys.control, protocol.min_cells, names)
    scored = [(c, label) for c, labels in inputs.contexts.items() for label in labels]
    for method in tables:
        warning = checks.check_cell_numbers(
            {pair: rows[pair] for pair in scored}, predicted_rows[method], method, strict=strict
        )
        if warning is not None:
            inputs.warnings.append(warning)
    if trained is not None:
        checks.check_totals(table, trained, keys.control)
        checks.check_train(trained, scored)
    if strict:
        inputs.fold = _control_folds(inputs, keys.control, seed)
    return inputs


def _choose_conditions(inputs: Inputs, control: str, min_cells: int, names: list[str]) -> None:
    """Fill in the scored conditions and those left out."""
    for context in names:
        kept = []
        for label in sorted(p for c, p in inputs.rows if c == context and p != control):
            sizes = {OBSERVED: len(inputs.rows[(context, label)])}
            few = sizes[OBSERVED] < min_cells
            reason = f"{sizes[OBSERVED]} observed cells; {min_cells} are needed"
            for method, rows in inputs.predicted_rows.items():
                if len(rows[(context, label)]) < 2 and not few:
                    few, reason = True, f"fewer than 2 cells predicted by {method}"
            if few:
                inputs.excluded.append((context, label, reason))
            else:
                kept.append(label)
        if kept:
            inputs.contexts[context] = kept
    if not inputs.contexts:
        raise ValueError(
            f"no condition has {min_cells} observed cells (protocol.min_cells); the largest has "
            f"{max(len(r) for (_, p), r in inputs.rows.items() if p != control)}"
        )


def _control_folds(inputs: Inputs, control: str, seed: int) -> npt.NDArray[np.int8]:
    """Return the halves of the control cells, given or drawn, and check who started from which."""
    table = inputs.observed
    is_control = table.perturbation == control
    if table.fold is None:
        fold = halve_controls(is_control, table.context, seed)
    else:
        fold = np.where(is_control, table.fold, -1).astype(np.int8)
        if not np.isin(fold[is_control], (0, 1)).all():
            raise ValueError(
                'observed: obs["control_fold"] must be 0 (input) or 1 (reference) for every '
                "control cell; split_controls writes it"
            )
    for context in inputs.contexts:
        counts = np.bincount(fold[inputs.rows[(context, control)]], minlength=2)
        if counts.min() < 2:
            raise ValueError(
                f"observed: context {context} has {counts[0]} input and {counts[1]} reference "
                "control cells; each half needs at least 2 (split_controls makes halves)"
            )
    names = table.cell_names if table.source_cell is None else table.source_cell
    reference = {str(cell) for cell in names[fold == 1]}
    for method, other in inputs.predicted.items():
        checks.check_source_cells(other, reference, control)
        if other.source_cell is None:
            inputs.warnings.append(
                f"{method}: no column source_cell, so it is not known which control cells the "
                "prediction started from; if from all of them, correlations are biased down"
            )
    return fold


def floors(inputs: Inputs, control: str) -> dict[str, float]:
    """Expected pearson_delta of independent cells without any effect, by context.

    (1/n_c) / sqrt((1/n_c + 1/n) (1/n_c + 1/n_pred)) with all control cells on both sides; 0 with
    disjoint halves.
    """
    floors = {}
    for context, labels in inputs.contexts.items():
        shared = 0.0 if inputs.fold is not None else 1 / len(inputs.rows[(context, control)])
        sizes = [1 / len(inputs.rows[(context, label)]) for label in labels]
        floors[context] = float(np.mean([shared / (shared + s) if shared else 0.0 for s in sizes]))
    return floors


def table_hash(table: CellTable) -> str:
    """Return sha256 over values and labels of a table."""
    digest = sha256()
    for array in (table.values.indptr, table.values.indices, table.values.data):
        digest.update(np.ascontiguousarray(array).tobytes())
    for labels in (table.context, table.perturbation):
        digest.update("\n".join(labels).encode())
    return digest.hexdigest()


def halve_controls(
    is_control: npt.NDArray[np.bool_], group: npt.NDArray[Any], seed: int
) -> npt.NDArray[np.int8]:
    """Return 0 and 1 for the halves of the control cells of each group, -1 for other cells."""
    fold = np.full(len(group), -1, dtype=np.int8)
    for name in np.unique(group[is_control].astype(str)):
        rows = np.flatnonzero(is_control & (group == name))
        order = keyed_order(len(rows), seed, "control fold", str(name))
        fold[rows[order]] = (np.arange(len(rows)) >= (len(rows) + 1) // 2).astype(np.int8)
    return fold
