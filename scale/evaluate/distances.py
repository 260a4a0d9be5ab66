"""Distances between sets of cells, in principal components of cells that were not predicted.

Apart from the metrics of means because these look at whole distributions. The space is fitted on
training cells and input controls: fitted on the observed test cells, a repeated experiment would
score 13 % of the control's distance in place of 0 (measured on simulated data).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.linalg import eigh
from scipy.spatial.distance import cdist, pdist

from scale.evaluate.statistics import Floats

NUM_COMPONENTS = 50
NUM_DIRECTIONS = 128
_FIT_CELLS = 2_000


@dataclass(frozen=True, slots=True)
class Space:
    """Principal components of log1p expression."""

    mean_G: Floats
    basis_GK: Floats

    def project(self, cells: sp.csr_matrix) -> Floats:
        """Return the coordinates of cells, [cells, K]."""
        return np.asarray(cells @ self.basis_GK - self.mean_G @ self.basis_GK)


def fit_space(
    blocks: Sequence[sp.csr_matrix], generator: np.random.Generator, count: int = NUM_COMPONENTS
) -> Space:
    """Return the leading principal components of a sample of at most 2,000 cells of all blocks."""
    sizes = np.array([b.shape[0] for b in blocks])
    total = int(sizes.sum())
    chosen = np.sort(generator.permutation(total)[:_FIT_CELLS])
    block = np.searchsorted(np.cumsum(sizes), chosen, side="right")
    row = chosen - np.concatenate([[0], np.cumsum(sizes)])[block]
    parts = [blocks[b][row[block == b]] for b in np.unique(block)]
    cells = sp.vstack(parts, format="csr").toarray().astype(np.float64)
    mean_G = cells.mean(axis=0)
    cells -= mean_G
    num_cells, num_genes = cells.shape
    count = min(count, num_cells, num_genes)
    # The smaller of the two Gram matrices has the same leading eigenvectors.
    gram = cells.T @ cells if num_genes <= num_cells else cells @ cells.T
    size = len(gram)
    value_K, vector = eigh(gram, subset_by_index=[size - count, size - 1])
    if num_genes > num_cells:
        vector = cells.T @ vector
        vector /= np.maximum(np.linalg.norm(vector, axis=0), 1e-300)
    return Space(mean_G, np.ascontiguousarray(vector[:, np.argsort(-value_K)]))


def within_distance(points: Floats) -> float:
    """Return the mean distance of two different cells of one set."""
    return float(pdist(points).mean()) if len(points) > 1 else float("nan")


def energy_distance(
    x: Floats, y: Floats, within_x: float | None = None, within_y: float | None = None
) -> float:
    r"""Return the unbiased energy distance of two sets of points; about 0 for two of one law.

    .. math:: E = 2 \langle |x - y| \rangle - \langle |x - x'| \rangle_{x \ne x'}
              - \langle |y - y'| \rangle_{y \ne y'}

    with Euclidean norms. Pairs of a cell with itself are left out, so that the estimate may be
    below 0 and a small set is not punished for its size. Lower is better.

    Parameters
    ----------
    x, y
        Coordinates, [cells, K], usually from :meth:`Space.project`.
    within_x, within_y
        Results of :func:`within_distance`, where they are known already.

    Examples
    --------
    >>> energy_distance(np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]]))
    2.0
    """
    across = float(cdist(x, y).mean())
    within_x = within_distance(x) if within_x is None else within_x
    within_y = within_distance(y) if within_y is None else within_y
    return 2.0 * across - within_x - within_y


def spread(sets: Sequence[Floats]) -> float:
    """Return the median over sets of the median squared distance of two cells of one set."""
    medians = [float(np.median(pdist(x))) ** 2 for x in sets if len(x) > 1]
    return float(np.median(medians)) if medians else float("nan")


def _squared(x: Floats, y: Floats) -> Floats:
    """Squared distances of all pairs, by one product of matrices."""
    squared = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1) - 2.0 * (x @ y.T)
    return np.asarray(np.maximum(squared, 0.0))


def _similarity(x: Floats, y: Floats, scale: float) -> Floats:
    """Mean of four Gaussian kernels; the square of one is that of half its squared width."""
    widest = np.exp(_squared(x, y) / (-8.0 * scale))
    wide = widest * widest
    narrow = wide * wide
    return np.asarray((widest + wide + narrow + narrow * narrow) / 4.0)


def within_similarity(x: Floats, scale: float) -> float:
    """Return the mean similarity of two different cells of one set; NaN for one cell."""
    count = len(x)
    if count < 2:
        return float("nan")
    # a cell is like itself by exactly 1 but for rounding, and is left out
    similar = _similarity(x, x, scale)
    return float((similar.sum() - np.trace(similar)) / (count * (count - 1)))


def squared_mmd(
    x: Floats, y: Floats, scale: float, within_x: float | None = None, within_y: float | None = None
) -> float:
    r"""Return the unbiased squared maximum mean discrepancy of two sets; about 0 for one law.

    .. math:: \langle k(x, x') \rangle_{x \ne x'} + \langle k(y, y') \rangle_{y \ne y'}
              - 2 \langle k(x, y) \rangle, \quad k = \frac14 \sum_w e^{-|x - y|^2 / (2 w s)}

    with w = 1/2, 1, 2, 4 and s the ``scale``, a squared distance. Source: Gretton et al., JMLR 13
    (2012), eq. 3. Lower is better. As a share of the control's, summed over conditions, a control
    copy has 1 and a replicate 0. NaN where a set has one cell or the scale is 0.

    Examples
    --------
    >>> x = np.array([[0.0], [1.0]])
    >>> squared_mmd(x, x + 100.0, 1.0) > squared_mmd(x, x + 1.0, 1.0)
    True
    """
    if not scale > 0:
        return float("nan")
    within_x = within_similarity(x, scale) if within_x is None else within_x
    within_y = within_similarity(y, scale) if within_y is None else within_y
    return within_x + within_y - 2.0 * float(_similarity(x, y, scale).mean())


def random_directions(dimension: int, generator: np.random.Generator) -> Floats:
    """Return 128 unit vectors, [K, 128], even over the sphere."""
    direction_KD = generator.normal(size=(dimension, NUM_DIRECTIONS))
    return np.asarray(direction_KD / np.linalg.norm(direction_KD, axis=0))


def sliced_wasserstein(x: Floats, y: Floats, direction_KD: Floats) -> float:
    """Return the mean over directions of the Wasserstein-1 distance of the projected sets.

    Exact in each direction, for sets of any two sizes: the area between the quantile functions.
    Lower is better; 0 for equal sets only. It is not unbiased: a replicate has a value above 0 that
    falls with the square root of the number of cells, and a control copy that of the control cells.
    Source: Bonneel et al., J. Math. Imaging Vis. 51 (2015).

    Examples
    --------
    >>> sliced_wasserstein(np.array([[0.0], [1.0]]), np.array([[2.0]]), np.array([[1.0]]))
    1.5
    """
    x_DN, y_DM = np.sort((x @ direction_KD).T, axis=1), np.sort((y @ direction_KD).T, axis=1)
    if len(x) == len(y):
        return float(np.abs(x_DN - y_DM).mean())
    n, m = len(x), len(y)
    # in units of 1 / (n m) the steps of both quantile functions stand at whole numbers
    step = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    width = np.diff(step, prepend=0) / (n * m)
    gap = np.abs(x_DN[:, (step - 1) // m] - y_DM[:, (step - 1) // n])
    return float((gap @ width).mean())
