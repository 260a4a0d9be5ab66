"""Simulated screens for the quality benchmark, as stores with splits.

``fewshot``: the simulator of ``scale demo``, smaller: 500 genes, 6 lines x 24 drugs x 96 cells;
58 % of the drugs of the last two lines are held out, all are seen in the other lines.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from quality_runs import SPLIT, Dataset, make_dataset

from scale.data.simulate import CONTROL, Atlas, SimulationConfig, simulate

# 96 cells of a condition and 384 controls of a line and plate: whole sets of 32, since arc-state
# fills others by repeats. Counts per gene as in the demo's atlas.
SCREEN = SimulationConfig(num_cells=18_432, num_genes=500, mean_library=1_250.0)


def fewshot(seed: int, screen: SimulationConfig = SCREEN) -> Dataset:
    """Return a screen of which drugs of two lines are held out."""
    config = replace(screen, seed=seed)

    def write(folder: Path) -> list[str]:
        atlas = simulate(config)
        atlas.write_split(folder / SPLIT, num_contexts=2)
        return write_cells(atlas, folder)

    return make_dataset("fewshot", seed, asdict(config), write)


def write_cells(atlas: Atlas, folder: Path) -> list[str]:
    """Write the cells of an atlas and return the settings of ``prepare`` that read them."""
    atlas.write_h5ad(folder / "cells.h5ad")
    return screen_settings(folder / "cells.h5ad")


def screen_settings(cells: Path) -> list[str]:
    """Return the settings of ``prepare`` for an h5ad with the columns of a simulated screen."""
    return [
        *("source=h5ad", f"source.files=[{cells}]", "genes=all", f"control={CONTROL}"),
        *("columns.perturbation=drug", "columns.cell_type=cell_line", "columns.batch=plate"),
    ]
