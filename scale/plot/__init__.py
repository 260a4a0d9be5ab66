"""Figures from AnnData and tables: each function draws into ``ax`` and returns it.

>>> import pandas as pd
>>> import scale.plot
>>> change = pd.Series([0.0, 1.0, -1.0], index=["A", "B", "C"])
>>> axes = scale.plot.delta(0.5 * change, change)
>>> axes.figure.savefig("delta.png")  # doctest: +SKIP

Nothing here touches pyplot or a global setting, so that figures can be made on a machine without a
display and beside those of a notebook.
"""

from scale.plot.bars import scores
from scale.plot.cells import delta, distribution, effect, mean_delta
from scale.plot.curves import training
from scale.plot.plane import embedding
from scale.plot.summary import summary

__all__ = [
    "delta",
    "distribution",
    "effect",
    "embedding",
    "mean_delta",
    "scores",
    "summary",
    "training",
]
