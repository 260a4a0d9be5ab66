"""Gene tests of observed cells as a table that cell-eval takes in place of its own (``de_real``).

Apart from the tests because only this format needs names, memberships and the statistic.

Shapes: G = genes.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from scale.evaluate.context import Context
from scale.evaluate.statistics import column_means, rank_sum


def gene_table(context: Context, genes: tuple[str, ...]) -> pd.DataFrame:
    """Return one row per (perturbation, gene) of the observed gene tests of a context.

    Columns are those of pdex 0.3: target, feature; target_mean and ref_mean (expm1 of the mean
    log1p value), target_membership and ref_membership (cells), log2_fold_change, percent_change (a
    ratio of change, for all its name), p_value, statistic (U of the perturbed cells), fdr.
    """
    observed = context.observed
    assert observed.cells is not None
    control, tests = observed.control.tested, observed.cells.tests
    reference_G = np.expm1(column_means(control))
    statistic_PG, _ = rank_sum(control, context.cells)
    blocks = []
    for place, (label, cells) in enumerate(zip(context.labels, context.cells, strict=True)):
        target_G = np.expm1(observed.mean_PG[place])
        with np.errstate(divide="ignore", invalid="ignore"):
            change_G = (target_G - reference_G) / reference_G
        blocks.append(
            pd.DataFrame(
                {
                    "target": label,
                    "feature": list(genes),
                    "target_mean": target_G,
                    "ref_mean": reference_G,
                    "target_membership": cells.shape[0],
                    "ref_membership": control.shape[0],
                    "log2_fold_change": tests.lfc_PG[place].astype(np.float64),
                    "percent_change": np.where(np.isnan(change_G), 0.0, change_G),
                    "p_value": tests.p_PG[place],
                    "statistic": statistic_PG[place],
                    "fdr": tests.fdr_PG[place].astype(np.float64),
                }
            )
        )
    return pd.concat(blocks, ignore_index=True)
