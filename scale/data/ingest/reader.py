"""All input files as one stream of checked cells: counts, library, condition, batch.

``prepare`` walks the stream once or twice (the choice of genes needs a pass of its own); what is
left out on the way is counted by reason. Nothing here depends on how the stream is cut into blocks.

Shapes: N = cells of a block, G = genes of the source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from scale.config import ColumnsConfig, CountsPolicy
from scale.data.genes import GeneVocabulary
from scale.data.ingest.counts import (
    REQUIRED_SHARE,
    CountsPlace,
    check_counts,
    find_counts,
    recover_counts,
)
from scale.data.ingest.grouping import GroupedCells
from scale.data.ingest.kernels import keep_columns, sum_rows
from scale.data.ingest.scan import Scan
from scale.data.ingest.source import Source, SourceFile
from scale.types import SourceError

LEFT_OUT_BY_WHERE = "left out by where"
EMPTY_LIBRARY = "no counts"
NOT_RECOVERED = "counts not recovered"
MAX_LIBRARY = 2**32 - 1
"""Largest total that a store holds."""

Columns = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _FileFacts:
    """What the first look at a file found."""

    place: CountsPlace
    column_G: Columns
    """Position in the file of each gene of the vocabulary."""
    first_ordinal: int


class CountReader:
    """The stream of cells behind all sources.

    Parameters
    ----------
    sources
        In the order that numbers the cells.
    scan
        Takes the labels of every file on the way.
    columns, counts, policy
        Settings of ``prepare``.
    memory_bytes
        Bounds a block.
    block_cells
        Most cells of a block.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        scan: Scan,
        *,
        columns: ColumnsConfig,
        counts: str,
        policy: CountsPolicy,
        memory_bytes: int,
        block_cells: int,
    ) -> None:
        self.genes: GeneVocabulary
        self.num_cells = 0
        self.dropped: Counter[str] = Counter()
        """Cells left out by the latest pass, by reason."""
        self._sources = sources
        self._scan = scan
        self._columns = columns
        self._memory_bytes = memory_bytes
        self._block_cells = block_cells
        self._facts: list[_FileFacts] = []
        requested = counts
        for number, source in enumerate(sources):
            with source.open() as file:
                scan.add(file)  # first: mistakes in labels are cheap to find
                place = find_counts(file, requested, policy, self._library(file))
                if number == 0:
                    self.genes = _vocabulary(file, place.location)
                    requested = place.location
                self._check_same_place(file, place)
                column_G = self._align(file, place.location)
                self._facts.append(_FileFacts(place, column_G, self.num_cells))
                self.num_cells += file.num_cells

    @property
    def location(self) -> str:
        """Where the counts are."""
        return self._facts[0].place.location

    @property
    def is_recovered(self) -> bool:
        """Whether counts are recovered from log1p values."""
        return self._facts[0].place.is_recovered

    def blocks(
        self,
        gene_columns: Columns,
        is_wanted_C: npt.NDArray[np.bool_] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[GroupedCells]:
        """Yield all cells that are kept, with the counts of some genes and the library over all.

        Parameters
        ----------
        gene_columns
            Genes to keep as positions in :attr:`genes`, in the order they are wanted.
        is_wanted_C
            Per condition, whether its cells are wanted; None = all.
        progress
            Called with cells read and all cells.
        """
        self.dropped = Counter()
        for source, facts in zip(self._sources, self._facts, strict=True):
            with source.open() as file:
                yield from self._file_blocks(file, facts, gene_columns, is_wanted_C, progress)

    # --- one file -------------------------------------------------------------------------------

    def _file_blocks(
        self,
        file: SourceFile,
        facts: _FileFacts,
        gene_columns: Columns,
        is_wanted_C: npt.NDArray[np.bool_] | None,
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[GroupedCells]:
        codes = self._scan.codes(file)
        library_N = self._library(file)
        target_G = np.full(len(facts.column_G), -1, dtype=np.int32)
        target_G[facts.column_G[gene_columns]] = np.arange(len(gene_columns), dtype=np.int32)
        is_kept_N = codes.condition_N >= 0
        self.dropped[LEFT_OUT_BY_WHERE] += int((~is_kept_N).sum())
        if is_wanted_C is not None:
            is_kept_N &= np.append(is_wanted_C, False)[codes.condition_N]
        num_refused, num_tried = 0, int(is_kept_N.sum())
        step = self._rows_per_block(file, facts.place.location)
        for start in range(0, file.num_cells, step):
            stop = min(start + step, file.num_cells)
            row_N = start + np.flatnonzero(is_kept_N[start:stop])
            if len(row_N):
                block = file.rows(facts.place.location, start, stop)
                if len(row_N) < stop - start:
                    block = block[row_N - start]
                given_N = self._given_totals(file, row_N, library_N)
                counts, is_exact_N = self._counts(file, facts.place, row_N, block, given_N)
                num_refused += int((~is_exact_N).sum())
                total_N = _totals(file, row_N, counts, given_N)
                is_used_N = is_exact_N & (total_N > 0)
                self.dropped[EMPTY_LIBRARY] += int((is_exact_N & ~is_used_N).sum())
                used = np.flatnonzero(is_used_N)
                row_N = row_N[used]
                if len(used) < len(is_used_N):
                    counts = counts[used]
                yield GroupedCells(
                    codes.condition_N[row_N],
                    (row_N + facts.first_ordinal).astype(np.uint64),
                    codes.batch_N[row_N],
                    total_N[used].astype(np.uint32),
                    select_columns(counts, target_G, len(gene_columns)),
                )
            if progress is not None:
                progress(facts.first_ordinal + stop, self.num_cells)
        self.dropped[NOT_RECOVERED] += num_refused
        if num_refused > (1 - REQUIRED_SHARE) * num_tried:
            raise SourceError(
                f"{file.name}: counts could be recovered for "
                f"{100 * (1 - num_refused / num_tried):.1f} % of cells, {100 * REQUIRED_SHARE:g} % "
                "are needed; set counts to a matrix of counts"
            )

    def _counts(
        self,
        file: SourceFile,
        place: CountsPlace,
        row_N: Columns,
        block: sp.csr_matrix,
        given_N: Floats | None,
    ) -> tuple[sp.csr_matrix, npt.NDArray[np.bool_]]:
        """Return checked counts and which rows they are known for."""
        is_exact_N = np.ones(len(row_N), dtype=bool)
        if place.is_recovered:
            recovered = recover_counts(block, given_N, place.target_sum)
            block, is_exact_N = recovered.counts, recovered.is_exact_N
        return check_counts(file, place.location, row_N, block), is_exact_N

    def _rows_per_block(self, file: SourceFile, location: str) -> int:
        """Return how many rows a block may have so that it takes an eighth of the memory."""
        info = file.matrix(location)
        bytes_per_cell = max(1, info.num_bytes // file.num_cells) * 4  # with the copies on the way
        return max(1, min(self._block_cells, self._memory_bytes // 8 // bytes_per_cell))

    def _library(self, file: SourceFile) -> Floats | None:
        """Return total counts from the library column, if there is one."""
        name = self._columns.library
        if name is None:
            return None
        return np.rint(file.numbers(name, "columns.library"))

    def _given_totals(
        self, file: SourceFile, row_N: Columns, library_N: Floats | None
    ) -> Floats | None:
        """Return the library column for some rows, checked."""
        if library_N is None:
            return None
        given_N = library_N[row_N]
        bad = np.flatnonzero(~np.isfinite(given_N) | (given_N < 0) | (given_N > MAX_LIBRARY))
        if len(bad):
            raise SourceError(
                f"{file.name}: column {self._columns.library!r} (columns.library) is "
                f"{given_N[bad[0]]:g} in row {row_N[bad[0]]}; expected total counts"
            )
        return given_N

    # --- agreement between files ----------------------------------------------------------------

    def _check_same_place(self, file: SourceFile, place: CountsPlace) -> None:
        if self._facts and place.is_recovered != self.is_recovered:
            words = {True: "log1p values", False: "counts"}
            raise SourceError(
                f"{file.name}: {place.location} holds {words[place.is_recovered]}, but that of "
                f"{self._sources[0].name} holds {words[self.is_recovered]}; prepare them apart, or "
                "set counts to a matrix of counts that all files have"
            )

    def _align(self, file: SourceFile, location: str) -> Columns:
        """Return the position in a file of each gene; equal sets of genes are demanded."""
        names = file.genes(location)
        own = _vocabulary(file, location)
        alignment = self.genes.align(own.symbols)
        if alignment.missing or alignment.extra:
            raise SourceError(
                f"{file.name} has other genes than {self._sources[0].name}: {len(names):,} against "
                f"{len(self.genes):,}; {len(alignment.missing):,} missing"
                f"{_first(alignment.missing)}, {len(alignment.extra):,} more"
                f"{_first(alignment.extra)}. Cut both to the same genes"
            )
        return alignment.column_G


def select_columns(
    counts: sp.csr_matrix, target_G: npt.NDArray[np.int32], num: int
) -> sp.csr_matrix:
    """Return counts of some genes.

    Parameters
    ----------
    counts
        N x G, uint32 CSR.
    target_G
        New column of each gene; -1 = not wanted.
    num
        Columns of the result.
    """
    num_stored = len(counts.data)
    indptr = np.zeros(counts.shape[0] + 1, dtype=np.int64)
    indices_M, data_M = np.empty(num_stored, np.int32), np.empty(num_stored, np.uint32)
    keep_columns(counts.indptr, counts.indices, counts.data, target_G, indptr, indices_M, data_M)
    end = int(indptr[-1])
    chosen = sp.csr_matrix(
        (data_M[:end].copy(), indices_M[:end].copy(), indptr), shape=(counts.shape[0], num)
    )
    chosen.sort_indices()  # sorted already where the genes are in the order of the file
    return chosen


def choose_list(genes: GeneVocabulary, path: Path) -> Columns:
    """Return the positions of the genes of a list file, in the order of the file.

    Raises
    ------
    SourceError
        If the file is missing, names a gene twice, or names genes that the source does not have.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise SourceError(f"genes.file={path} cannot be read: {error}") from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    position = {name: i for i, name in enumerate(genes.symbols)}
    if genes.ensembl_ids is not None:
        position = {name: i for i, name in enumerate(genes.ensembl_ids)} | position
    unknown = [name for name in names if name not in position]
    if unknown or not names:
        raise SourceError(
            f"genes.file={path}: {len(unknown):,} of {len(names):,} genes are not in the source"
            f"{_first(unknown)}; expected one name of .var_names per line"
        )
    chosen = np.array([position[name] for name in names], dtype=np.int64)
    if len(np.unique(chosen)) < len(chosen):
        raise SourceError(f"genes.file={path} names a gene more than once; remove the repetition")
    return chosen


def _vocabulary(file: SourceFile, location: str) -> GeneVocabulary:
    ids = file.ensembl_ids(location)
    try:
        return GeneVocabulary(tuple(file.genes(location)), None if ids is None else tuple(ids))
    except SourceError as error:
        raise SourceError(f"{file.name}: {error}") from error


def _totals(
    file: SourceFile, row_N: Columns, counts: sp.csr_matrix, given_N: Floats | None
) -> npt.NDArray[np.int64]:
    """Return total counts per cell: over all genes of the matrix, or as a column gives them."""
    total_N: Columns = sum_rows(counts.indptr, counts.data)
    if given_N is None:
        return total_N
    bad = np.flatnonzero((given_N < total_N) & (given_N > 0))
    if len(bad):
        raise SourceError(
            f"{file.name}: columns.library is {given_N[bad[0]]:g} in row {row_N[bad[0]]}, whose "
            f"genes alone have {total_N[bad[0]]:,} counts; expected total counts over all genes"
        )
    return given_N.astype(np.int64)


def _first(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
