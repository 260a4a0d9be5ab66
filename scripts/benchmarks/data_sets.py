"""Cells for the data benchmarks: drawn fast, equal on every run, kept in a folder.

Set A is 300,000 cells of 2,000 genes with 350 non-zeros each (70 % of them 1), as many as variable
genes have; set B is 60,000 cells of the whole transcriptome, 62,710 genes with 1,481 non-zeros.
A cell is a multinomial draw of log-normal depth from a power law over genes in random order. Real
genes are correlated, so that bytes per cell of real data may differ by some 15 %.

Conditions are as in a drug screen: (cell line, drug, plate), log-normal in size, with one pool of
DMSO controls per line and plate; they are 2.3 % of all cells, as in Tahoe-100M. Cells stand sorted
by line and drug, the order in which cell-load reads best.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from scale.data.codec import compiled

CONTROL = "DMSO_TF"
TARGET_SUM = 10_000.0
COUNTS = "layers/counts"
_BLOCK_CELLS = 4096
_SIGMA_DEPTH = 0.45
_SIGMA_CONDITION = 0.6
_CONTROL_SHARE = 2_330_156 / 100_648_790
_LAYOUT = 3  # of the file: raise it and every folder makes its sets anew


@dataclass(frozen=True, slots=True)
class Design:
    """What a set is drawn from."""

    name: str
    num_cells: int
    num_genes: int
    num_lines: int
    num_treated: int
    exponent: float
    mean_depth: float
    num_plates: int = 2
    seed: int = 0

    def sized(self, num_cells: int, num_treated: int, num_lines: int = 1) -> Design:
        """Return the same with fewer cells and conditions, on one plate."""
        return replace(
            self, num_cells=num_cells, num_treated=num_treated, num_lines=num_lines, num_plates=1
        )


# 303 treated conditions and 8 control pools are 311 conditions
SET_A = Design("A", 300_000, 2_000, 4, 303, exponent=1.0, mean_depth=870.0)
SET_B = Design("B", 60_000, 62_710, 2, 52, exponent=1.08, mean_depth=3_945.0)


def make_h5ad(design: Design, folder: Path) -> Path:
    """Return an h5ad of the set: X = log1p of counts per 10,000, ``layers/counts`` = counts."""
    path = folder / f"{design.name}-{design.num_cells}.h5ad"
    stamp = path.with_suffix(".json")
    wanted = json.dumps({**asdict(design), "layout": _LAYOUT})
    if path.exists() and stamp.exists() and stamp.read_text() == wanted:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    counts, obs = draw_cells(design)
    names = [f"G{g:05d}" for g in range(design.num_genes)]
    cells = ad.AnnData(_normalised(counts), obs, pd.DataFrame(index=names), layers={})
    cells.layers["counts"] = counts
    cells.write_h5ad(path)
    stamp.write_text(wanted)
    return path


def make_dense_h5ad(source: Path) -> Path:
    """Return the set with X as a dense matrix in place of CSR, and no counts."""
    path = source.with_name(source.stem + "-dense.h5ad")
    if path.exists() and path.stat().st_mtime >= source.stat().st_mtime:
        return path
    cells = ad.read_h5ad(source)
    partial = path.with_suffix(".partial")
    ad.AnnData(cells.X.toarray(), cells.obs, cells.var).write_h5ad(partial)
    return partial.rename(path)


def draw_cells(design: Design) -> tuple[sp.csr_matrix, pd.DataFrame]:
    """Return counts (float32 CSR) and a table with drug, dose, cell_line and plate of each cell."""
    random = np.random.default_rng(design.seed)
    obs = _labels(design, random)
    order = random.permutation(design.num_genes)
    weight_G = (np.arange(design.num_genes) + 1.0) ** -design.exponent
    threshold_G, other_G = _alias_table((weight_G / weight_G.sum())[order])
    log_depth_N = random.normal(-(_SIGMA_DEPTH**2) / 2, _SIGMA_DEPTH, design.num_cells)
    depth_N = np.rint(design.mean_depth * np.exp(log_depth_N)).astype(np.int64) + 1
    blocks = []
    for start in range(0, design.num_cells, _BLOCK_CELLS):
        depth = depth_N[start : start + _BLOCK_CELLS]
        column = np.empty(depth.sum(), np.int32)
        value = np.empty(depth.sum(), np.float32)
        size = np.empty(len(depth), np.int64)
        seed = np.uint64((design.seed << 40) + start)
        filled = _draw(depth, threshold_G, other_G, seed, column, value, size)
        blocks.append((column[:filled].copy(), value[:filled].copy(), size))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate([b[2] for b in blocks]))])
    counts = sp.csr_matrix(
        (np.concatenate([b[1] for b in blocks]), np.concatenate([b[0] for b in blocks]), indptr),
        shape=(design.num_cells, design.num_genes),
    )
    return counts, obs


def describe(counts: sp.csr_matrix) -> dict[str, float]:
    """Return non-zeros per cell and the share of them that is 1."""
    return {
        "nonzeros_per_cell": counts.nnz / counts.shape[0],
        "share_of_ones": float((counts.data == 1).mean()),
    }


def read_counts(path: Path) -> sp.csr_matrix:
    """Return the counts of a set as :func:`make_h5ad` wrote it."""
    with h5py.File(path) as file:
        group = file[COUNTS]
        arrays = tuple(group[name][:] for name in ("data", "indices", "indptr"))
        return sp.csr_matrix(arrays, shape=tuple(group.attrs["shape"]))


def _normalised(counts: sp.csr_matrix) -> sp.csr_matrix:
    library_N = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    factor_M = np.repeat(TARGET_SUM / library_N, np.diff(counts.indptr))
    values = np.log1p(counts.data * factor_M).astype(np.float32)
    return sp.csr_matrix((values, counts.indices, counts.indptr), counts.shape)


def _labels(design: Design, random: np.random.Generator) -> pd.DataFrame:
    num_pools = design.num_lines * design.num_plates
    controls = np.full(num_pools, round(design.num_cells * _CONTROL_SHARE / num_pools))
    weight = random.lognormal(0, _SIGMA_CONDITION, design.num_treated)
    left = design.num_cells - controls.sum()
    edges = np.rint(np.cumsum(weight) / weight.sum() * left).astype(np.int64)
    treated = np.diff(edges, prepend=0)
    rows = []
    for number, size in enumerate([*controls, *treated]):
        drug, pool = divmod(number - num_pools, num_pools)
        line, plate = divmod(pool, design.num_plates)
        # no drug on two plates: (line, drug) is then a condition for cell-load too
        name = CONTROL if number < num_pools else f"drug{drug:03d}-{plate}"
        dose = 0.0 if number < num_pools else 0.5
        rows.append((f"CVCL_{line:04d}", name, f"plate{plate + 1}", dose, int(size)))
    table = pd.DataFrame(rows, columns=["cell_line", "drug", "plate", "dose", "size"])
    table = table.sort_values(["cell_line", "drug", "plate"])
    obs = table.loc[table.index.repeat(table["size"])].drop(columns="size")
    obs.index = pd.Index([f"cell{i:07d}" for i in range(len(obs))])
    texts = ["cell_line", "drug", "plate"]
    return obs.astype(dict.fromkeys(texts, "category"))


def _alias_table(
    probability_G: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
    """Return Vose's table: gene g stays where 32 random bits are below its threshold."""
    num_genes = len(probability_G)
    scaled = probability_G * num_genes
    other_G = np.arange(num_genes, dtype=np.int32)
    keep_G = np.ones(num_genes)
    small = list(np.flatnonzero(scaled < 1.0))
    large = list(np.flatnonzero(scaled >= 1.0))
    while small and large:
        low, high = small.pop(), large[-1]
        keep_G[low], other_G[low] = scaled[low], high
        scaled[high] -= 1.0 - scaled[low]
        if scaled[high] < 1.0:
            small.append(large.pop())
    return (keep_G * (2**32 - 1)).astype(np.uint32), other_G


@compiled
def _draw(
    depth_N: npt.NDArray[np.int64],
    threshold_G: npt.NDArray[np.uint32],
    other_G: npt.NDArray[np.int32],
    seed: np.uint64,
    column_M: npt.NDArray[np.int32],
    value_M: npt.NDArray[np.float32],
    size_N: npt.NDArray[np.int64],
) -> int:
    num_genes = len(threshold_G)
    count_G = np.zeros(num_genes, np.int32)
    filled = 0
    for n in range(len(depth_N)):
        state = (seed + np.uint64(n)) * np.uint64(0xD1342543DE82EF95)
        for _ in range(depth_N[n]):
            state += np.uint64(0x9E3779B97F4A7C15)  # splitmix64
            x = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
            gene = np.int64(((x >> np.uint64(32)) * np.uint64(num_genes)) >> np.uint64(32))
            if (x & np.uint64(0xFFFFFFFF)) > threshold_G[gene]:
                gene = np.int64(other_G[gene])
            count_G[gene] += 1
        begin = filled
        for gene in range(num_genes):
            if count_G[gene]:
                column_M[filled] = gene
                value_M[filled] = count_G[gene]
                count_G[gene] = 0
                filled += 1
        size_N[n] = filled - begin
    return filled
