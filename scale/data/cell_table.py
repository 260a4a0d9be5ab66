"""What a store knows of its cells, as the ``obs`` of an AnnData.

Apart from the store because nothing of it is needed in training.

Shapes: N = cells, C = conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.data.codec import CellChunk
from scale.data.csr import NO_BATCH, CsrCounts
from scale.data.store import CellSetStore, control_fold
from scale.data.store_files import ADDED_COLUMNS
from scale.types import Perturbation

Integers = npt.NDArray[np.int64]


class CellTable:
    """Describes any cells of an open store, given by condition and row within it."""

    def __init__(self, store: CellSetStore) -> None:
        self._store = store
        table = store.conditions
        number_C = table["perturbation"].to_numpy(np.int64)
        doses = [_first_dose(perturbation) for perturbation in store.perturbations]
        self.by_condition: dict[str, npt.NDArray[Any]] = {
            "perturbation": np.array(store.labels, object)[number_C],
            "cell_type": table["cell_type"].to_numpy(object),
            "dose": np.array(doses, np.float64)[number_C],
            "is_control": table["is_control"].to_numpy(bool),
        }
        """What all cells of a condition share; the perturbation is the source's text."""
        code = {name: i for i, name in enumerate(store.batches)}
        self._code_C = np.array([code.get(name, NO_BATCH) for name in table["batch"]], np.uint16)
        self._batch_names = np.array([*store.batches, None], object)
        self._size_C = table["num_cells"].to_numpy(np.int64)
        self._fold: tuple[int, npt.NDArray[np.int8]] = (-1, np.empty(0, np.int8))

    def batch_codes(self, condition: int, cells: CsrCounts | CellChunk) -> npt.NDArray[np.uint16]:
        """Return the code of the batch of each cell, whether the condition or the cells have it."""
        if cells.batch_code_N is not None:
            return cells.batch_code_N
        return np.full(cells.num_cells, self._code_C[condition])

    def batch_names(self, code_N: npt.NDArray[np.uint16]) -> npt.NDArray[np.object_]:
        """Return the name behind each code; None where a cell has no batch."""
        return self._batch_names[np.minimum(code_N, len(self._batch_names) - 1)]

    def describe(
        self,
        condition_N: Integers,
        row_N: Integers,
        library_N: npt.NDArray[np.uint32],
        batch_code_N: npt.NDArray[np.uint16],
    ) -> pd.DataFrame:
        """Return the columns that ``CellSetStore.to_anndata`` documents, names as plain texts."""
        is_control_N = self.by_condition["is_control"][condition_N]
        names = own_names(condition_N, row_N)
        fold_N = self._folds(condition_N, row_N, is_control_N)
        added = (library_N, condition_N, is_control_N, names, fold_N)
        obs = pd.DataFrame(
            dict(zip(ADDED_COLUMNS, added, strict=True)), index=pd.Index(names, dtype=object)
        )
        columns = self._store.columns
        for key in ("dose", "perturbation", "cell_type"):
            if (name := columns[key]) is not None:
                obs[name] = self.by_condition[key][condition_N]
        if (name := columns["batch"]) is not None:
            obs[name] = self.batch_names(batch_code_N)
        return obs

    def _folds(
        self, condition_N: Integers, row_N: Integers, is_control_N: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int8]:
        """Return the half of its control pool that each control cell is in; -1 for treated."""
        fold_N = np.full(len(condition_N), -1, np.int8)
        for condition in np.unique(condition_N[is_control_N]).tolist():
            if self._fold[0] != condition:
                size = int(self._size_C[condition])
                self._fold = condition, control_fold(self._store.condition(condition), size)
            is_here = condition_N == condition
            fold_N[is_here] = self._fold[1][row_N[is_here]]
        return fold_N


def describe_cells(
    store: CellSetStore, table: pd.DataFrame, parts: Sequence[CsrCounts]
) -> pd.DataFrame:
    """Return what is known of the first cells of some conditions.

    Parameters
    ----------
    store
        Open store.
    table
        Some rows of its table of conditions.
    parts
        The first cells of each.
    """
    cells, numbers = CellTable(store), table.index.to_list()
    sizes = [part.num_cells for part in parts]
    codes = [cells.batch_codes(c, part) for c, part in zip(numbers, parts, strict=True)]
    obs = cells.describe(
        np.repeat(np.array(numbers, np.int64), sizes),
        _joined([np.arange(size) for size in sizes], np.int64),
        _joined([part.library_N for part in parts], np.uint32),
        _joined(codes, np.uint16),
    )
    for key in ("perturbation", "cell_type", "batch"):
        if (name := store.columns[key]) is not None:
            obs[name] = pd.Categorical(obs[name])
    return obs


def own_names(condition_N: Integers, row_N: Integers) -> npt.NDArray[np.object_]:
    """Return ``c<id>:<row>`` for each cell."""
    names = [f"c{c}:{r}" for c, r in zip(condition_N.tolist(), row_N.tolist(), strict=True)]
    return np.array(names, object)


def _joined(per_condition: Sequence[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *per_condition])


def _first_dose(perturbation: Perturbation) -> float:
    doses = [c.dose for c in perturbation.components if c.dose is not None]
    return doses[0] if doses else np.nan
