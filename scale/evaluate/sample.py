"""A small sample of the cells that were compared, for pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scale.evaluate.checks import CellTable
from scale.evaluate.context import generator

if TYPE_CHECKING:
    from anndata import AnnData

MAX_CELLS = 1_500


def sample_cells(
    observed: CellTable,
    predicted: Mapping[str, CellTable],
    contexts: Mapping[str, Sequence[str]],
    *,
    control: str,
    seed: int,
) -> AnnData:
    """Return at most 1,500 cells with obs role, method, context and perturbation.

    Control, observed and each method's predicted cells get equal shares, drawn evenly from the
    scored conditions.
    """
    from anndata import AnnData

    share = MAX_CELLS // (2 + len(predicted))
    scored = pd.MultiIndex.from_tuples(
        [(c, label) for c, labels in contexts.items() for label in labels]
    )
    blocks, tables = [], []
    for role, name, table in (
        ("control", "observed", observed),
        ("observed", "observed", observed),
        *(("predicted", method, t) for method, t in predicted.items()),
    ):
        if role == "control":
            mask = (table.perturbation == control) & np.isin(table.context, list(contexts))
        else:
            mask = pd.MultiIndex.from_arrays([table.context, table.perturbation]).isin(scored)
        rows = np.flatnonzero(mask)
        rows = np.sort(generator(seed, "sample", role, name).permutation(rows)[:share])
        blocks.append(table.values[rows])
        tables.append(
            pd.DataFrame(
                {
                    "role": role,
                    "method": name,
                    "context": table.context[rows].astype(str),
                    "perturbation": table.perturbation[rows].astype(str),
                }
            )
        )
    obs = pd.concat(tables, ignore_index=True)
    obs.index = pd.Index([f"sample-{i}" for i in range(len(obs))])
    return AnnData(
        X=sp.vstack(blocks, format="csr"), obs=obs, var=pd.DataFrame(index=list(observed.genes))
    )
