"""The one pass over the values of an input, and what is compared of two inputs' values.

Apart from the checks of labels and genes, which read no cell.

Shapes: N = cells, G = genes, M = stored values.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b, sha256

import numpy as np
import scipy.sparse as sp

from scale.evaluate.cells import Rows
from scale.evaluate.checks import CellTable
from scale.evaluate.statistics import Floats

_HIGHEST_LOG = 15.0
"""log1p of counts per 3.3 million: no normalised value reaches it."""
_TOTALS_TOLERANCE = 0.10
_TOTALS_TOLERANCE_TREATED = 1.0


@dataclass(frozen=True, slots=True)
class Checked:
    """What the pass over the values of an input found.

    Parameters
    ----------
    total_N
        Sum of expm1 of the values of each cell, in counts; NaN for cells that were not read.
    sha256
        Over values and labels of the cells that were read.
    """

    total_N: Floats
    sha256: str


def check_values(table: CellTable, rows: Rows, *, target_sum: float | None) -> Checked:
    """Read the cells ``rows`` once and refuse what is no log1p of normalised counts.

    Parameters
    ----------
    table
        Input; only ``rows`` of it are read, a few at a time.
    rows
        Row numbers, ascending.
    target_sum
        The input holds counts, which are normalised to this when they are read; None = it holds
        log values.

    Raises
    ------
    ValueError
        For values that are not finite, negative, all 0, or of another kind than expected.
    """
    total_N = np.full(table.values.shape[0], np.nan)
    digests = [sha256() for _ in range(3)]
    lowest, highest, num_negative, whole, stored = 0.0, 0.0, 0, True, 0
    for part in table.values.pieces(rows):
        raw = table.values.stored(part)
        data = raw.data
        if not np.isfinite(data).all():
            _place_not_finite(table, part, raw)
        if data.size:
            lowest, highest = min(lowest, float(data.min())), max(highest, float(data.max()))
            num_negative += int((data < 0).sum())
            whole = whole and bool((data == np.rint(data)).all())
        stored += data.size
        arrays = (np.diff(raw.indptr).astype(np.int64), raw.indices.astype(np.int64), data)
        for digest, array in zip(digests, arrays, strict=True):
            digest.update(np.ascontiguousarray(array).data)
        if highest < _HIGHEST_LOG or target_sum is not None:
            total_N[part] = _totals(table.values.normalised(raw))
    if stored == 0:
        raise ValueError(f"{table.name}: all values are 0; expected log1p of normalised counts")
    if lowest < 0:
        share = num_negative / (len(rows) * table.values.shape[1])
        raise ValueError(
            f"{table.name}: {share:.2%} of the values are negative, down to {lowest:.3g}; expected "
            "log1p values >= 0: clip the output at 0, or end the model in a ReLU"
        )
    _check_kind(table.name, highest, whole=whole, target_sum=target_sum)
    for labels in (table.context[rows], table.perturbation[rows]):
        digests[0].update("\n".join(labels).encode())
    return Checked(total_N, sha256(b"".join(d.digest() for d in digests)).hexdigest())


def _totals(values: sp.csr_matrix) -> Floats:
    values.data = np.expm1(values.data)
    return np.asarray(values @ np.ones(values.shape[1]))


def _place_not_finite(table: CellTable, part: Rows, raw: sp.csr_matrix) -> None:
    place = int(np.flatnonzero(~np.isfinite(raw.data))[0])
    cell = part[int(np.searchsorted(raw.indptr, place, side="right")) - 1]
    raise ValueError(
        f"{table.name}: cell {table.cell_names[cell]!r}, gene "
        f"{table.genes[int(raw.indices[place])]!r} is {raw.data[place]}; expected finite values"
    )


def _check_kind(name: str, highest: float, *, whole: bool, target_sum: float | None) -> None:
    """Refuse counts for logs, and logs for counts."""
    if target_sum is not None:
        if not whole and highest < _HIGHEST_LOG:
            raise ValueError(
                f"{name}: X holds fractions up to {highest:.2f}, as log1p values do, but "
                f"protocol.normalize={target_sum:g} takes counts in every file; give counts, or "
                "leave normalize out"
            )
        return
    if whole:
        raise ValueError(
            f"{name}: X holds integers up to {highest:.0f}, so counts; expected log1p of counts "
            "per a target sum: protocol.normalize=10000 does it for every file, if all hold counts"
        )
    if highest >= _HIGHEST_LOG:
        raise ValueError(
            f"{name}: X reaches {highest:.1f}, so it is not log1p of normalised counts; "
            "protocol.normalize=10000 takes counts, if every file holds them"
        )


def check_totals(
    observed: CellTable, checked: Checked, other: CellTable, checked_other: Checked, control: str
) -> str | None:
    """Refuse an input normalised to another target sum, or scaled; return a warning or None.

    Control cells of the contexts that both have are compared, since those must agree; else treated
    cells, with a wide tolerance, since a perturbation may move the total of a gene subset: within
    it, a difference is a warning. Other contexts are left out: cut to some genes, two cell lines
    need not add up to the same.

    Raises
    ------
    ValueError
        With both totals.
    """
    shared = np.intersect1d(observed.context, other.context)
    groups: list[list[Floats]] = [[], []]
    for table, total_N in ((observed, checked.total_N), (other, checked_other.total_N)):
        is_read = np.isfinite(total_N) & np.isin(table.context, shared)
        is_control = table.perturbation == control
        groups[0].append(total_N[is_read & is_control])
        groups[1].append(total_N[is_read & ~is_control])
    controls, treated = (all(len(total_N) for total_N in group) for group in groups)
    if not (controls or treated):
        return None
    what = "control cells" if controls else "treated cells"
    found = groups[0] if controls else groups[1]
    totals = [float(np.median(total_N)) for total_N in found]
    low, high = min(totals), max(totals)
    if high <= low * (1 + _TOTALS_TOLERANCE):
        return None
    told = (
        f"{other.name}: the {what} add up to {totals[1]:.0f} counts after expm1 (median), "
        f"those of observed to {totals[0]:.0f}"
    )
    if controls or high > low * (1 + _TOTALS_TOLERANCE_TREATED):
        raise ValueError(
            f"{told}; normalise both to one target sum, and undo any scaling of the log values"
        )
    return f"{told}; it may have been normalised to another target sum"


def num_other_cells(cells: sp.csr_matrix, known: sp.csr_matrix) -> int:
    """Return how many rows of one matrix are no row of another; each row answers for one only."""
    missing = Counter(_row_hashes(cells))
    missing.subtract(Counter(_row_hashes(known)))
    return sum(count for count in missing.values() if count > 0)


def _row_hashes(cells: sp.csr_matrix) -> list[bytes]:
    hashes = []
    for start, stop in zip(cells.indptr[:-1], cells.indptr[1:], strict=True):
        digest = blake2b(cells.indices[start:stop].astype(np.int64).tobytes(), digest_size=16)
        digest.update(cells.data[start:stop].tobytes())
        hashes.append(digest.digest())
    return hashes


def are_identical(cells: sp.csr_matrix) -> bool:
    """Return whether all cells are the same."""
    length_N = np.diff(cells.indptr)
    if cells.shape[0] < 2 or (length_N != length_N[0]).any():
        return False
    return all(
        bool((block == block[0]).all())
        for block in (a.reshape(cells.shape[0], length_N[0]) for a in (cells.indices, cells.data))
    )
