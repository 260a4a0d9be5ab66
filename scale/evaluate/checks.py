"""What goes into an evaluation, read into one shape and checked before anything is computed.

Apart from the protocol so that every complaint about an input stands in one file: what was found,
what was expected, what to do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from scale.types import did_you_mean

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

Strings = npt.NDArray[np.object_]
Rows = npt.NDArray[np.int64]

_HIGHEST_LOG = 15.0
"""log1p of counts per 3.3 million: no normalised value reaches it."""
_TOTALS_TOLERANCE = 0.10
_TOTALS_TOLERANCE_TREATED = 1.0
MINIMUM_CONTROLS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Columns of ``.obs`` and the control's label."""

    perturbation: str
    cell_type: str
    unit: str | None
    control: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CellTable:
    """Cells of one input.

    Parameters
    ----------
    name
        How messages call it: ``observed``, ``train``, or the method of a prediction.
    values
        log1p of normalised counts, cells x genes (float32 CSR).
    counts
        Integer counts in the same shape, or None.
    genes, cell_names
        Column and row names.
    perturbation, context, unit
        Labels of every cell, stripped. Context = cell type, or cell type and unit.
    fold
        0 and 1 for the halves of the control cells, -1 for treated cells; None where not given.
    source_cell
        Name of the control cell a predicted cell was made from; None where not given.
    """

    name: str
    values: sp.csr_matrix
    counts: sp.csr_matrix | None
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


def read_table(adata: AnnData, name: str, keys: Keys, genes: Sequence[str] | None) -> CellTable:
    """Return the cells of an AnnData in one shape, in the gene order ``genes`` (None = its own).

    Raises
    ------
    ValueError
        For each row of the table of bad inputs that concerns one file.
    """
    if adata.n_obs == 0:
        raise ValueError(f"{name}: holds no cells; expected at least one condition")
    columns = {"perturbation": keys.perturbation, "cell type": keys.cell_type}
    if keys.unit is not None:
        columns["unit"] = keys.unit
    for what, key in columns.items():
        if key not in adata.obs:
            known = [str(column) for column in adata.obs.columns]
            raise ValueError(
                f"{name}: no column {key!r} for the {what}; {did_you_mean(key, known)}"
            )
    order = _gene_order(adata, name, genes)
    values = _matrix(adata.X, name)
    _check_values(values, adata, name)
    counts = _sorted(adata.layers.get("counts"))
    if order is not None:
        values, counts = values[:, order], None if counts is None else counts[:, order]
    cell_type = _labels(adata.obs[keys.cell_type])
    unit = cell_type if keys.unit is None else _labels(adata.obs[keys.unit])
    joined = keys.unit is not None and keys.unit != keys.cell_type
    context = cell_type
    if joined:
        context = np.array([f"{c} / {u}" for c, u in zip(cell_type, unit, strict=True)], object)
    return CellTable(
        name=name,
        values=values,
        counts=counts,
        genes=tuple(adata.var_names.astype(str)) if genes is None else tuple(genes),
        cell_names=np.asarray(adata.obs_names.astype(str), dtype=object),
        perturbation=_labels(adata.obs[keys.perturbation]),
        context=context,
        unit=unit,
        fold=_optional(adata, "control_fold", np.int8),
        source_cell=_optional(adata, "source_cell", object),
    )


def _labels(column: pd.Series) -> Strings:
    categories = pd.Categorical(column.astype(str))
    names = np.array([str(c).strip() for c in categories.categories], dtype=object)
    return np.asarray(names[categories.codes], dtype=object)


def _optional(adata: AnnData, key: str, dtype: Any) -> npt.NDArray[Any] | None:
    if key not in adata.obs:
        return None
    return np.asarray(adata.obs[key]).astype(dtype)


def _gene_order(adata: AnnData, name: str, genes: Sequence[str] | None) -> Rows | None:
    """Position of each wanted gene in the input, or None where the order is the same."""
    names = pd.Index(adata.var_names.astype(str))
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
    if missing or extra:
        hint = did_you_mean(missing[0], names.tolist()) if missing else ""
        raise ValueError(
            f"{name}: genes differ from those of observed: {len(missing)} missing "
            f"({', '.join(missing[:5])}), {len(extra)} more ({', '.join(extra[:5])}); "
            f"score on one gene list. {hint}".rstrip()
        )
    logger.info("%s: genes are in another order; aligned by name", name)
    return np.asarray(names.get_indexer(pd.Index(list(genes))), dtype=np.int64)


def _matrix(x: Any, name: str) -> sp.csr_matrix:
    if x is None:
        raise ValueError(f"{name}: X is empty; expected log1p of normalised counts")
    if hasattr(x, "to_memory"):
        x = x.to_memory()
    dtype = getattr(x, "dtype", np.dtype(np.float32))
    if dtype == np.float16:
        logger.warning("%s: X is float16, which holds 3 digits; save it as float32", name)
    if sp.issparse(x):
        # scipy reduces float16 matrices only after a cast
        matrix = sp.csr_matrix(x.astype(np.float32))
    else:
        matrix = sp.csr_matrix(np.asarray(x, dtype=np.float32))
    matrix.sum_duplicates()
    return matrix


