"""The first look at all files: labels, genes, where the counts are; before any cell is stored.

Files are looked at one by one, in worker processes where there are some; what they say is put
together in the order of the files, so that the numbers of conditions and cells do not depend on who
was first. Nothing per cell is kept but a small file of labels for each input.

Shapes: N = cells of a file, G = genes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scale.config import ColumnsConfig, ConditionBy, CountsPolicy, PrepareConfig
from scale.data.csr import NO_BATCH
from scale.data.genes import GeneVocabulary
from scale.data.ingest.conditions import ConditionTable
from scale.data.ingest.counts import SAMPLE_CELLS, find_counts
from scale.data.ingest.opened import opened
from scale.data.ingest.reader import LABEL_DTYPE, FileLook, Floats, Piece
from scale.data.ingest.scan import Scan
from scale.data.ingest.source import Source, SourceFile
from scale.data.ingest.workers import Report, Workers
from scale.data.store_files import file_sha256
from scale.types import SourceError

_LATER_SAMPLE_CELLS = 256
"""Cells looked at in files behind the first: what these show is known by then."""
_DENSE_SAMPLE_CELLS = 1024


@dataclass(frozen=True, slots=True)
class Inputs:
    """All files and what they hold together.

    Parameters
    ----------
    sources, looks, first_ordinals
        One entry per file; the number of its first cell in the whole source.
    genes
        Genes of the source, in the order of the first file.
    scan, conditions
        The labels.
    num_cells
        Cells of all files.
    """

    sources: tuple[Source, ...]
    looks: tuple[FileLook, ...]
    first_ordinals: tuple[int, ...]
    genes: GeneVocabulary
    scan: Scan
    conditions: ConditionTable
    num_cells: int

    @property
    def location(self) -> str:
        """Where the counts are."""
        return self.looks[0].place.location

    @property
    def is_recovered(self) -> bool:
        """Whether counts are recovered from log1p values."""
        return self.looks[0].place.is_recovered

    @property
    def num_nonzero(self) -> float:
        """Non-zeros per cell, about."""
        return sum(look.num_nonzero * look.num_cells for look in self.looks) / self.num_cells

    @property
    def file_names(self) -> tuple[str, ...]:
        """Names of the files, without their folders."""
        return tuple(s.name if s.path is None else s.path.name for s in self.sources)

    def pieces(self, cells_per_piece: int) -> list[Piece]:
        """Cut all files into pieces."""
        places = [
            (file, start)
            for file, look in enumerate(self.looks)
            for start in range(0, look.num_cells, cells_per_piece)
        ]
        return [
            Piece(
                number,
                file,
                self.sources[file],
                self.looks[file],
                start,
                min(start + cells_per_piece, self.looks[file].num_cells),
                self.first_ordinals[file],
            )
            for number, (file, start) in enumerate(places)
        ]


def look_at_inputs(
    sources: Sequence[Source],
    config: PrepareConfig,
    workers: Workers,
    progress: Callable[[str, int, int], None],
) -> Inputs:
    """Look at all files.

    Raises
    ------
    SourceError
        For every mistake that labels, gene names and a sample of the values can show.
    """
    settings = _LookSettings(
        config.columns, config.control, config.where, config.counts, config.counts_policy, None
    )
    first, scan = _look(settings, sources[0], lambda cells: None)
    genes = _vocabulary_of(sources[0], first)
    settings = _LookSettings(
        config.columns,
        config.control,
        config.where,
        first.place.location,
        config.counts_policy,
        _FirstFile(sources[0].name, genes, is_recovered=first.place.is_recovered),
    )
    found: dict[int, tuple[FileLook, Scan]] = {}
    for number, result in workers.run(_look, settings, sources[1:], lambda cells: None):
        found[number] = result
        progress("look", len(found) + 1, len(sources))
    looks = [first]
    for number in sorted(found):
        look, other = found[number]
        scan.merge(other)
        looks.append(look)
    conditions = scan.finish(ConditionBy(config.condition_by))
    ends = np.cumsum([look.num_cells for look in looks]).tolist()
    return Inputs(
        tuple(sources),
        tuple(looks),
        (0, *ends[:-1]),
        genes,
        scan,
        conditions,
        ends[-1],
    )


# --- the look at one file -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _FirstFile:
    """What all other files must agree with."""

    name: str
    genes: GeneVocabulary
    is_recovered: bool


@dataclass(frozen=True, slots=True)
class _LookSettings:
    columns: ColumnsConfig
    control: str
    where: dict[str, list[str]]
    counts: str
    policy: CountsPolicy
    first: _FirstFile | None


def _look(settings: _LookSettings, source: Source, report: Report) -> tuple[FileLook, Scan]:
    file = opened(source)
    scan = Scan(settings.columns, settings.control, settings.where)
    scan.add(file)  # first: mistakes in labels are cheap to find
    place = find_counts(
        file,
        settings.counts,
        settings.policy,
        _library(file, settings.columns.library),
        sample_cells=SAMPLE_CELLS if settings.first is None else _LATER_SAMPLE_CELLS,
    )
    column_G = None
    if settings.first is not None:
        if place.is_recovered != settings.first.is_recovered:
            words = {True: "log1p values", False: "counts"}
            raise SourceError(
                f"{file.name}: {place.location} holds {words[place.is_recovered]}, but that of "
                f"{settings.first.name} holds {words[settings.first.is_recovered]}; prepare them "
                "apart, or set counts to a matrix of counts that all files have"
            )
        column_G = _align(file, place.location, settings.first)
    info = file.matrix(place.location)
    if info.kind == "dense":
        stop = min(_DENSE_SAMPLE_CELLS, file.num_cells)
        num_nonzero = file.rows(place.location, 0, stop).count_nonzero() / stop
    else:
        num_nonzero = info.num_stored / file.num_cells
    look = FileLook(
        file.name, file.num_cells, place, column_G, num_nonzero, is_whole=info.kind == "csc"
    )
    return look, scan


def _library(file: SourceFile, column: str | None) -> Floats | None:
    """Return total counts from the library column, if there is one."""
    return None if column is None else np.rint(file.numbers(column, "columns.library"))


def _align(file: SourceFile, location: str, first: _FirstFile) -> npt.NDArray[np.int32] | None:
    """Return the position in a file of each gene; equal sets of genes are demanded."""
    names = file.genes(location)
    if tuple(names) == first.genes.symbols:
        return None
    alignment = first.genes.align(_vocabulary(file, location).symbols)
    if alignment.missing or alignment.extra:
        raise SourceError(
            f"{file.name} has other genes than {first.name}: {len(names):,} against "
            f"{len(first.genes):,}; {len(alignment.missing):,} missing"
            f"{_first(alignment.missing)}, {len(alignment.extra):,} more"
            f"{_first(alignment.extra)}. Cut both to the same genes"
        )
    return alignment.column_G.astype(np.int32)


def _vocabulary_of(source: Source, look: FileLook) -> GeneVocabulary:
    return _vocabulary(opened(source), look.place.location)


def _vocabulary(file: SourceFile, location: str) -> GeneVocabulary:
    ids = file.ensembl_ids(location)
    try:
        return GeneVocabulary(tuple(file.genes(location)), None if ids is None else tuple(ids))
    except SourceError as error:
        raise SourceError(f"{file.name}: {error}") from error


def _first(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""


# --- labels of every cell, and hashes of files ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileLabels:
    """Result of :func:`write_labels`."""

    files: dict[str, int]


@dataclass(frozen=True, slots=True)
class LabelSettings:
    """What :func:`write_labels` needs beside the file."""

    folder: Path
    scan: Scan
    library_column: str | None


def labels_name(file: int) -> str:
    """Return the name of the file with the labels of the cells of an input file."""
    return f"labels-{file:05d}.npy"


def write_labels(settings: LabelSettings, job: tuple[int, Source], report: Report) -> FileLabels:
    """Write ``LABEL_DTYPE`` for every cell of an input file."""
    number, source = job
    file = opened(source)
    codes = settings.scan.codes(file)
    library_N = _library(file, settings.library_column)
    labels_N = np.empty(file.num_cells, LABEL_DTYPE)
    labels_N["condition"] = codes.condition_N
    labels_N["batch"] = np.where(codes.batch_N < 0, NO_BATCH, codes.batch_N)
    labels_N["library"] = np.nan if library_N is None else library_N
    path = settings.folder / labels_name(number)
    with path.open("wb") as handle:
        np.save(handle, labels_N)
        handle.flush()
        os.fsync(handle.fileno())
    return FileLabels({path.name: path.stat().st_size})


def read_labels(folder: Path, piece: Piece) -> npt.NDArray[np.void]:
    """Return the labels of the cells of a piece."""
    labels_N = np.load(folder / labels_name(piece.file), mmap_mode="r")
    return np.array(labels_N[piece.start : piece.stop])


def hash_input(path: Path) -> str:
    """Return the sha256 of an input file; of an archive, that of its files' names and hashes."""
    if path.is_file():
        return file_sha256(path)
    digest = sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {file_sha256(file)}\n".encode())
    return digest.hexdigest()
