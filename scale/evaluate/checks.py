"""What goes into an evaluation, brought into one shape, and the checks of its labels and genes.

Apart from the protocol so that every complaint about an input says what was found, what was
expected, what to do, before anything is computed. Checks of values stand in ``values``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.evaluate.cells import CellMatrix, CellSource, Rows
from scale.types import did_you_mean

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

Strings = npt.NDArray[np.object_]
Condition = tuple[str, str]
"""Context and perturbation."""

MINIMUM_CONTROLS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Columns of ``.obs`` and the control's label."""

    perturbation: str
    cell_type: str
    unit: str | None
    batch: str | None
    control: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CellTable:
    """Cells of one input.

    Parameters
    ----------
    name
        How messages call it: ``observed``, ``train``, or the method of a prediction.
    values
        log1p of normalised counts, cells x genes, read by rows.
    counts
        Integer counts in the same shape, or None.
    genes, cell_names
        Column and row names.
    perturbation, context, unit
        Labels of every cell, stripped. Context = cell type, with unit and batch where told.
    fold
        0 and 1 for the halves of the control cells, -1 for treated cells; None where not given.
    source_cell
        Name of the control cell a predicted cell was made from; None where not given.
    """

    name: str
    values: CellMatrix
    counts: CellMatrix | None
    genes: tuple[str, ...]
    cell_names: Strings
    perturbation: Strings
    context: Strings
    unit: Strings
    fold: npt.NDArray[np.int8] | None
    source_cell: Strings | None

    def rows(self) -> dict[tuple[str, str], Rows]:
        """Return the row numbers of every (context, perturbation)."""
        contexts, context_names = pd.factorize(self.context)
        labels, label_names = pd.factorize(self.perturbation)
        code = contexts * len(label_names) + labels
        order = np.argsort(code, kind="stable")
        present, start = np.unique(code[order], return_index=True)
        groups = np.split(order, start[1:])
        return {
            (str(context_names[c // len(label_names)]), str(label_names[c % len(label_names)])): g
            for c, g in zip(present, groups, strict=True)
        }


# --- reading ------------------------------------------------------------------------------------


def read_table(
    source: AnnData | CellSource,
    name: str,
    keys: Keys,
    genes: Sequence[str] | None,
    *,
    target_sum: float | None = None,
    cut_genes: bool = False,
) -> CellTable:
    """Return the cells of an input in one shape, in the gene order ``genes`` (None = its own).

    Values stay where they are until rows of them are asked for. With ``target_sum``, ``X`` holds
    counts, and is normalised to it. With ``cut_genes``, further genes are no error.

    Raises
    ------
    ValueError
        For each row of the table of bad inputs that concerns labels and genes of one file.
    """
    source = CellSource.of(source)
    obs = source.obs
    if len(obs) == 0:
        raise ValueError(f"{name}: holds no cells; expected at least one condition")
    columns = {"perturbation": keys.perturbation, "cell type": keys.cell_type}
    columns |= {k: v for k, v in (("unit", keys.unit), ("batch", keys.batch)) if v is not None}
    for what, key in columns.items():
        if key not in obs:
            known = [str(column) for column in obs.columns]
            raise ValueError(
                f"{name}: no column {key!r} for the {what}; {did_you_mean(key, known)}"
            )
    if source.values is None:
        raise ValueError(f"{name}: X is empty; expected log1p of normalised counts")
    order = _gene_order(source.genes, name, genes, cut=cut_genes)
    counts = source.values if target_sum is not None else source.counts
    cell_type = _labels(obs[keys.cell_type])
    unit = cell_type if keys.unit is None else _labels(obs[keys.unit])
    context = cell_type
    for column in dict.fromkeys((keys.unit, keys.batch)):
        if column is None or column == keys.cell_type:
            continue
        parts = zip(context, _labels(obs[column]), strict=True)
        context = np.array([f"{c} / {part}" for c, part in parts], object)
    return CellTable(
        name=name,
        values=CellMatrix(source.values, name, columns=order, target_sum=target_sum),
        counts=None if counts is None else CellMatrix(counts, name, columns=order),
        genes=tuple(source.genes) if genes is None else tuple(genes),
        cell_names=np.asarray(obs.index.astype(str), dtype=object),
        perturbation=_labels(obs[keys.perturbation]),
        context=context,
        unit=unit,
        fold=_optional(obs, "control_fold", np.int8),
        source_cell=_optional(obs, "source_cell", object),
    )


def _labels(column: pd.Series) -> Strings:
    categories = pd.Categorical(column.astype(str))
    names = np.array([str(c).strip() for c in categories.categories], dtype=object)
    return np.asarray(names[categories.codes], dtype=object)


def _optional(obs: pd.DataFrame, key: str, dtype: Any) -> npt.NDArray[Any] | None:
    if key not in obs:
        return None
    return np.asarray(obs[key]).astype(dtype)


def _gene_order(
    names: pd.Index, name: str, genes: Sequence[str] | None, *, cut: bool
) -> Rows | None:
    """Position of each wanted gene in the input, or None where the order is the same."""
    if not names.is_unique:
        twice = names[names.duplicated()].unique()[:5]
        raise ValueError(
            f"{name}: gene names are not unique (as {', '.join(twice)}); make them so, "
            "for example with adata.var_names_make_unique() in every file"
        )
    if genes is None or names.tolist() == list(genes):
        return None
    missing = [gene for gene in genes if gene not in names]
    extra = names.difference(pd.Index(list(genes)), sort=False).tolist()
    if missing or (extra and not cut):
        hint = did_you_mean(missing[0], names.tolist()) if missing else ""
        raise ValueError(
            f"{name}: genes differ from those of observed: {len(missing)} missing "
            f"({', '.join(missing[:5])}), {len(extra)} more ({', '.join(extra[:5])}); "
            f"score on one gene list. {hint}".rstrip()
        )
    told = f"cut by name to {len(genes):,}" if extra else "in another order; aligned by name"
    logger.info("%s: genes are %s", name, told)
    return np.asarray(names.get_indexer(pd.Index(list(genes))), dtype=np.int64)


# --- one file against another -------------------------------------------------------------------


def check_controls(table: CellTable, control: str, contexts: Sequence[str]) -> None:
    """Refuse a table without control cells, or with too few in one of ``contexts``.

    Raises
    ------
    ValueError
        Naming the label or the contexts.
    """
    is_control = table.perturbation == control
    if not is_control.any():
        known = sorted(set(table.perturbation))
        raise ValueError(
            f"{table.name}: no control cells, no label is {control!r}; "
            f"{did_you_mean(control, known)}"
        )
    counts = pd.Series(table.context[is_control]).value_counts()
    few = [c for c in contexts if counts.get(c, 0) < MINIMUM_CONTROLS]
    if few:
        found = ", ".join(f"{c} ({counts.get(c, 0)})" for c in few[:5])
        raise ValueError(
            f"{table.name}: contexts with fewer than {MINIMUM_CONTROLS} control cells: {found}; "
            "add their control cells, or leave these contexts out of both files"
        )


def other_conditions(
    observed: CellTable, predicted: CellTable, control: str
) -> tuple[list[Condition], list[Condition]]:
    """Return the conditions only observed, and those only predicted, sorted."""
    sides = []
    for table in (observed, predicted):
        pairs = pd.MultiIndex.from_arrays([table.context, table.perturbation]).unique()
        sides.append({(str(c), str(p)) for c, p in pairs if p != control})
    return sorted(sides[0] - sides[1]), sorted(sides[1] - sides[0])


def refuse_conditions(
    only_observed: Sequence[Condition], only_predicted: Sequence[Condition], name: str
) -> None:
    """Refuse predictions that do not cover exactly the observed conditions.

    Raises
    ------
    ValueError
        Naming the conditions that stand in one file only.
    """
    if only_observed or only_predicted:
        parts = []
        for where, pairs in (("observed", only_observed), (name, only_predicted)):
            if pairs:
                shown = "; ".join(f"{p} in {c}" for c, p in pairs[:5])
                parts.append(f"{len(pairs)} only in {where} ({shown})")
        raise ValueError(
            f"{name}: conditions differ: {', '.join(parts)}; predict every observed condition, and "
            "leave the others out of both files, or set protocol.missing=drop, which leaves them "
            "out and lists them"
        )


def check_cell_numbers(
    observed: Mapping[tuple[str, str], Rows],
    predicted: Mapping[tuple[str, str], Rows],
    name: str,
    *,
    strict: bool,
) -> str | None:
    """Return a warning where predicted and observed cell numbers differ, or None.

    Raises
    ------
    ValueError
        In the strict profile, if one is more than twice the other: the gene test would compare
        its own power.
    """
    ratios = np.array([len(predicted[pair]) / len(rows) for pair, rows in observed.items()])
    if ratios.size == 0 or bool((ratios == 1).all()):
        return None
    low, high = float(ratios.min()), float(ratios.max())
    found = f"{name}: predicted / observed cells per condition are {low:.2f} to {high:.2f}"
    if strict and (high > 2 or low < 0.5):
        raise ValueError(
            f"{found}; expected as many as observed, as the gene test finds more in more cells: "
            "predict as many cells as were observed, or set protocol.match_cells=true, which draws "
            "as many of the larger side"
        )
    return f"{found}; the gene test finds more in more cells"


def check_source_cells(
    observed: CellTable, predicted: CellTable, fold: npt.NDArray[np.int8], control: str
) -> str | None:
    """Refuse predictions that share control cells with the reference half; return a warning.

    Parameters
    ----------
    observed, predicted
        Inputs.
    fold
        0 (input) or 1 (reference) for every observed control cell.
    control
        Label of the control.

    Raises
    ------
    ValueError
        If source cells are of the reference half (with their number), or not known while no halves
        were given beforehand.
    """
    shared = "or set protocol.control_split=shared, which holds both sides to all control cells"
    if predicted.source_cell is None:
        if observed.fold is None:
            raise ValueError(
                f"{predicted.name}: no column source_cell, and observed has no control_fold, so "
                "predicted and observed changes cannot be held to disjoint control cells: predict "
                "from the cells of control_fold 0 (scale.evaluate.protocol.split_controls writes "
                f"the column), {shared}"
            )
        return (
            f"{predicted.name}: no column source_cell; it is taken to have started from control "
            "cells of control_fold 0 only, else its correlations are biased down"
        )
    names = observed.cell_names if observed.source_cell is None else observed.source_cell
    reference = {str(cell) for cell in names[fold == 1]}
    treated = predicted.source_cell[predicted.perturbation != control]
    if not np.isin(treated.astype(str), names[fold >= 0].astype(str)).any():
        return (
            f"{predicted.name}: no source_cell is a control cell of observed, so it is not known "
            "whether the prediction started from the half that it is held to"
        )
    met = sum(str(cell) in reference for cell in treated)
    if met:
        raise ValueError(
            f"{predicted.name}: {met} cells were made from control cells of fold 1, which the "
            "observed change is measured against: predict from cells with control_fold 0 "
            f"(scale.evaluate.protocol.split_controls writes the column), {shared}"
        )
    return None


def check_train(train: CellTable, tested: Sequence[tuple[str, str]]) -> None:
    """Refuse training cells of a condition that is scored.

    Raises
    ------
    ValueError
        Naming the conditions.
    """
    present = set(train.rows())
    leaks = [pair for pair in tested if pair in present]
    if leaks:
        shown = "; ".join(f"{p} in {c}" for c, p in leaks[:5])
        raise ValueError(
            f"train holds cells of {len(leaks)} scored conditions ({shown}); leave held-out "
            "conditions out of train"
        )
