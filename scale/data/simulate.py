"""A semi-synthetic atlas with known truth, in the shape of a drug screen.

It stands in for data nobody can ship: cell lines x drugs (x doses), spread over plates with
controls on each, negative-binomial counts with log-normal library sizes, sub-populations that
respond differently, programmes shared by mechanism of action with a gain of their own in each
cell line, and a few inert drugs. Because the law of every condition is known, a claim about a
model can be checked against the truth. Nothing here is biological.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from scale.data.tahoe import DOSE_UNIT, write_tahoe_parquet
from scale.runtime import atomic_path

if TYPE_CHECKING:
    from anndata import AnnData

CONTROL = "DMSO_TF"
"""Label of the control, as in Tahoe-100M."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """What to simulate; the defaults make about 25,000 cells in a few seconds.

    Parameters
    ----------
    num_cells
        Cells in all, about: a quarter of them controls, the rest spread evenly.
    num_lines, num_drugs, num_plates, num_genes
        Cell lines, drugs, plates (a drug is on one plate, controls are on each), genes.
    doses
        Doses of every drug in uM; the response follows a Hill curve with its middle at 0.5 uM.
    num_mechanisms
        Mechanisms of action; drugs of one mechanism share a programme.
    num_inert
        Drugs without any effect.
    num_subpopulations
        States that a cell line mixes in proportions of its own.
    mean_library
        Median counts per cell.
    dispersion
        Size parameter of the negative binomial; smaller is noisier.
    context_share
        Share of the response's variance that is particular to (cell line, drug).
    seed
        Seed of everything.
    """

    num_cells: int = 25_000
    num_lines: int = 6
    num_drugs: int = 24
    num_plates: int = 2
    num_genes: int = 1_000
    doses: tuple[float, ...] = (5.0,)
    num_mechanisms: int = 8
    num_inert: int = 3
    num_subpopulations: int = 3
    mean_library: float = 2_500.0
    dispersion: float = 4.0
    context_share: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_inert >= self.num_drugs:
            raise ValueError(
                f"num_inert ({self.num_inert}) must be below num_drugs ({self.num_drugs})"
            )
        if self.num_cells < 20 * self.num_lines * self.num_drugs * len(self.doses):
            raise ValueError(
                f"num_cells ({self.num_cells}) leaves fewer than 15 cells per condition; use at "
                f"least {20 * self.num_lines * self.num_drugs * len(self.doses)}"
            )
        if self.num_genes < 100:
            raise ValueError(f"num_genes ({self.num_genes}) must be at least 100")


@dataclass(frozen=True, slots=True)
class Truth:
    """The law behind an atlas. L lines, P drugs, M sub-populations, G genes."""

    line_fraction_LMG: Floats
    """Expression of each sub-population of each line; rows sum to one."""
    proportion_LM: Floats
    """How a line mixes its sub-populations."""
    effect_LPG: Floats
    """Natural-log fold change of a responding cell at full dose."""
    responder_PM: Floats
    """Probability that a cell of a sub-population responds."""
    plate_effect_G: Floats
    """Natural-log factor per plate, [plates, G]."""
    mechanism_P: npt.NDArray[np.int64]
    """Mechanism of each drug; -1 = inert."""
    plate_P: npt.NDArray[np.int64]
    """Plate of each drug."""


@dataclass(frozen=True)
class Atlas:
    """Simulated cells with the law that made them.

    Parameters
    ----------
    config, truth
        How the cells were made.
    counts
        Cells x genes, integer counts (int32 CSR).
    obs
        One row per cell: drug, dose, dose_unit, cell_line, plate, subpopulation, responds.
    """

    config: SimulationConfig
    truth: Truth
    counts: sp.csr_matrix
    obs: pd.DataFrame

    @cached_property
    def genes(self) -> list[str]:
        """Gene symbols."""
        return [f"GENE{g:05d}" for g in range(self.config.num_genes)]

    @property
    def drugs(self) -> list[str]:
        """Drug names in order; the control is not among them."""
        return _drug_names(self.config)

    @property
    def lines(self) -> list[str]:
        """Cell line names in order."""
        return _line_names(self.config)

    def true_mean(self, line: str, drug: str | None, dose: float | None = None) -> Floats:
        """Return the expected expression fractions of a condition, shape [G], summing to one.

        Parameters
        ----------
        line, drug
            Names; drug None is the control.
        dose
            In uM; None = the highest dose of the atlas.
        """
        line_index = self.lines.index(line)
        proportion_M = self.truth.proportion_LM[line_index]
        base_MG = self.truth.line_fraction_LMG[line_index]
        if drug is None:
            return np.asarray(proportion_M @ base_MG)
        drug_index = self.drugs.index(drug)
        gain = _hill(max(self.config.doses) if dose is None else dose)
        factor_G = np.exp(gain * self.truth.effect_LPG[line_index, drug_index])
        shifted_MG = base_MG * factor_G
        shifted_MG /= shifted_MG.sum(axis=1, keepdims=True)
        response_M1 = self.truth.responder_PM[drug_index][:, None]
        return np.asarray(proportion_M @ (response_M1 * shifted_MG + (1 - response_M1) * base_MG))

    def to_anndata(self) -> AnnData:
        """Return the cells as AnnData: X holds counts (float32 CSR), obs the conditions."""
        from anndata import AnnData

        obs = self.obs.copy()
        for name in ("drug", "dose_unit", "cell_line", "plate"):
            obs[name] = obs[name].astype("category")
        return AnnData(
            X=self.counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=self.genes)
        )

    def part(self, lines: Sequence[str], drugs: Sequence[str], genes: Sequence[str]) -> AnnData:
        """Return the cells of some lines under some drugs, with their controls, and some genes.

        Parts of one atlas with other lines are atlases of their own that share programmes and
        mechanisms, as far as they share drugs and genes.

        Raises
        ------
        ValueError
            If a name is not in the atlas.
        """
        for names, known in ((lines, self.lines), (drugs, self.drugs), (genes, self.genes)):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"{unknown[0]!r} is not in the atlas; it has {known[0]!r}, ...")
        whole = self.to_anndata()
        is_here = whole.obs["cell_line"].isin(lines) & whole.obs["drug"].isin([*drugs, CONTROL])
        return whole[is_here.to_numpy(), list(genes)].copy()

    def write_h5ad(self, path: Path) -> None:
        """Write the cells as h5ad."""
        with atomic_path(path) as temporary:
            self.to_anndata().write_h5ad(temporary, compression="gzip", compression_opts=1)

    def write_split(self, path: Path, *, num_contexts: int = 2, dataset: str = "synthetic") -> None:
        """Write a few-shot split: most drugs of the last cell lines are held out.

        In each of the last ``num_contexts`` lines 12 % of the drugs are validation, 58 % are test
        and the rest are training, drawn anew per line. Every drug is seen in the other lines.
        """
        generator = np.random.default_rng([self.config.seed, 77])
        num_val = max(1, round(0.12 * len(self.drugs)))
        num_test = max(1, round(0.58 * len(self.drugs)))
        lines = [
            "[datasets]",
            f'{dataset} = "."',
            "",
            "[training]",
            f'{dataset} = "train"',
            "",
            "[zeroshot]",
        ]
        for line in self.lines[-num_contexts:]:
            drugs = [self.drugs[i] for i in generator.permutation(len(self.drugs))]
            val, test = sorted(drugs[:num_val]), sorted(drugs[num_val : num_val + num_test])
            lines += ["", f'[fewshot."{dataset}.{line}"]']
            lines += [f"val = {json.dumps(val)}", f"test = {json.dumps(test)}"]
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n")

    def write_tahoe_parquet(self, folder: Path, *, rows_per_file: int = 10_000) -> None:
        """Write the cells in the schema of the Tahoe-100M rows, with its metadata tables."""
        mechanism = {
            drug: "unclear" if number < 0 else f"mechanism {number}"
            for drug, number in zip(self.drugs, self.truth.mechanism_P.tolist(), strict=True)
        }
        write_tahoe_parquet(
            folder, self.counts, self.obs, self.genes, mechanism, rows_per_file=rows_per_file
        )


def simulate(config: SimulationConfig) -> Atlas:
    """Return an atlas: a pure function of ``config`` (and of NumPy's random streams).

    A cell of line l and sub-population m has expression fractions f_lm. If it responds to drug p
    at dose d, they are multiplied by exp(h(d) * effect_lp) and renormalised. Its counts are
    negative binomial with mean library * fraction * plate factor.

    Raises
    ------
    ValueError
        If the numbers of the config do not allow an atlas.

    Examples
    --------
    >>> atlas = simulate(SimulationConfig(num_cells=600, num_lines=2, num_drugs=5, num_genes=100))
    >>> atlas.counts.shape[1], sorted(atlas.obs["drug"].unique())[:2]
    (100, ['DMSO_TF', 'drug-00'])
    """
    generator = np.random.default_rng(config.seed)
    truth = _draw_truth(config, generator)
    blocks, tables = [], []
    for line, drug, dose, plate, size in _conditions(config, truth):
        counts, table = _draw_cells(config, truth, generator, line, drug, dose, plate, size)
        blocks.append(counts)
        tables.append(table)
    obs = pd.concat(tables, ignore_index=True)
    # A file in order of its conditions would hide mistakes of grouping from the tests.
    order = generator.permutation(len(obs))
    obs = obs.iloc[order].reset_index(drop=True)
    obs.index = pd.Index([f"cell-{i:06d}" for i in range(len(obs))])
    return Atlas(config, truth, sp.vstack(blocks, format="csr")[order], obs)


def _line_names(config: SimulationConfig) -> list[str]:
    return [f"LINE-{chr(ord('A') + i % 26)}{i // 26 or ''}" for i in range(config.num_lines)]


def _drug_names(config: SimulationConfig) -> list[str]:
    return [f"drug-{i:02d}" for i in range(config.num_drugs)]


def _hill(dose: float) -> float:
    return dose / (dose + 0.5)


def _sparse_effect(
    generator: np.random.Generator, num_genes: int, count: int, scale: float
) -> Floats:
    effect_G = np.zeros(num_genes)
    effect_G[generator.choice(num_genes, size=count, replace=False)] = generator.normal(
        0.0, scale, size=count
    )
    return effect_G


def _draw_truth(config: SimulationConfig, generator: np.random.Generator) -> Truth:
    lines, drugs, genes = config.num_lines, config.num_drugs, config.num_genes
    states = config.num_subpopulations
    # Power-law expression with line and sub-population programmes on top.
    base_G = generator.normal(0.0, 1.2, size=genes)
    line_LG = np.stack([_sparse_effect(generator, genes, genes // 4, 0.8) for _ in range(lines)])
    state_MG = np.stack([_sparse_effect(generator, genes, genes // 8, 0.9) for _ in range(states)])
    log_LMG = base_G + line_LG[:, None, :] + state_MG[None, :, :]
    fraction_LMG = np.exp(log_LMG)
    fraction_LMG /= fraction_LMG.sum(axis=-1, keepdims=True)

    mechanism_P = np.arange(drugs) % config.num_mechanisms
    mechanism_P[generator.choice(drugs, size=config.num_inert, replace=False)] = -1
    programme = [
        _sparse_effect(generator, genes, max(8, genes // 8), 1.0)
        for _ in range(config.num_mechanisms)
    ]
    gain_LK = np.exp(generator.normal(-0.1, 0.35, size=(lines, config.num_mechanisms)))
    effect_LPG = np.zeros((lines, drugs, genes))
    own_scale = float(np.sqrt(config.context_share))
    for p, k in enumerate(mechanism_P):
        if k < 0:
            continue
        strength = np.exp(generator.normal(0.0, 0.25))
        own_G = _sparse_effect(generator, genes, max(4, genes // 25), 0.8)
        own_G += _sparse_effect(generator, genes, 4, 2.0)
        for line in range(lines):
            context_G = _sparse_effect(generator, genes, max(4, genes // 8), own_scale)
            effect_LPG[line, p] = strength * (gain_LK[line, k] * (programme[k] + own_G) + context_G)
    responder_PM = np.where(generator.random((drugs, states)) < 0.6, 0.9, 0.08)
    responder_PM[responder_PM.max(axis=1) < 0.5, 0] = 0.9
    return Truth(
        line_fraction_LMG=fraction_LMG,
        proportion_LM=generator.dirichlet(np.full(states, 4.0), size=lines),
        effect_LPG=effect_LPG,
        responder_PM=responder_PM,
        plate_effect_G=generator.normal(0.0, 0.06, size=(config.num_plates, genes)),
        mechanism_P=mechanism_P,
        plate_P=np.arange(drugs) % config.num_plates,
    )


def _conditions(
    config: SimulationConfig, truth: Truth
) -> Iterator[tuple[int, int | None, float, int, int]]:
    """Yield (line, drug, dose, plate, cells) of every condition; drug None is the control."""
    controls = max(20, config.num_cells // 4 // (config.num_lines * config.num_plates))
    treated_conditions = config.num_lines * config.num_drugs * len(config.doses)
    treated = max(15, (config.num_cells * 3 // 4) // treated_conditions)
    for line in range(config.num_lines):
        for plate in range(config.num_plates):
            yield line, None, 0.0, plate, controls
        for drug in range(config.num_drugs):
            for dose in config.doses:
                yield line, drug, dose, int(truth.plate_P[drug]), treated


def _draw_cells(
    config: SimulationConfig,
    truth: Truth,
    generator: np.random.Generator,
    line: int,
    drug: int | None,
    dose: float,
    plate: int,
    size: int,
) -> tuple[sp.csr_matrix, pd.DataFrame]:
    state_C = generator.choice(config.num_subpopulations, size=size, p=truth.proportion_LM[line])
    fraction_CG = truth.line_fraction_LMG[line][state_C]
    responds_C = np.zeros(size, dtype=bool)
    if drug is not None and truth.mechanism_P[drug] >= 0:
        responds_C = generator.random(size) < truth.responder_PM[drug][state_C]
        factor_G = np.exp(_hill(dose) * truth.effect_LPG[line, drug])
        fraction_CG = np.where(responds_C[:, None], fraction_CG * factor_G, fraction_CG)
        fraction_CG /= fraction_CG.sum(axis=1, keepdims=True)
    fraction_CG = fraction_CG * np.exp(truth.plate_effect_G[plate])
    fraction_CG /= fraction_CG.sum(axis=1, keepdims=True)
    library_C1 = np.exp(generator.normal(np.log(config.mean_library), 0.3, size=(size, 1)))
    rate_CG = generator.gamma(config.dispersion, library_C1 * fraction_CG / config.dispersion)
    counts = sp.csr_matrix(generator.poisson(rate_CG).astype(np.int32))
    table = pd.DataFrame(
        {
            "drug": CONTROL if drug is None else _drug_names(config)[drug],
            "dose": dose,
            "dose_unit": DOSE_UNIT,
            "cell_line": _line_names(config)[line],
            "plate": f"plate{plate + 1}",
            "subpopulation": state_C,
            "responds": responds_C,
        }
    )
    return counts, table
