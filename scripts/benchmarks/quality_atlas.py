"""Simulated screens for the quality benchmark, as stores with splits.

``fewshot``: the simulator of ``scale demo``, smaller: 500 genes, 6 lines x 24 drugs x 96 cells;
58 % of the drugs of the last two lines are held out, all are seen in the other lines.

``composition``: 20 donors x 12 drugs x 64 cells of two states, which donors mix in shares of .1 to
.9. A responding cell of either state follows one programme of the drug among many cells of the
first state and another one among few, whatever the cell itself is: only who takes the whole
population into account can tell. Five donors are held out entirely, two are for validation. Share
and profile of a donor are independent.

Shapes: D = donors, P = drugs, M = states, G = genes, C = cells.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from quality_runs import SPLIT, Dataset, make_dataset

from scale.data.simulate import CONTROL, SimulationConfig, simulate

Floats = npt.NDArray[np.float64]

# 96 cells of a condition and 384 controls of a line and plate: whole sets of 32, since arc-state
# fills others by repeats. Counts per gene as in the demo's atlas.
SCREEN = SimulationConfig(num_cells=18_432, num_genes=500, mean_library=1_250.0)


def fewshot(seed: int) -> Dataset:
    """Return a screen of which drugs of two lines are held out."""
    config = replace(SCREEN, seed=seed)

    def write(folder: Path) -> list[str]:
        atlas = simulate(config)
        atlas.write_split(folder / SPLIT, num_contexts=2)
        atlas.write_h5ad(folder / "cells.h5ad")
        return screen_settings(folder / "cells.h5ad")

    return make_dataset("fewshot", seed, asdict(config), write)


def screen_settings(cells: Path) -> list[str]:
    """Return the settings of ``prepare`` for an h5ad with the columns of a simulated screen."""
    return [
        *("source=h5ad", f"source.files=[{cells}]", "genes=all", f"control={CONTROL}"),
        *("columns.perturbation=drug", "columns.cell_type=cell_line", "columns.batch=plate"),
    ]


# --- responses that depend on the population ----------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbourhood:
    """What ``composition`` is drawn from; sizes of groups are whole sets of 32 cells."""

    num_donors: int = 20
    num_test: int = 5
    num_val: int = 2
    num_drugs: int = 12
    num_genes: int = 500
    treated: int = 64
    """Cells of a donor under a drug."""
    controls: int = 192
    """Control cells of a donor."""
    steepness: float = 10.0
    """Of the switch between the two programmes at a share of one half."""
    mean_library: float = 1_250.0
    dispersion: float = 4.0
    seed: int = 0


def composition(seed: int, design: Neighbourhood | None = None) -> Dataset:
    """Return a screen whose responses depend on the donor's mixture; whole donors are held out."""
    design = replace(design or Neighbourhood(), seed=seed)

    def write(folder: Path) -> list[str]:
        draw_neighbourhoods(design).write_h5ad(folder / "cells.h5ad")
        held = _donors(design)[-design.num_test - design.num_val :]
        parts = ["val"] * design.num_val + ["test"] * design.num_test
        lines = [f'"synthetic.{d}" = "{p}"' for d, p in zip(held, parts, strict=True)]
        head = ["[datasets]", 'synthetic = "."', "", "[training]", 'synthetic = "train"', ""]
        (folder / SPLIT).write_text("\n".join([*head, "[zeroshot]", *lines]) + "\n")
        return screen_settings(folder / "cells.h5ad")

    return make_dataset("composition", seed, asdict(design), write)


def draw_neighbourhoods(design: Neighbourhood) -> ad.AnnData:
    """Return counts; obs: drug, cell_line (the donor), plate, state, share (of the first state)."""
    random = np.random.default_rng(design.seed)
    base_G = random.normal(0.0, 1.2, design.num_genes)
    state_MG = np.stack([_programme(random, design.num_genes, 0.9) for _ in range(2)])
    donor_DG = np.stack(
        [0.3 * _programme(random, design.num_genes, 1.0) for _ in range(design.num_donors)]
    )
    programme_P2G = np.stack(
        [
            [_programme(random, design.num_genes, 1.0) for _ in range(2)]
            for _ in range(design.num_drugs)
        ]
    )
    # Evenly spread over training donors, and over those that are held out.
    num_held = design.num_test + design.num_val
    share_D = np.concatenate(
        [
            random.permutation(np.linspace(0.1, 0.9, count))
            for count in (design.num_donors - num_held, num_held)
        ]
    )
    blocks, tables = [], []
    for donor, name in enumerate(_donors(design)):
        weight = 1.0 / (1.0 + np.exp(-design.steepness * (share_D[donor] - 0.5)))
        for drug in (None, *range(design.num_drugs)):
            size = design.controls if drug is None else design.treated
            state_C = (random.random(size) >= share_D[donor]).astype(np.int64)
            log_CG = base_G + donor_DG[donor] + state_MG[state_C]
            if drug is not None:
                first_G, second_G = programme_P2G[drug]
                responds_C1 = random.random((size, 1)) < 0.9
                log_CG = log_CG + responds_C1 * (weight * first_G + (1.0 - weight) * second_G)
            blocks.append(_counts(random, log_CG, design))
            label = CONTROL if drug is None else f"drug-{drug:02d}"
            obs = {"drug": label, "cell_line": name, "plate": "plate1"}
            obs |= {"state": state_C, "share": share_D[donor]}
            tables.append(pd.DataFrame(obs))
    table = pd.concat(tables, ignore_index=True)
    table.index = pd.Index([f"cell-{number:06d}" for number in range(len(table))])
    genes = pd.DataFrame(index=[f"GENE{gene:05d}" for gene in range(design.num_genes)])
    return ad.AnnData(sp.vstack(blocks, format="csr"), table, genes)


def _donors(design: Neighbourhood) -> list[str]:
    return [f"DONOR-{number:02d}" for number in range(design.num_donors)]


def _programme(random: np.random.Generator, num_genes: int, scale: float) -> Floats:
    """Log fold changes of an eighth of the genes."""
    effect_G = np.zeros(num_genes)
    chosen = random.choice(num_genes, num_genes // 8, replace=False)
    effect_G[chosen] = random.normal(0.0, scale, len(chosen))
    return effect_G


def _counts(random: np.random.Generator, log_CG: Floats, design: Neighbourhood) -> sp.csr_matrix:
    """Negative binomial counts of log-normal depth."""
    fraction_CG = np.exp(log_CG)
    fraction_CG /= fraction_CG.sum(axis=1, keepdims=True)
    library_C1 = np.exp(random.normal(np.log(design.mean_library), 0.3, (len(log_CG), 1)))
    rate_CG = random.gamma(design.dispersion, library_C1 * fraction_CG / design.dispersion)
    return sp.csr_matrix(random.poisson(rate_CG), dtype=np.float32)
