"""The tables of a report as other programs read them.

Apart from the report because these have shapes of their own: wide tables with cell-eval's columns,
and the ceiling by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from scale.evaluate.aggregate import CEILING, CELLS
from scale.evaluate.metrics import METRICS

CELL_EVAL = tuple(name for name, row in METRICS.items() if not row.strict_only)
"""Metrics under the names of cell-eval's columns."""
_CEILING_COLUMNS = {
    "metric": "metric",
    "better": "better",
    "mean": "half_depth",
    "low": "low",
    "high": "high",
    "reason": "reason",
    "mean_full_depth": "full_depth",
    "mean_full_depth_bound": "full_depth_at_most",
    "ceiling_sd": "half_depth_sd",
    "ceiling_full_depth_sd": "full_depth_sd",
    "num_units": "num_units",
    "num_conditions": "num_conditions",
}


def file_name(text: str) -> str:
    """Return a name that is safe as a file's: other characters than letters are written as %XX.

    Examples
    --------
    >>> file_name("Hs 766T"), file_name("HepG2/C3A"), file_name("..")
    ('Hs 766T', 'HepG2%2FC3A', '%2E.')
    """
    name = quote(text, safe=" ()+,=@'")
    return name if not name.startswith(".") else f"%2E{name[1:]}"


def ceiling(aggregate: pd.DataFrame) -> pd.DataFrame:
    """Return the noise ceiling, one row per metric: half depth, interval, full depth.

    ``full_depth`` is empty where a metric has no correction: the ceiling of set and ranking metrics
    then lies between ``half_depth`` and ``full_depth_at_most``.
    """
    rows = aggregate[aggregate["method"] == CEILING]
    known = {name: new for name, new in _CEILING_COLUMNS.items() if name in rows}
    return rows[list(known)].rename(columns=known).reset_index(drop=True)


def cell_eval_tables(
    scores: pd.DataFrame, models: Sequence[str]
) -> Iterator[tuple[Path, pd.DataFrame]]:
    """Yield wide tables as cell-eval's ``results.csv``: one row per perturbation of a context.

    ``<context>_results.csv``; with several models in a folder per model. A metric that cell-eval
    would leave out because no condition has it is a column without values.

    Parameters
    ----------
    scores
        Long table of scores.
    models
        Methods to write.
    """
    rows = scores[(scores["form"] == CELLS) & scores["metric"].isin(CELL_EVAL)]
    for model in models:
        folder = Path() if len(models) == 1 else Path(file_name(model))
        own = rows[rows["method"] == model]
        for context, table in own.groupby("context", sort=False, observed=True):
            wide = table.pivot(index="perturbation", columns="metric", values="value")
            wide = wide.reindex(columns=[m for m in CELL_EVAL if m in wide])
            wide.columns.name = None
            yield folder / f"{file_name(str(context))}_results.csv", wide.reset_index()
