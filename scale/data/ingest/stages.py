"""The stages of ``prepare``, each a list of tasks that workers do in any order.

What tasks leave is journaled; what is decided between the stages (conditions, genes, buckets,
shards) follows from it in the order of the tasks, so that it is the same in every run.

Shapes: C = conditions, K = buckets.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from scale.config import GeneFlavor, KeepCells, PrepareConfig
from scale.data.codec import CHUNK_CELLS, HEAD_BYTES
from scale.data.csr import row_pointer
from scale.data.genes import StreamingMoments
from scale.data.ingest.assembly import (
    LEFT_OUT_BY_WHERE,
    Made,
    assemble,
    has_codes,
    source_columns,
)
from scale.data.ingest.choice import ChosenGenes, choose_genes
from scale.data.ingest.conditions import ConditionTable, report_without_control
from scale.data.ingest.counts import REQUIRED_SHARE
from scale.data.ingest.grouping import Buckets, plan_shards
from scale.data.ingest.inputs import (
    FileLabels,
    Inputs,
    LabelSettings,
    look_at_inputs,
    write_labels,
)
from scale.data.ingest.journal import SEALED, Journal
from scale.data.ingest.piece_tasks import (
    MomentSettings,
    PassSettings,
    PieceResult,
    SpillSettings,
    add_moments,
    spill_or_hash,
    sum_moments,
)
from scale.data.ingest.reader import NOT_RECOVERED, Piece
from scale.data.ingest.report import PrepareReport
from scale.data.ingest.shard_task import (
    ShardJob,
    ShardSettings,
    WrittenShards,
    write_shards,
)
from scale.data.ingest.source import Source
from scale.data.ingest.spill import SEGMENT_DTYPE, Spilled, SpillIndex
from scale.data.ingest.workers import Task, Workers
from scale.data.partial import PartialDirectory
from scale.data.shard_writer import check_number
from scale.data.shards import CONTROL_SHARD, TREATED_SHARD
from scale.data.store_content import check_columns
from scale.types import SourceError

logger = logging.getLogger(__name__)

_BYTES_PER_CELL = 72
"""Of a cell on its way, beside its streams: numbers and barcode."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is: cells, at first files."""

_Argument = TypeVar("_Argument")
_Settings = TypeVar("_Settings")


_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How the work is cut. Cells, chunks and fingerprint of a store do not depend on it.

    Parameters
    ----------
    block_cells
        Most cells read at once.
    moment_cells
        Cells of a piece where genes are chosen.
    piece_bytes, bucket_bytes
        About what a piece of the input and a bucket of the output take, packed. Buckets are not
        divided between shards, so that other sizes may give other shards.
    """

    block_cells: int = 4096
    moment_cells: int = 32_768
    piece_bytes: int = 48 << 20
    bucket_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True)
class Job(Generic[_Argument]):
    """A task's name in the journal, its cells (for the progress) and its argument."""

    name: str
    num_cells: int
    argument: _Argument


@dataclass(frozen=True, slots=True)
class _Sealed:
    """Result of the last task."""

    files: dict[str, int]
    report: dict[str, Any]


