"""From the values of a matrix to counts: checks, the place of the counts, recovery from log1p.

Counts are never guessed. A matrix is counts if every value is a whole number; where it holds
log1p of normalised counts instead, those are recovered exactly or the file is refused.

Shapes: N = cells of a block, M = stored values of a block.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from scale.config import CountsPolicy
from scale.data.ingest.kernels import UNSORTED, find_duplicate, to_counts
from scale.data.ingest.source import SourceFile
from scale.draws import derive
from scale.types import SourceError

logger = logging.getLogger(__name__)

MAX_COUNT = 1 << 24
"""The last whole number up to which float32 holds every one."""
REQUIRED_SHARE = 0.999
"""Of the cells of a file must be recovered, or the file is refused."""
SAMPLE_CELLS = 4096
"""Cells that are looked at from the first on; as many more are spread over the file."""
_RUN_CELLS = 256
_MAX_SMALLEST = 8
_TOLERANCE = 1e-3
_NUMBERS = "biuf"
"""Kinds of NumPy types that a matrix of counts, or of their logarithms, may have."""


@dataclass(frozen=True, slots=True)
class CountsPlace:
    """Where the counts of all files are, and whether they must be recovered.

    Parameters
    ----------
    location
        ``X``, ``layers/NAME`` or ``raw/X``.
    is_recovered
        The matrix holds log1p of normalised counts.
    target_sum
        Total that the matrix was normalised to, where total counts per cell are known from a
        column; else None.
    """

    location: str
    is_recovered: bool
    target_sum: float | None = None


@dataclass(frozen=True, slots=True)
class RecoveredCounts:
    """Counts of a block; rows under a False ``is_exact_N`` could not be recovered and are empty."""

    counts: sp.csr_matrix
    is_exact_N: npt.NDArray[np.bool_]
    scale_N: npt.NDArray[np.float64]
    """Normalised value of one count, per cell; NaN for empty or refused cells."""


def find_counts(
    file: SourceFile,
    requested: str,
    policy: CountsPolicy,
    library_N: npt.NDArray[np.float64] | None,
    *,
    sample_cells: int = SAMPLE_CELLS,
) -> CountsPlace:
    """Return where the counts of a file are.

    Parameters
    ----------
    file
        An open h5ad.
    requested
        ``auto`` or a location. ``auto`` takes the first of layers/counts, raw/X and X that holds
        whole numbers, else the first of them from which counts can be recovered. A matrix of a
        format that knows nothing but counts is taken unseen; its values are checked as they come.
    policy
        Whether recovery is allowed.
    library_N
        Total counts per cell of the whole file, if a column has them.
    sample_cells
        Cells that are looked at to see whether values are whole; every value is checked when it is
        read.

    Raises
    ------
    SourceError
        If no matrix holds counts; the message says what the matrix looks like instead.
    """
    known = [name for name in file.locations() if file.matrix(name).is_counts]
    if known and requested in ("auto", *known):
        return CountsPlace(known[0] if requested == "auto" else requested, is_recovered=False)
    habitual = [name for name in file.locations() if name in ("layers/counts", "raw/X", "X")]
    candidates = habitual if requested == "auto" else [requested]
    if not candidates:
        raise SourceError(f"{file.name} has neither layers/counts, raw/X nor X; set counts")
    for location in candidates:
        if all(_is_whole(block.data) for _, block in _sample(file, location, sample_cells)):
            return CountsPlace(location, is_recovered=False)
    location = candidates[-1]
    if policy is CountsPolicy.require:
        raise SourceError(
            f"{file.name}: {location} is not counts ({_describe(file, location)}) and "
            "counts_policy is require; set counts to a matrix of counts, or counts_policy=recover"
        )
    shares = {}
    for location in candidates:
        share, target_sum = _try_recovery(file, location, library_N)
        if share >= REQUIRED_SHARE:
            if library_N is None:
                _warn_if_cut(file, location)
            return CountsPlace(location, is_recovered=True, target_sum=target_sum)
        shares[location] = share
    location = max(shares, key=lambda name: shares[name])
    if file.matrix(location).dtype.kind in _NUMBERS:
        for start, block in _sample(file, location):
            if not np.isfinite(block.data).all() or block.data.min(initial=0) < 0:
                _refuse_value(file, location, start + np.arange(block.shape[0]), block)
    hint = "" if library_N is None else ", or check that columns.library fits the matrix"
    raise SourceError(
        f"{file.name}: {location} is not counts ({_describe(file, location)}) and counts could be "
        f"recovered for {100 * shares[location]:.1f} % of cells, {100 * REQUIRED_SHARE:g} % are "
        f"needed; set counts to a matrix of counts{hint}"
    )


def check_counts(
    file: SourceFile, location: str, row_N: npt.NDArray[np.int64], block: sp.csr_matrix
) -> sp.csr_matrix:
    """Return a block, of the rows ``row_N``, with sorted rows and uint32 counts above 0.

    Raises
    ------
    SourceError
        If a value is negative, not finite, not whole or above ``MAX_COUNT``, or an entry stands
        twice in a row; the message names file, row, gene and value.
    """
    data_M = block.data
    if data_M.dtype.kind not in _NUMBERS:
        raise SourceError(f"{file.name}: {location} holds {data_M.dtype}; expected numbers")
    count_M = np.empty(len(data_M), dtype=np.uint32)
    if to_counts(data_M, float(MAX_COUNT), count_M) >= 0:
        _refuse_value(file, location, row_N, block)
    counts = sp.csr_matrix((count_M, block.indices, block.indptr), shape=block.shape)
    return _sorted_rows(file, location, row_N, counts)


def recover_counts(
    block: sp.csr_matrix,
    library_N: npt.NDArray[np.float64] | None = None,
    target_sum: float | None = None,
) -> RecoveredCounts:
    """Return the counts behind log1p of normalised counts.

    In a cell every y = expm1(x) is a count times one scale s. The smallest y is taken for 1, 2,
    ... 8 counts in turn, and the first s under which every y / s is whole within 1e-3 is accepted.
    A cell whose counts share a factor comes out divided by it, which leaves its normalised values
    as they are; with ``library_N`` and ``target_sum`` = s * library the factor is found too.

    float16 is refused by the same test: its steps are too coarse for whole ratios.
    """
    num_cells = block.shape[0]
    size_N = np.diff(block.indptr)
    filled = np.flatnonzero(size_N)
    scale_N = np.full(num_cells, np.nan)
    with np.errstate(over="ignore"):
        y_M = np.expm1(block.data.astype(np.float64))
    y_M[~np.isfinite(y_M)] = -1.0  # refuses the cell, as a negative value does
    # Counts of thousands are beyond the steps of float32 values; their tolerance grows with them.
    relative = 4.0 * float(np.finfo(block.dtype if block.dtype.kind == "f" else np.float64).eps)
    if len(filled):
        starts = block.indptr[filled].astype(np.int64)
        smallest = np.minimum.reduceat(y_M, starts)
        open_cells = (smallest > 0) & (block.dtype != np.float16)
        for k in range(1, _MAX_SMALLEST + 1):
            if not open_cells.any():
                break
            scale = np.where(smallest > 0, smallest, 1.0) / k
            ratio_M = y_M / np.repeat(scale, size_N[filled])
            excess_M = np.abs(ratio_M - np.rint(ratio_M)) - relative * ratio_M
            accepted = open_cells & (np.maximum.reduceat(excess_M, starts) < _TOLERANCE)
            scale_N[filled[accepted]] = scale[accepted]
            open_cells &= ~accepted
    if library_N is not None and target_sum is not None:
        factor_N = scale_N * library_N / target_sum
        with np.errstate(invalid="ignore"):
            fits_N = (factor_N > 0.5) & (np.abs(factor_N - np.rint(factor_N)) < _TOLERANCE)
            scale_N = np.where(fits_N, scale_N / np.rint(factor_N), np.nan)
    is_exact_N = np.isfinite(scale_N) | (size_N == 0)
    keep_M = np.repeat(is_exact_N, size_N)
    scale_M = np.repeat(np.where(is_exact_N, scale_N, 1.0), size_N)
    counts = block.astype(np.float64)
    counts.data = np.where(keep_M, np.rint(y_M / scale_M), 0.0)
    return RecoveredCounts(counts, is_exact_N, scale_N)


# --- parts --------------------------------------------------------------------------------------


def _is_whole(data_M: npt.NDArray[Any]) -> bool:
    if data_M.dtype.kind not in _NUMBERS:
        return False
    return bool(np.all(data_M >= 0) and np.all(np.isfinite(data_M)) and np.all(_is_rint(data_M)))


def _is_rint(data_M: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    if data_M.dtype.kind != "f":
        return np.ones(len(data_M), dtype=bool)
    return np.asarray(np.rint(data_M) == data_M)


def _sample(
    file: SourceFile, location: str, num_cells: int = SAMPLE_CELLS
) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Yield the first cells of a file, and as many in runs spread over it."""
    run = _RUN_CELLS
    starts = [*range(0, min(num_cells, file.num_cells), run)]
    if file.num_cells > num_cells:
        # Keyed by the number of cells: a sample that repeats on the same file.
        starts += [
            derive(file.num_cells, i) % (file.num_cells - run + 1) for i in range(num_cells // run)
        ]
    for start in starts:
        yield start, file.rows(location, start, min(start + run, file.num_cells))


def _try_recovery(
    file: SourceFile, location: str, library_N: npt.NDArray[np.float64] | None
) -> tuple[float, float | None]:
    """Return the share of sampled cells that can be recovered, and the target sum if known."""
    if file.matrix(location).dtype.kind not in _NUMBERS:
        return 0.0, None
    scales, libraries, exact = [], [], []
    for start, block in _sample(file, location):
        recovered = recover_counts(block)
        exact.append(recovered.is_exact_N)
        scales.append(recovered.scale_N)
        if library_N is not None:
            libraries.append(library_N[start : start + block.shape[0]])
    if library_N is None:
        return float(np.concatenate(exact).mean()), None
    # Most cells have no common factor, so that the median of s * library is the target sum.
    product = np.concatenate(scales) * np.concatenate(libraries)
    if not np.isfinite(product).any():
        return 0.0, None
    target_sum = float(np.nanmedian(product))
    share = np.concatenate(
        [
            recover_counts(block, library_N[start : start + block.shape[0]], target_sum).is_exact_N
            for start, block in _sample(file, location)
        ]
    ).mean()
    return float(share), target_sum


def _warn_if_cut(file: SourceFile, location: str) -> None:
    """Say so if the totals that the values were normalised to are those of other genes too."""
    with np.errstate(over="ignore"):
        totals = np.concatenate(
            [
                np.asarray(block.astype(np.float64).expm1().sum(axis=1)).ravel()
                for _, block in _sample(file, location)
            ]
        )
    totals = totals[totals > 0]
    if len(totals) and totals.max() > 1.01 * totals.min():
        logger.warning(
            "%s: the normalised values of %s do not sum to one total per cell (%.0f to %.0f), so "
            "that it was cut to some genes; give columns.library, or normalised values will "
            "differ from the source's",
            file.name,
            location,
            totals.min(),
            totals.max(),
        )


def _describe(file: SourceFile, location: str) -> str:
    """Return in a few words what the values of a matrix look like."""
    dtype = file.matrix(location).dtype
    if dtype.kind not in _NUMBERS:
        return f"values of type {dtype}"
    values = np.concatenate([block.data for _, block in _sample(file, location)])
    if not np.isfinite(values).all():
        return "it has values that are not finite"
    if (values < 0).any():
        return f"negative values, minimum {values.min():.3g}"
    return f"fractions in {dtype}, maximum {values.max():.3g}"


def _refuse_value(
    file: SourceFile, location: str, row_N: npt.NDArray[np.int64], block: sp.csr_matrix
) -> None:
    """Raise the error for the first value that is no count."""
    data_M = block.data
    with np.errstate(invalid="ignore"):
        is_bad_M = ~np.isfinite(data_M) | (data_M < 0) | (data_M > MAX_COUNT) | ~_is_rint(data_M)
    at = int(np.flatnonzero(is_bad_M)[0])
    value = data_M[at]
    if not np.isfinite(value):
        what = "not finite"
    elif value < 0:
        what = "negative"
    elif value > MAX_COUNT:
        what = f"above {MAX_COUNT:,}, the last count that float32 holds exactly"
    else:
        what = "not a whole number, although the cells looked at first are"
    raise SourceError(
        f"{_place(file, location, row_N, block, at)} is {value:g}: {what}; expected counts"
    )


def _sorted_rows(
    file: SourceFile, location: str, row_N: npt.NDArray[np.int64], counts: sp.csr_matrix
) -> sp.csr_matrix:
    """Return the rows with ascending columns and without stored zeros."""
    twice = find_duplicate(counts.indptr, counts.indices)
    if twice == UNSORTED:
        counts.sort_indices()
        twice = find_duplicate(counts.indptr, counts.indices)
    if twice >= 0:
        raise SourceError(
            f"{_place(file, location, row_N, counts, twice)} stands twice in its row; "
            "sum duplicates before writing (X.sum_duplicates())"
        )
    if len(counts.data) and counts.data.min() == 0:
        counts.eliminate_zeros()
    return counts


def _place(
    file: SourceFile, location: str, row_N: npt.NDArray[np.int64], block: sp.csr_matrix, at: int
) -> str:
    row = int(row_N[int(np.searchsorted(block.indptr, at, side="right")) - 1])
    gene = file.genes(location)[int(block.indices[at])]
    return f"{file.name}: {location}, row {row}, gene {gene!r}"
