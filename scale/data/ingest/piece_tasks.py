"""The two passes over the cells, piece by piece: moments of the genes, and the spill.

Shapes: C = conditions, G = genes of the source.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scale.config import GeneFlavor
from scale.data.genes import StreamingMoments
from scale.data.ingest.grouping import Buckets
from scale.data.ingest.inputs import hash_input, read_labels
from scale.data.ingest.opened import opened
from scale.data.ingest.packing import PackedCells
from scale.data.ingest.reader import Columns, Piece, PieceReader
from scale.data.ingest.spill import write_spill
from scale.data.ingest.workers import Report


@dataclass(frozen=True, slots=True)
class PassSettings:
    """What both passes share.

    Parameters
    ----------
    folder
        For the files of tasks.
    is_wanted_C
        Conditions whose cells are read.
    library_column
        Column of total counts, if there is one.
    block_cells
        Most cells read at once.
    """

    folder: Path
    is_wanted_C: npt.NDArray[np.bool_]
    library_column: str | None
    block_cells: int

    def reader(self, piece: Piece) -> PieceReader:
        """Return a reader of the wanted cells of a piece."""
        return PieceReader(
            piece,
            read_labels(self.folder, piece),
            self.is_wanted_C,
            library_column=self.library_column,
            block_cells=self.block_cells,
        )


@dataclass(frozen=True, slots=True)
class PieceResult:
    """What became of a piece.

    Parameters
    ----------
    files
        Files that were written, with their sizes.
    num_tried
        Wanted cells.
    dropped
        Those of them that were left out, by reason.
    sha256
        Of an input file, where that was the task.
    """

    files: dict[str, int]
    num_tried: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    sha256: str = ""


# --- moments of the genes -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MomentSettings:
    """What :func:`sum_moments` needs beside the piece."""

    cells: PassSettings
    num_genes: int
    flavor: GeneFlavor


def sum_moments(settings: MomentSettings, piece: Piece, report: Report) -> PieceResult:
    """Write the sums over the cells of a piece; what is made of them adds pieces in order."""
    reader = settings.cells.reader(piece)
    moments = StreamingMoments(settings.num_genes, settings.flavor)
    for counts, library_R in reader.totals(report):
        moments.update(counts, library_R)
    path = settings.cells.folder / _moments_name(piece)
    with path.open("wb") as handle:
        np.savez(handle, sums_3G=moments.sums(), num_cells=moments.num_cells)
        handle.flush()
        os.fsync(handle.fileno())
    return PieceResult({path.name: path.stat().st_size}, reader.num_tried, dict(reader.dropped))


def add_moments(settings: MomentSettings, pieces: list[Piece]) -> StreamingMoments:
    """Return the moments over all pieces, added in their order."""
    moments = StreamingMoments(settings.num_genes, settings.flavor)
    for piece in pieces:
        with np.load(settings.cells.folder / _moments_name(piece), allow_pickle=False) as part:
            moments.add(
                StreamingMoments.from_sums(part["sums_3G"], int(part["num_cells"]), settings.flavor)
            )
    return moments


def _moments_name(piece: Piece) -> str:
    return f"moments-{piece.number:06d}.npz"


# --- the spill ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpillSettings:
    """What :func:`spill_cells` needs beside the piece.

    Parameters
    ----------
    cells
        What is read.
    gene_columns
        Genes that are stored, as positions in the vocabulary.
    buckets
        Where cells go.
    keep_barcodes
        Whether names of cells are kept.
    """

    cells: PassSettings
    gene_columns: Columns
    buckets: Buckets
    keep_barcodes: bool


def spill_or_hash(settings: SpillSettings, job: Piece | Path, report: Report) -> PieceResult:
    """Spill a piece, or hash an input file: one stage, so that no process waits for the other."""
    if isinstance(job, Path):
        return PieceResult({}, sha256=hash_input(job))
    return spill_cells(settings, job, report)


def spill_cells(settings: SpillSettings, piece: Piece, report: Report) -> PieceResult:
    """Write the packed cells of a piece, by bucket."""
    reader = settings.cells.reader(piece)
    column_G = piece.look.column_G
    chosen = settings.gene_columns if column_G is None else column_G[settings.gene_columns]
    num_genes = opened(piece.source).matrix(piece.look.place.location).shape[1]
    target_G = np.full(num_genes, -1, np.int32)
    target_G[chosen] = np.arange(len(chosen), dtype=np.int32)
    parts = list(reader.cells(target_G, report))
    if settings.keep_barcodes:
        parts[:] = _with_barcodes(piece, parts)
    files = write_spill(settings.cells.folder, piece.number, parts, settings.buckets)
    return PieceResult(files, reader.num_tried, dict(reader.dropped))


def _with_barcodes(piece: Piece, parts: list[PackedCells]) -> list[PackedCells]:
    """Return cells with their names in the file, as UTF-8."""
    names = opened(piece.source).barcodes(piece.start, piece.stop)
    try:
        encoded = names.astype(np.bytes_)  # ASCII: much the fastest
    except UnicodeEncodeError:
        encoded = np.char.encode(names, "utf-8")
    first = piece.first_ordinal + piece.start
    return [
        replace(part, barcode_N=encoded[part.ordinal_N.astype(np.int64) - first]) for part in parts
    ]
