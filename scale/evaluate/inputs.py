"""All inputs of an evaluation together: read, checked, halved.

Apart from the protocol so that nothing is computed before every input has passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from scale.config import ControlSplit, Missing, Profile, ProtocolConfig
from scale.evaluate import checks
from scale.evaluate.aggregate import CEILING
from scale.evaluate.baselines import BASELINES, ORACLE
from scale.evaluate.cells import CellSource, Rows
from scale.evaluate.checks import CellTable, Condition, Keys
from scale.evaluate.context import keyed_order
from scale.evaluate.values import check_totals, check_values

OBSERVED = "observed"
TRAIN = "train"


@dataclass
class Inputs:
    """Tables that were read and checked.

    Parameters
    ----------
    observed, predicted, train
        Inputs; predicted by method.
    rows, predicted_rows
        Row numbers of every condition that both sides have, and of the control cells.
    whole_rows
        Predicted rows by method before cells were drawn from them (``protocol.match_cells``), for
        methods with more cells than were drawn: their means are those of all cells.
    contexts
        Scored perturbations of every context.
    excluded
        (context, perturbation, reason) of what was left out.
    fold
        0 (input) or 1 (reference) for every observed control cell, -1 for others; None where both
        sides are held to all control cells.
    sha256
        Of what was read, by input.
    batch_key
        Column of the batch whose control cells a condition is compared with; None = all batches.
    num_not_scored
        Predicted cells of conditions that are not observed, where that is allowed.
    """

    observed: CellTable
    predicted: dict[str, CellTable]
    train: CellTable | None
    rows: dict[Condition, Rows]
    predicted_rows: dict[str, dict[Condition, Rows]]
    whole_rows: dict[str, dict[Condition, Rows]] = field(default_factory=dict)
    contexts: dict[str, list[str]] = field(default_factory=dict)
    excluded: list[tuple[str, str, str]] = field(default_factory=list)
    fold: npt.NDArray[np.int8] | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    batch_key: str | None = None
    num_not_scored: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def scored(self) -> list[Condition]:
        """All scored conditions."""
        return [(c, label) for c, labels in self.contexts.items() for label in labels]


def read_inputs(
    predicted: Mapping[str, CellSource],
    observed: CellSource,
    train: CellSource | None,
    keys: Keys,
    protocol: ProtocolConfig,
    *,
    ignore_others: bool,
    seed: int,
) -> Inputs:
    """Read and check every input; nothing is computed before all of them passed."""
    strict, control, total = protocol.profile is Profile.strict, keys.control, protocol.normalize
    table = checks.read_table(observed, OBSERVED, keys, None, target_sum=total)
    tables = {
        m: checks.read_table(source, m, keys, table.genes, target_sum=total)
        for m, source in predicted.items()
    }
    reserved = {OBSERVED, TRAIN, CEILING, ORACLE, *BASELINES} & set(tables)
    if reserved:
        raise ValueError(
            f"predictions may not be called {', '.join(sorted(reserved))}: the names of baselines, "
            "of the ceiling, of observed and training cells are taken; choose others"
        )
    trained = None
    if train is not None:
        trained = checks.read_table(
            train, TRAIN, keys, table.genes, target_sum=total, cut_genes=True
        )
    rows = {method: t.rows() for method, t in tables.items()}
    inputs = Inputs(table, tables, trained, table.rows(), rows, batch_key=keys.batch)
    with_controls = [table, *(() if strict else tables.values())]
    for given in with_controls:
        checks.check_controls(given, control, ())
    _check_conditions(inputs, control, protocol.missing, ignore_others=ignore_others)
    names = sorted({c for c, p in inputs.rows if p != control})
    if not names:
        raise ValueError(f"observed: every cell is labelled {control!r}; nothing to score")
    for given in with_controls:
        checks.check_controls(given, control, names)
    if protocol.match_cells:
        _match_cells(inputs, control, seed)
    _choose_conditions(inputs, control, protocol.min_cells, names)
    for method in tables:
        observed_rows = {pair: inputs.rows[pair] for pair in inputs.scored}
        _warn(inputs, checks.check_cell_numbers(observed_rows, rows[method], method, strict=strict))
    if trained is not None:
        checks.check_train(trained, inputs.scored)
    if strict and protocol.control_split is ControlSplit.disjoint:
        inputs.fold = _control_folds(inputs, control, seed)
    _check_values(inputs, control, total)
    if strict and inputs.fold is None:
        told = ", ".join(f"{c} {floor:.2f}" for c, floor in floors(inputs, control).items())
        inputs.warnings.append(
            "Predicted and observed changes share control cells (control_split=shared): cells "
            f"without any effect that started from other cells score a pearson_delta of {told}."
        )
    return inputs


def _warn(inputs: Inputs, warning: str | None) -> None:
    if warning is not None:
        inputs.warnings.append(warning)


def _check_conditions(
    inputs: Inputs, control: str, missing: Missing, *, ignore_others: bool
) -> None:
    """Leave out, or refuse, what only one side has."""
    dropped = set()
    for method, table in inputs.predicted.items():
        only_observed, only_predicted = checks.other_conditions(inputs.observed, table, control)
        if ignore_others:
            cells = [len(inputs.predicted_rows[method][pair]) for pair in only_predicted]
            inputs.num_not_scored[method] = sum(cells)
            only_predicted = []
        if missing is Missing.error:
            checks.refuse_conditions(only_observed, only_predicted, method)
        dropped |= {(*pair, f"not predicted by {method}") for pair in only_observed}
        dropped |= {(*pair, f"predicted by {method}, not observed") for pair in only_predicted}
    inputs.excluded += sorted(dropped)
    left_out = {(context, label) for context, label, _ in dropped}
    if dropped:
        inputs.warnings.append(
            f"{len(left_out)} conditions stand in one input only and are left out "
            "(protocol.missing=drop): a method is not judged by what it did not predict."
        )
    inputs.rows = {pair: rows for pair, rows in inputs.rows.items() if pair not in left_out}
    if left_out and all(label == control for _, label in inputs.rows):
        raise ValueError(
            f"no condition stands in every input ({len(left_out)} in some); compare the labels of "
            "the files, cell types as well as perturbations"
        )


def _match_cells(inputs: Inputs, control: str, seed: int) -> None:
    """Draw from every side of a condition as many cells as the smallest has."""
    whole = {method: dict(rows) for method, rows in inputs.predicted_rows.items()}
    sides = {OBSERVED: inputs.rows, **inputs.predicted_rows}
    for pair in [pair for pair in inputs.rows if pair[1] != control]:
        size = min(len(rows[pair]) for rows in sides.values())
        for name, rows in sides.items():
            if len(rows[pair]) > size:
                order = keyed_order(len(rows[pair]), seed, "match cells", name, *pair)
                rows[pair] = rows[pair][np.sort(order[:size])]
    inputs.whole_rows = {
        method: rows
        for method, rows in whole.items()
        if any(
            len(rows[pair]) > len(drawn) for pair, drawn in inputs.predicted_rows[method].items()
        )
    }


def _check_values(inputs: Inputs, control: str, target_sum: float | None) -> None:
    """Pass over the values of all inputs, of what is used, and compare their totals."""
    wanted = [*inputs.scored, *((c, control) for c in inputs.contexts)]
    tables: list[tuple[CellTable, Mapping[Condition, Rows] | None]] = [
        (inputs.observed, inputs.rows),
        *(
            (t, inputs.whole_rows.get(m, inputs.predicted_rows[m]))
            for m, t in inputs.predicted.items()
        ),
    ]
    if inputs.train is not None:
        tables.append((inputs.train, None))
    checked = []
    for table, rows in tables:
        numbers = np.arange(len(table.context))
        if rows is not None:
            numbers = np.sort(np.concatenate([rows[pair] for pair in wanted if pair in rows]))
        checked.append(check_values(table, numbers, target_sum=target_sum))
        inputs.sha256[table.name] = checked[-1].sha256
        if table.values.is_float16:
            inputs.warnings.append(
                f"{table.name}: X is float16, which holds 3 digits; save it as float32"
            )
        if len(checked) > 1:
            _warn(inputs, check_totals(inputs.observed, checked[0], table, checked[-1], control))


def _choose_conditions(inputs: Inputs, control: str, min_cells: int, names: list[str]) -> None:
    """Fill in the scored conditions and those left out."""
    for context in names:
        kept = []
        for label in sorted(p for c, p in inputs.rows if c == context and p != control):
            size = len(inputs.rows[(context, label)])
            few = size < min_cells
            reason = f"{size} observed cells; {min_cells} are needed"
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
    for other in inputs.predicted.values():
        _warn(inputs, checks.check_source_cells(table, other, fold, control))
    return fold


def floors(inputs: Inputs, control: str) -> dict[str, float]:
    """Expected pearson_delta of independent cells without any effect, by context.

    (1/n_c) / sqrt((1/n_c + 1/n) (1/n_c + 1/n_pred)) with all n_c control cells on both sides, mean
    over conditions and methods; 0 with disjoint halves.
    """
    found = {}
    sides = list(inputs.predicted_rows.values()) or [inputs.rows]
    for context, labels in inputs.contexts.items():
        shared = 0.0 if inputs.fold is not None else 1 / len(inputs.rows[(context, control)])
        noise = [
            np.array([1 / len(rows[(context, label)]) for label in labels])
            for rows in (inputs.rows, *sides)
        ]
        floor = [shared / np.sqrt((shared + noise[0]) * (shared + own)) for own in noise[1:]]
        found[context] = float(np.mean(floor))
    return found


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
