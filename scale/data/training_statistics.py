"""Mean and principal components of a sample of training cells, and some of the cells themselves.

The model starts from the mean and pairs cells in the space of the components, and latent cells have
the scale of those of the sample; all are made once, before the first step, and saved with the
weights.

Shapes: N = cells of the sample, K = those of them that are kept, G = genes, P = principal
components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.sparse as sp

from scale.data.draws import draw_distinct
from scale.data.loader import Normalisation
from scale.data.store import CellSetStore
from scale.draws import derive

NUM_KEPT_CELLS = 256

STATISTICS = 6
"""Purpose of the random draw of the sample."""


@dataclass(frozen=True, slots=True)
class TrainingStatistics:
    """Mean per gene, principal components as columns, some cells; float32, as in a batch."""

    mean_G: npt.NDArray[np.float32]
    basis_GP: npt.NDArray[np.float32]
    cells_KG: npt.NDArray[np.float32]
    """At most 256 of the sample, evenly over its conditions."""


def sample_cells(
    store: CellSetStore,
    conditions: Sequence[int],
    how: Normalisation,
    *,
    max_cells: int,
    seed: int,
) -> sp.csr_matrix:
    """Return values [N, G] (float64) of a keyed sample of the cells of some conditions."""
    size = store.conditions["num_cells"].to_numpy(np.int64)[list(conditions)]
    end = np.cumsum(size)
    chosen = np.empty(min(max_cells, int(end[-1])), np.int64)
    key = np.uint64(derive(seed, STATISTICS))
    draw_distinct(int(end[-1]), key, np.empty(0, np.int64), chosen)
    chosen.sort()
    place = np.searchsorted(end, chosen, side="right")
    blocks = []
    for i in np.unique(place).tolist():
        cells = store.read(conditions[i], chosen[place == i] - (end[i] - size[i]))
        scale = np.repeat(how.target_sum / cells.library_N, np.diff(cells.indptr_P))
        value = np.log1p(cells.counts_M * scale) / how.value_scale
        shape = (cells.num_cells, store.num_genes)
        blocks.append(sp.csr_matrix((value, cells.indices_M, cells.indptr_P), shape=shape))
    values: sp.csr_matrix = sp.vstack(blocks, format="csr")
    if how.projection is None:
        return values
    # the projection sends genes that are not wanted to a column behind the last
    column = how.projection.column.numpy()
    shape = (store.num_genes, how.projection.num_columns + 1)
    move = sp.csr_matrix((np.ones(len(column)), (np.arange(len(column)), column)), shape=shape)
    return (values @ move).tocsr()[:, :-1]


def principal_components(values: sp.csr_matrix, num_components: int) -> TrainingStatistics:
    """Return mean and leading principal components of cells in rows.

    Each component's sign makes its largest entry positive. Where cells or genes do not carry so
    many, the last components are zero.
    """
    num_cells, num_genes = values.shape
    mean_G = np.asarray(values.mean(axis=0)).ravel()
    side = min(num_cells, num_genes)
    kept = min(num_components, side)
    is_by_gene = num_genes <= num_cells
    if is_by_gene:
        dense_NG = values.toarray() - mean_G
        square = dense_NG.T @ dense_NG
    else:
        # Gram matrix of centred cells, without making them dense
        dot_N = values @ mean_G
        square = (values @ values.T).toarray() - dot_N[:, None] - dot_N[None] + mean_G @ mean_G
    eigenvalue_P, vector = scipy.linalg.eigh(square, subset_by_index=(side - kept, side - 1))
    eigenvalue_P, vector = eigenvalue_P[::-1], vector[:, ::-1]
    is_real_P = eigenvalue_P > 1e-9 * max(eigenvalue_P[0], 1e-30)
    if is_by_gene:
        basis_GP = vector
    else:
        basis_GP = values.T @ vector - np.outer(mean_G, vector.sum(axis=0))
        basis_GP /= np.sqrt(np.where(is_real_P, eigenvalue_P, 1.0))
    largest_P = basis_GP[np.abs(basis_GP).argmax(axis=0), np.arange(kept)]
    basis_GP = basis_GP * np.where(largest_P < 0, -1.0, 1.0) * is_real_P
    full_GP = np.zeros((num_genes, num_components), np.float32)
    full_GP[:, :kept] = basis_GP
    row_K = np.linspace(0, num_cells - 1, min(num_cells, NUM_KEPT_CELLS)).astype(np.int64)
    cells_KG = values[row_K].toarray().astype(np.float32)
    return TrainingStatistics(mean_G.astype(np.float32), full_GP, cells_KG)
