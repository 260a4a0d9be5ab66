"""Figures of a training run, from its ``metrics.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from scale.plot.canvas import (
    INK,
    Axes,
    Figure,
    Line2D,
    NullFormatter,
    few_ticks,
    key,
    new_axes,
    new_figure,
    thousands,
    tidy,
)

_LINES = ("#0072b2", "#d55e00", "#009e73", "#b05a8a", "#8a6d00", "#3a9bd9")
_NOT_A_LOSS = (
    "loss",
    "grad_norm",
    "lr",
    "cells_per_second",
    "data_wait_fraction",
    "time_seconds",
)


def read_metrics(path: Path | str) -> pd.DataFrame:
    """Return a run's ``metrics.jsonl`` as a table, one row per line, absent keys as NaN.

    Parameters
    ----------
    path
        The file, or the run directory that holds it.

    Raises
    ------
    ValueError
        If there is no such file.
    """
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no metrics.jsonl at {path}; give the directory of a training run")
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    return pd.DataFrame(rows)


def training(
    metrics: pd.DataFrame | Path | str,
    *,
    keys: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    title: str | None = None,
    unit: str = "loss",
    ax: Axes | None = None,
) -> Axes:
    """Draw curves of a training run: every logged value pale, a running mean on top.

    Parameters
    ----------
    metrics
        Table with a column ``step``, or a run directory.
    keys
        Columns to draw; None = ``train/loss`` and, where there is one, ``val/loss``.
    labels
        Column -> text of the legend.

    Examples
    --------
    >>> table = pd.DataFrame({"step": [1, 2, 3], "train/loss": [3.0, 2.0, 1.5]})
    >>> training(table).get_xlabel()
    'optimizer step'
    """
    table = metrics if isinstance(metrics, pd.DataFrame) else read_metrics(metrics)
    wanted = keys if keys is not None else ("train/loss", "val/loss")
    present = [k for k in wanted if k in table and table[k].notna().any()]
    if not present:
        raise ValueError(
            f"no {' or '.join(wanted)} in the metrics; it has {', '.join(map(str, table))}"
        )
    ax = new_axes(ax, width=4.4, height=3.0)
    handles = []
    for number, name in enumerate(present):
        colour = _LINES[number % len(_LINES)]
        curve = table[["step", name]].dropna().sort_values("step")
        step, value = curve["step"].to_numpy(np.float64), curve[name].to_numpy(np.float64)
        if name.startswith("val/") or len(value) < 12:
            ax.plot(step, value, color=colour, linewidth=1.4, marker="o", markersize=3.5)
        else:
            ax.plot(step, value, color=colour, linewidth=0.7, alpha=0.3)
            window = max(3, len(value) // 12)
            smooth = pd.Series(value).rolling(window, center=True, min_periods=1).mean()
            ax.plot(step, smooth.to_numpy(), color=colour, linewidth=1.7)
        text = (labels or {}).get(name, name.replace("/", " ").replace("_", " "))
        handles.append(Line2D([], [], color=colour, linewidth=1.7, label=text))
    _scale_of_values(ax, table[present])
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(unit)
    few_ticks(ax, "x")
    thousands(ax)
    tidy(ax, grid="y", title=title)
    key(ax, handles, loc="best", labelcolor=INK)
    return ax


def _scale_of_values(ax: Axes, table: pd.DataFrame) -> None:
    """Logarithmic where all are training losses, positive, over more than a decade."""
    if not all(str(name).startswith("train/") for name in table.columns):
        return
    values = table.to_numpy(np.float64)
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() / values.min() > 10:
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())


def training_panels(metrics: pd.DataFrame) -> Figure | None:
    """Return loss, its parts and the validation scores side by side; None where nothing is."""
    parts = [
        name
        for name in metrics.columns
        if name.startswith("train/") and name.removeprefix("train/") not in _NOT_A_LOSS
    ]
    validation = [n for n in metrics.columns if n.startswith("val/") and n != "val/loss"]
    panels = [
        ("Loss", [n for n in ("train/loss", "val/loss") if n in metrics], "loss"),
        ("Parts of the loss", parts[:6], "value before its weight"),
        ("Validation conditions", validation[:6], "score"),
    ]
    drawn = [p for p in panels if p[1] and metrics[p[1]].notna().to_numpy().any()]
    if not drawn:
        return None
    figure = new_figure(3.7 * len(drawn), 2.9)
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for ax, (title, names, unit) in zip(axes, drawn, strict=True):
        words = {n: n.split("/", 1)[1].replace("_", " ") for n in names}
        if title == "Loss":
            words = {"train/loss": "training", "val/loss": "validation"}
        training(metrics, keys=names, labels=words, title=title, unit=unit, ax=ax)
    return figure