def _sorted(counts: Any) -> sp.csr_matrix | None:
    """Counts with sorted columns, since draws go by the order of stored values."""
    if counts is None:
        return None
    if hasattr(counts, "to_memory"):
        counts = counts.to_memory()
    matrix = sp.csr_matrix(counts)
    if not matrix.has_canonical_format:
        matrix = matrix.copy()  # not the caller's
        matrix.sum_duplicates()
    return matrix


def _check_values(values: sp.csr_matrix, adata: AnnData, name: str) -> None:
    data = values.data
    if not np.isfinite(data).all():
        place = int(np.flatnonzero(~np.isfinite(data))[0])
        cell = int(np.searchsorted(values.indptr, place, side="right")) - 1
        gene = adata.var_names[int(values.indices[place])]
        raise ValueError(
            f"{name}: cell {adata.obs_names[cell]!r}, gene {gene!r} is {data[place]}; "
            "expected finite values"
        )
    if data.size == 0:
        raise ValueError(f"{name}: all values are 0; expected log1p of normalised counts")
    if (lowest := float(data.min())) < 0:
        share = float((data < 0).sum()) / (values.shape[0] * values.shape[1])
        raise ValueError(
            f"{name}: {share:.2%} of the values are negative, down to {lowest:.3g}; expected "
            "log1p values >= 0: clip the output at 0, or end the model in a ReLU"
        )
    highest = float(data.max())
    if bool((data == np.rint(data)).all()):
        raise ValueError(
            f"{name}: X holds integers up to {highest:.0f}, so counts; expected log1p of counts "
            "per a target sum: normalise both files with the same one "
            "(scanpy.pp.normalize_total(adata, target_sum=10000); scanpy.pp.log1p(adata))"
        )
    if highest >= _HIGHEST_LOG:
        raise ValueError(
            f"{name}: X reaches {highest:.1f}, so it is not log1p of normalised counts; apply "
            "log1p after normalising to the target sum of the other file"
        )


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


def check_conditions(observed: CellTable, predicted: CellTable, control: str) -> None:
    """Refuse predictions that do not cover exactly the observed conditions.

    Raises
    ------
    ValueError
        Naming the conditions that stand in one file only.
    """
    sides = []
    for table in (observed, predicted):
        pairs = pd.MultiIndex.from_arrays([table.context, table.perturbation]).unique()
        sides.append({(str(c), str(p)) for c, p in pairs if p != control})
    only_observed, only_predicted = sides[0] - sides[1], sides[1] - sides[0]
    if only_observed or only_predicted:
        parts = []
        for where, names in (("observed", only_observed), (predicted.name, only_predicted)):
            if names:
                shown = "; ".join(f"{p} in {c}" for c, p in sorted(names)[:5])
                parts.append(f"{len(names)} only in {where} ({shown})")
        raise ValueError(
            f"{predicted.name}: conditions differ: {', '.join(parts)}; predict every observed "
            "condition, and leave the others out of both files"
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
            "predict as many cells as were observed, or leave some out at random"
        )
    return f"{found}; the gene test finds more in more cells"


def check_totals(observed: CellTable, predicted: CellTable, control: str) -> None:
    """Refuse predictions normalised to another target sum, or scaled.

    Control cells of the contexts that both have are compared, since those must agree; else treated
    cells, with a wide tolerance, since a perturbation may move the total of a gene subset. Other
    contexts are left out: cut to some genes, two cell lines need not add up to the same.

    Raises
    ------
    ValueError
        With both totals.
    """
    sides = (observed, predicted)
    shared = np.intersect1d(observed.context, predicted.context)
    masks = [(t.perturbation == control) & np.isin(t.context, shared) for t in sides]
    tolerance, what = _TOTALS_TOLERANCE, "control cells"
    if not all(mask.any() for mask in masks):
        masks = [(t.perturbation != control) & np.isin(t.context, shared) for t in sides]
        tolerance, what = _TOTALS_TOLERANCE_TREATED, "treated cells"
    if not all(mask.any() for mask in masks):
        return
    totals = []
    for table, mask in zip(sides, masks, strict=True):
        values = table.values[mask]
        values.data = np.expm1(values.data)
        totals.append(float(np.median(values @ np.ones(values.shape[1]))))
    low, high = min(totals), max(totals)
    if high > low * (1 + tolerance):
        raise ValueError(
            f"{predicted.name}: the {what} add up to {totals[1]:.0f} counts after expm1 (median), "
            f"those of observed to {totals[0]:.0f}; normalise both to one target sum, and undo "
            "any scaling of the log values"
        )


def check_source_cells(predicted: CellTable, reference_cells: set[str], control: str) -> None:
    """Refuse predictions made from control cells of the half that the observed side is held to.

    Raises
    ------
    ValueError
        With the number of such cells.
    """
    if predicted.source_cell is None:
        return
    treated = predicted.source_cell[predicted.perturbation != control]
    met = sum(str(cell) in reference_cells for cell in treated)
    if met:
        raise ValueError(
            f"{predicted.name}: {met} cells were made from control cells of fold 1, which the "
            "observed change is measured against; predict from cells with control_fold 0 "
            "(scale.evaluate.protocol.split_controls writes the column)"
        )


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