class Stages:
    """Makes the content of one store in its partial directory.

    Parameters
    ----------
    config, sizes
        What is made, and how it is cut.
    directory, journal
        Where, and what was done before.
    workers
        Who does it.
    progress
        Whom to tell.
    """

    def __init__(
        self,
        config: PrepareConfig,
        sizes: Sizes,
        directory: PartialDirectory,
        journal: Journal,
        workers: Workers,
        progress: Progress | None,
    ) -> None:
        self._config, self._sizes = config, sizes
        self._folder, self._store = directory.folder, directory.partial
        self._path = directory.path
        self._journal, self._workers = journal, workers
        self._progress: Progress = progress or (lambda what, done, total: None)

    def report(self) -> PrepareReport | None:
        """Return the report, if an earlier start has done everything."""
        sealed = self._journal.result(SEALED, _Sealed)
        return None if sealed is None else PrepareReport.from_json(sealed.report)

    def run(self, sources: Sequence[Source]) -> PrepareReport:
        """Do what is not done yet; the store is whole afterwards."""
        check_columns(source_columns(self._config))
        inputs = look_at_inputs(sources, self._config, self._workers, self._progress)
        if any(look.is_whole for look in inputs.looks):
            self._workers = Workers(1)  # each would hold the whole matrix
        self._label(inputs)
        genes, num_nonzero = self._choose_genes(inputs)
        spilled = self._spill(inputs, genes, num_nonzero)
        is_kept_C = _kept_conditions(self._config, inputs.conditions, spilled.num_cells_C)
        written = self._write(inputs, spilled, is_kept_C)
        made = Made(inputs, genes, spilled, is_kept_C, written)
        report = assemble(self._config, self._path, self._folder, self._store, made)
        self._journal.record(SEALED, _Sealed({}, report.to_json()))
        return report

    def _do(
        self,
        what: str,
        task: Task[_Settings, _Argument, _Result],
        settings: _Settings,
        jobs: Sequence[Job[_Argument]],
        kind: type[_Result],
    ) -> list[_Result]:
        """Return the results of all jobs, of those that are finished from the journal."""
        found = {
            number: result
            for number, job in enumerate(jobs)
            if (result := self._journal.result(job.name, kind)) is not None
        }
        waiting = [number for number in range(len(jobs)) if number not in found]
        total = sum(job.num_cells for job in jobs)
        done = sum(jobs[number].num_cells for number in found)

        def report(num_cells: int) -> None:
            nonlocal done
            done += num_cells
            self._progress(what, min(done, total), total)

        if waiting:
            report(0)  # starts the clock
        arguments = [jobs[number].argument for number in waiting]
        for at, result in self._workers.run(task, settings, arguments, report):
            self._journal.record(jobs[waiting[at]].name, result)
            found[waiting[at]] = result
        return [found[number] for number in range(len(jobs))]

    # --- labels and genes -----------------------------------------------------------------------

    def _label(self, inputs: Inputs) -> None:
        settings = LabelSettings(self._folder, inputs.scan, self._config.columns.library)
        jobs = [
            Job(f"labels {number}", look.num_cells, (number, source))
            for number, (look, source) in enumerate(zip(inputs.looks, inputs.sources, strict=True))
        ]
        self._do("labels", write_labels, settings, jobs, FileLabels)

    def _choose_genes(self, inputs: Inputs) -> tuple[ChosenGenes, float]:
        """Return the stored genes, and about how many of them a cell has."""
        config = self._config
        seen: list[StreamingMoments] = []

        def moments(is_wanted_C: npt.NDArray[np.bool_]) -> StreamingMoments:
            seen.append(self._sum_moments(inputs, is_wanted_C, config.genes.flavor))
            return seen[-1]

        genes = choose_genes(
            config.genes, inputs.genes, inputs.conditions, config.minimum_cells, moments
        )
        if seen:
            num_values = int(genes.table["num_cells"].to_numpy()[genes.columns].sum())
            return genes, num_values / seen[-1].num_cells
        return genes, min(inputs.num_nonzero, len(genes.columns))

    def _sum_moments(
        self, inputs: Inputs, is_wanted_C: npt.NDArray[np.bool_], flavor: GeneFlavor
    ) -> StreamingMoments:
        settings = MomentSettings(self._pass(is_wanted_C), len(inputs.genes), flavor)
        pieces = inputs.pieces(self._sizes.moment_cells)
        jobs = [Job(f"moments {p.number}", p.stop - p.start, p) for p in pieces]
        results = self._do("genes", sum_moments, settings, jobs, PieceResult)
        _check_recovered(inputs, pieces, results)
        return add_moments(settings, pieces)

    def _pass(self, is_wanted_C: npt.NDArray[np.bool_]) -> PassSettings:
        library_column = self._config.columns.library
        return PassSettings(self._folder, is_wanted_C, library_column, self._sizes.block_cells)

    # --- spill ----------------------------------------------------------------------------------

    def _spill(self, inputs: Inputs, genes: ChosenGenes, num_nonzero: float) -> Spilled:
        config, conditions = self._config, inputs.conditions
        bytes_per_cell = int(2 * num_nonzero) + _BYTES_PER_CELL
        bucket_bytes = min(self._sizes.bucket_bytes, config.shard_bytes)
        is_wanted_C = _large_enough(config, conditions, conditions.num_cells)
        buckets = Buckets.plan(
            conditions.conditions,
            conditions.num_cells,
            is_wanted_C,
            cells_per_bucket=max(CHUNK_CELLS, bucket_bytes // bytes_per_cell),
            seed=config.seed,
        )
        pieces = inputs.pieces(max(CHUNK_CELLS, self._sizes.piece_bytes // bytes_per_cell))
        jobs: list[Job[Piece | Path]] = [
            Job(f"sha256 {number}", 0, source.path)
            for number, source in enumerate(inputs.sources)
            if source.path is not None
        ]
        num_hashes = len(jobs)
        jobs += [Job(f"cells {p.number}", p.stop - p.start, p) for p in pieces]
        keep_barcodes = config.keep_cells is KeepCells.barcode
        settings = SpillSettings(self._pass(is_wanted_C), genes.columns, buckets, keep_barcodes)
        results = self._do("read", spill_or_hash, settings, jobs, PieceResult)
        _check_recovered(inputs, pieces, results[num_hashes:])
        num_cells_C = np.zeros(len(conditions.conditions), np.int64)
        segments = [np.empty(0, SEGMENT_DTYPE)]
        for piece in pieces:
            index = SpillIndex.read(self._folder, piece.number)
            num_cells_C[index.condition_C] += index.num_cells_C
            segments.append(index.segments)
        joined = np.concatenate(segments)
        dropped: Counter[str] = Counter()
        for result in results:
            dropped.update(result.dropped)
        dropped[LEFT_OUT_BY_WHERE] += conditions.num_left_out
        # What was not read is known from the labels.
        num_cells_C[~is_wanted_C] = conditions.num_cells[~is_wanted_C]
        return Spilled(
            buckets,
            joined[np.argsort(joined["bucket"], kind="stable")],
            num_cells_C,
            dropped,
            [result.sha256 for result in results[:num_hashes]],
        )

    # --- shards ---------------------------------------------------------------------------------

    def _write(
        self, inputs: Inputs, spilled: Spilled, is_kept_C: npt.NDArray[np.bool_]
    ) -> list[WrittenShards]:
        config, conditions = self._config, inputs.conditions
        for folder in ("shards", "cells"):
            if folder == "shards" or config.keep_cells is KeepCells.barcode:
                (self._store / folder).mkdir(exist_ok=True)
        num_chunks_C = np.where(is_kept_C, -(-spilled.num_cells_C // CHUNK_CELLS), 0)
        settings = ShardSettings(
            self._folder,
            self._store,
            spilled.buckets,
            is_kept_C,
            has_codes_C=has_codes(conditions),
            is_control_C=np.array([c.is_control for c in conditions.conditions]),
            first_chunk_C=row_pointer(num_chunks_C)[:-1],
            codec=config.codec,
            shard_bytes=config.shard_bytes,
            first_ordinals=np.array(inputs.first_ordinals, np.int64),
            file_names=inputs.file_names if config.keep_cells is KeepCells.barcode else (),
        )
        jobs = self._shard_jobs(inputs, spilled, is_kept_C)
        return self._do("write", write_shards, settings, jobs, WrittenShards)

    def _shard_jobs(
        self, inputs: Inputs, spilled: Spilled, is_kept_C: npt.NDArray[np.bool_]
    ) -> list[Job[ShardJob]]:
        buckets, segments = spilled.buckets, spilled.segments
        bucket = segments["bucket"]
        bytes_K = np.bincount(bucket, segments["num_bytes"], buckets.num_buckets).astype(np.int64)
        has_kept_K = np.zeros(buckets.num_buckets, dtype=bool)
        for c in np.flatnonzero(is_kept_C).tolist():
            first = buckets.first_C[c]
            has_kept_K[first : first + buckets.num_C[c]] = True
            bytes_K[first] += HEAD_BYTES * -(-spilled.num_cells_C[c] // CHUNK_CELLS)
        bytes_K[~has_kept_K] = 0
        groups = plan_shards(
            buckets, inputs.conditions.conditions, bytes_K, self._config.shard_bytes
        )
        jobs, number_of = [], Counter[str]()
        for number, group in enumerate(groups):
            check_number(number, self._config.shard_bytes)
            first, stop = np.searchsorted(bucket, [group.start, group.stop])
            own = segments[first:stop]
            c = int(np.flatnonzero(is_kept_C & (buckets.first_C >= group.start))[0])
            is_control = inputs.conditions.conditions[c].is_control
            prefix = CONTROL_SHARD if is_control else TREATED_SHARD
            name = f"{prefix}{number_of[prefix]:05d}"
            number_of[prefix] += 1
            job = ShardJob(number, name, group, own)
            jobs.append(Job(f"shards {number}", int(own["num_cells"].sum()), job))
        return jobs


# --- which conditions -----------------------------------------------------------------------------


def _large_enough(
    config: PrepareConfig, conditions: ConditionTable, num_cells_C: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return which conditions have cells, and if treated at least ``minimum_cells``."""
    is_control_C = np.array([c.is_control for c in conditions.conditions])
    minimum_C = np.where(is_control_C, 1, config.minimum_cells)
    return np.asarray(num_cells_C >= minimum_C)


def _kept_conditions(
    config: PrepareConfig, conditions: ConditionTable, num_cells_C: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return which conditions are stored; what was left out on the way counts."""
    keep_C = _large_enough(config, conditions, num_cells_C)
    is_control_C = np.array([c.is_control for c in conditions.conditions])
    kept = [c for c, keep in zip(conditions.conditions, keep_C, strict=True) if keep]
    with_control = {c.cell_type for c in kept if c.is_control}
    report_without_control({c.cell_type for c in kept} - with_control)
    if not (keep_C & ~is_control_C).any():
        largest = int(num_cells_C[~is_control_C].max(initial=0))
        raise SourceError(
            f"no treated condition has minimum_cells ({config.minimum_cells}) cells; the largest "
            f"of {int((~is_control_C).sum()):,} has {largest}. Lower minimum_cells"
        )
    return keep_C


def _check_recovered(
    inputs: Inputs, pieces: Sequence[Piece], results: Sequence[PieceResult]
) -> None:
    """Refuse a file of which too many cells could not be recovered."""
    tried, refused = Counter[int](), Counter[int]()
    for piece, result in zip(pieces, results, strict=True):
        tried[piece.file] += result.num_tried
        refused[piece.file] += result.dropped.get(NOT_RECOVERED, 0)
    for file, look in enumerate(inputs.looks):
        if refused[file] > (1 - REQUIRED_SHARE) * tried[file]:
            raise SourceError(
                f"{look.name}: counts could be recovered for "
                f"{100 * (1 - refused[file] / tried[file]):.1f} % of cells, "
                f"{100 * REQUIRED_SHARE:g} % are needed; set counts to a matrix of counts"
            )
