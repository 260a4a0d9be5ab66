"""What a store knows of its cells, as the ``obs`` of an AnnData.

Apart from the store because nothing of it is needed in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.data.csr import CsrCounts
from scale.data.store import CellSetStore, control_fold
from scale.data.store_files import ADDED_COLUMNS
from scale.types import Perturbation


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
    sizes = [part.num_cells for part in parts]

    def spread(per_condition: Sequence[Any], dtype: Any = object) -> npt.NDArray[Any]:
        return np.repeat(np.array(per_condition, dtype), sizes)

    def join(per_cell: Sequence[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
        return np.concatenate([np.empty(0, dtype), *per_cell])

    row_N = join([np.arange(size) for size in sizes], np.int64)
    number_N = spread(table.index.to_list(), np.int64)
    source = [f"c{c}:{r}" for c, r in zip(number_N.tolist(), row_N.tolist(), strict=True)]
    folds = [
        control_fold(store.condition(c), total)[:size] if is_control else np.full(size, -1, np.int8)
        for c, total, is_control, size in zip(
            table.index, table["num_cells"], table["is_control"], sizes, strict=True
        )
    ]
    batches = np.array([*store.batches, None], object)  # NO_BATCH is far behind: None
    batch = [
        np.full(part.num_cells, name, object)
        if part.batch_code_N is None
        else batches[np.minimum(part.batch_code_N, len(store.batches))]
        for name, part in zip(table["batch"], parts, strict=True)
    ]
    added = (
        join([part.library_N for part in parts], np.uint32),
        number_N,
        spread(table["is_control"].to_list(), bool),
        source,
        join(folds, np.int8),
    )
    obs = pd.DataFrame(
        dict(zip(ADDED_COLUMNS, added, strict=True)), index=pd.Index(source, dtype=object)
    )
    columns = store.columns
    if columns["dose"] is not None:
        obs[columns["dose"]] = spread(
            [_first_dose(store.perturbations[p]) for p in table["perturbation"]], np.float64
        )
    names = {
        "perturbation": spread([store.labels[p] for p in table["perturbation"]]),
        "cell_type": spread(table["cell_type"].to_list()),
        "batch": join(batch, object),
    }
    for key, values in names.items():
        if (name := columns[key]) is not None:
            obs[name] = pd.Categorical(values)
    return obs


def _first_dose(perturbation: Perturbation) -> float:
    doses = [c.dose for c in perturbation.components if c.dose is not None]
    return doses[0] if doses else np.nan
