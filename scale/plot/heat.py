"""A table of numbers as a picture."""

from __future__ import annotations

import numpy as np
import pandas as pd

from scale.plot.canvas import (
    INK,
    QUIET,
    SMALL_POINTS,
    Axes,
    Figure,
    Normalize,
    heat_colours,
    ink_on,
    tidy,
)


def heat(
    table: pd.DataFrame,
    *,
    label: str,
    better: str = "higher",
    limits: tuple[float, float] | None = None,
    title: str,
    figure: Figure | None = None,
    ax: Axes,
) -> Axes:
    """Draw a table of numbers as a heat map with the numbers inside; darker is better.

    Parameters
    ----------
    limits
        Numbers of the palest and the darkest colour; None = those of the table.
    figure
        Gets a bar that explains the colours; None = no bar.
    """
    values = table.to_numpy(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if limits is not None:
        low, high = limits
    if high - low < 1e-12:
        high = low + 1.0
    scale = Normalize(low, high, clip=True)
    cmap = heat_colours() if better == "higher" else heat_colours().reversed()
    image = ax.imshow(values, cmap=cmap, norm=scale, aspect="auto")
    for i, j in np.ndindex(*values.shape):
        number = values[i, j]
        known = bool(np.isfinite(number))
        ax.text(
            j,
            i,
            f"{number:.2f}".replace("-0.00", "0.00") if known else "–",
            ha="center",
            va="center",
            fontsize=SMALL_POINTS - 0.5,
            color=ink_on(cmap(scale(number))[:3]) if known else INK,
        )
    ax.set_xticks(
        np.arange(table.shape[1]),
        list(table.columns),
        rotation=38,
        ha="right",
        rotation_mode="anchor",
    )
    ax.set_yticks(np.arange(table.shape[0]), list(table.index))
    tidy(ax, title=title)
    ax.tick_params(length=0, labelcolor=INK)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    if figure is None:
        return ax
    bar = figure.colorbar(image, ax=ax, shrink=0.85, aspect=24, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL_POINTS - 1, colors=QUIET, length=2)
    bar.set_label(label, fontsize=SMALL_POINTS, color=QUIET)
    return ax
