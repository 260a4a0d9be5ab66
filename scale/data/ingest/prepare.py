"""From count matrices to a store: scan the labels, choose the genes, group the cells, write.

Labels come first, because their mistakes are cheap to find. Then the cells pass by once, or twice
where the genes are chosen by their variance, in blocks of bounded size; they are gathered by
condition, shuffled within it, and only then written. The store depends on the cells, the settings
and the seed, not on how the input was cut into files of equal order, blocks or spilled runs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.config import GeneChoice, PrepareConfig, SourceFormat, to_yaml
from scale.data.genes import StreamingMoments
from scale.data.ingest.grouping import CellGroups
from scale.data.ingest.h5ad import H5adSource
from scale.data.ingest.reader import Columns, CountReader, choose_list
from scale.data.ingest.scan import ConditionTable, Scan, report_without_control
from scale.data.ingest.source import Source, find_files
from scale.data.partial import PartialDirectory
from scale.data.simulate import SimulationConfig, simulate
from scale.data.store_files import MANIFEST, file_sha256
from scale.data.store_writer import StoreWriter
from scale.types import SourceError, StoreError

logger = logging.getLogger(__name__)

BELOW_MINIMUM = "in conditions below minimum_cells"
SMALL_POOL = 256
"""Control pools with fewer cells are pointed out: a set of the larger presets needs as many."""
_BLOCK_CELLS = 4096

Progress = Callable[[str, int, int], None]
"""Called with what is being done, cells done and cells in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport:
    """What ``prepare`` did.

    Parameters
    ----------
    path
        The store.
    counts
        ``read``, or ``recovered`` from log1p values.
    num_cells_in, num_cells
        Cells of the source and of the store.
    dropped
        Cells left out, by reason.
    dropped_conditions
        Treated conditions below ``minimum_cells`` with their number of cells.
    num_genes_in, num_genes
        Genes of the source and of the store.
    num_conditions, num_controls
        Treated conditions and control pools.
    small_pools
        Control pools below ``SMALL_POOL`` cells, with their number of cells.
    bytes_per_cell
        Of the whole store.
    spilled_bytes
        Size that the spill file had; 0 = all was held in memory.
    """

    path: Path
    counts: str
    num_cells_in: int
    num_cells: int
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_conditions: dict[str, int] = field(default_factory=dict)
    num_genes_in: int
    num_genes: int
    num_conditions: int
    num_controls: int
    small_pools: dict[str, int] = field(default_factory=dict)
    bytes_per_cell: float
    spilled_bytes: int = 0

    def table(self) -> str:
        """Return the closing table, one fact a line."""
        rows = [
            ("cells in", f"{self.num_cells_in:,}"),
            *((f"  {reason}", f"-{count:,}") for reason, count in sorted(self.dropped.items())),
            ("cells stored", f"{self.num_cells:,}"),
            ("counts", self.counts),
            ("genes", f"{self.num_genes:,} of {self.num_genes_in:,}"),
            ("treated conditions", f"{self.num_conditions:,}"),
            ("control pools", f"{self.num_controls:,}"),
            (f"  below {SMALL_POOL} cells", _listed(self.small_pools)),
            ("conditions dropped", _listed(self.dropped_conditions)),
            ("bytes per cell", f"{self.bytes_per_cell:,.0f}"),
            ("store", str(self.path)),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def prepare(
    config: PrepareConfig,
    *,
    progress: Progress | None = None,
    block_cells: int = _BLOCK_CELLS,
) -> PrepareReport:
    """Write a store.

    Parameters
    ----------
    config
        Settings of ``scale prepare``.
    progress
        Called now and then with what is being done, cells done, and cells in all.
    block_cells
        Most cells read at once; changes memory and speed, never the store.

    Raises
    ------
    SourceError
        If the input cannot be used; the message says where and what to do. Nothing is written.
    StoreError
        If there is a store already.
    """
    path = Path(config.store)
    _check_target(path, overwrite=config.overwrite)
    files = (
        [] if config.source.format is SourceFormat.synthetic else find_files(config.source.files)
    )
    scan = Scan(config.columns, config.control, config.where)
    reader = CountReader(
        _sources(config, files),
        scan,
        columns=config.columns,
        counts=config.counts,
        policy=config.counts_policy,
        memory_bytes=config.memory_bytes,
        block_cells=block_cells,
    )
    conditions = scan.finish(config.condition_by)
    # Claimed for the whole run: a second one for the same store stops here, not at the end.
    spill = PartialDirectory(path.with_name(path.name + ".spill"), overwrite=False, mark="")
    try:
        genes = _choose_genes(config, reader, conditions, progress)
        groups = CellGroups(
            len(conditions.conditions),
            len(genes.columns),
            seed=config.seed,
            memory_bytes=config.memory_bytes // 4,  # a sorted copy and blocks of input come on top
            spill_dir=spill.partial,
        )
        reading = None if progress is None else _named(progress, "read")
        for cells in reader.blocks(genes.columns, progress=reading):
            groups.add(cells)
        keep_C = _kept_conditions(config, conditions, groups.num_cells_C)
        with _writer(config, reader, conditions, genes, files) as writer:
            _write(writer, conditions, groups, np.flatnonzero(keep_C), progress)
    finally:
        spill.abort()
    return _report(config, reader, conditions, groups, keep_C, len(genes.columns))


def _check_target(path: Path, *, overwrite: bool) -> None:
    """Find out now, not after hours of reading, whether the store can be written."""
    if path.exists() and not overwrite:
        raise StoreError(f"{path} exists; give another store=, or overwrite=true")
    if path.exists() and not (path / MANIFEST).exists():
        raise StoreError(f"{path} is no store and is not overwritten; give another store=")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StoreError(f"{path} cannot be written: {parent} is no writable directory")


def _sources(config: PrepareConfig, files: list[Path]) -> list[Source]:
    if config.source.format is SourceFormat.synthetic:
        settings = SimulationConfig(num_cells=config.source.num_cells, seed=config.seed)
        return [H5adSource(simulate(settings).to_anndata(), memory_bytes=config.memory_bytes)]
    return [H5adSource(path, memory_bytes=config.memory_bytes) for path in files]


# --- genes --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Genes:
    """Which genes are stored, and what is known of all of them."""

    columns: Columns
    table: pd.DataFrame


def _choose_genes(
    config: PrepareConfig,
    reader: CountReader,
    conditions: ConditionTable,
    progress: Progress | None,
) -> _Genes:
    """Return the genes to store; a pass over the cells where their variance decides."""
    vocabulary, settings = reader.genes, config.genes
    columns = np.arange(len(vocabulary))
    table = pd.DataFrame(
        {"symbol": vocabulary.symbols, "ensembl_id": vocabulary.ensembl_ids, "column": -1}
    )
    if settings.choice is GeneChoice.list:
        columns = choose_list(vocabulary, Path(str(settings.file)))
    elif settings.choice is GeneChoice.hvg and settings.num < len(vocabulary):
        moments = StreamingMoments(len(vocabulary))
        is_wanted_C = _large_enough(config, conditions, conditions.num_cells)
        choosing = None if progress is None else _named(progress, "genes")
        for cells in reader.blocks(columns, is_wanted_C, choosing):
            moments.update(cells.counts, cells.library_N)
        columns = np.flatnonzero(moments.highly_variable(settings.num))
        table = pd.concat([table, moments.table()], axis=1)
    table.loc[columns, "column"] = np.arange(len(columns))
    logger.info("genes: %d of %d (%s)", len(columns), len(vocabulary), settings.choice.value)
    return _Genes(columns, table)


# --- conditions ---------------------------------------------------------------------------------


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


# --- writing ------------------------------------------------------------------------------------


def _writer(
    config: PrepareConfig,
    reader: CountReader,
    conditions: ConditionTable,
    genes: _Genes,
    files: list[Path],
) -> StoreWriter:
    columns = config.columns
    if files:
        logger.info("inputs: sha256 of %d files", len(files))
    over = "all" if columns.library is None else f"column {columns.library}"
    provenance: dict[str, Any] = {
        "config": to_yaml(config),
        "inputs": [
            {"name": path.name, "size": path.stat().st_size, "sha256": file_sha256(path)}
            for path in files
        ],
        "location": reader.location,
        "genes_fit_on": "all" if config.genes.choice is GeneChoice.hvg else None,
        "dose_unit": columns.dose_unit,
        "dropped": dict(reader.dropped),
    }
    return StoreWriter(
        config.store,
        genes=reader.genes.take(genes.columns),
        columns={
            "perturbation": columns.perturbation,
            "cell_type": columns.cell_type,
            "batch": columns.batch,
            "dose": columns.dose,
            "library": columns.library,
            "separator": columns.separator,
        },
        control=conditions.control,
        codec=config.codec,
        shard_bytes=config.shard_bytes,
        provenance=provenance,
        gene_table=genes.table,
        library={"over": over, "num_genes": len(reader.genes)},
        overwrite=config.overwrite,
        batches=conditions.batches,
        facts={
            "counts": _counts_word(reader),
            "condition_by": "batch" if conditions.batch_in_key else "perturbation",
            "shuffle_seed": config.seed,
        },
    )


def _write(
    writer: StoreWriter,
    conditions: ConditionTable,
    groups: CellGroups,
    kept: Columns,
    progress: Progress | None,
) -> None:
    total, done = int(groups.num_cells_C[kept].sum()), 0
    for number, cells in zip(kept.tolist(), groups.read(kept), strict=True):
        condition = conditions.conditions[number]
        has_codes = condition.batch is None and bool(conditions.batches)
        writer.add(
            condition,
            conditions.labels[number],
            cells.counts,
            cells.library_N,
            batch_codes=cells.batch_N if has_codes else None,
        )
        done += len(cells.library_N)
        if progress is not None:
            progress("write", done, total)


def _report(
    config: PrepareConfig,
    reader: CountReader,
    conditions: ConditionTable,
    groups: CellGroups,
    keep_C: npt.NDArray[np.bool_],
    num_genes: int,
) -> PrepareReport:
    path = Path(config.store)
    num_cells = int(groups.num_cells_C[keep_C].sum())
    dropped = {reason: count for reason, count in reader.dropped.items() if count}
    if below := int(groups.num_cells_C[~keep_C].sum()):
        dropped[BELOW_MINIMUM] = below
    treated, pools, small, lost = 0, 0, {}, {}
    for condition, keep, size in zip(
        conditions.conditions, keep_C.tolist(), groups.num_cells_C.tolist(), strict=True
    ):
        batch = "" if condition.batch is None else f", {condition.batch}"
        name = f"({condition.cell_type}, {condition.perturbation.label}{batch})"
        pools += condition.is_control and keep
        treated += keep and not condition.is_control
        if not keep:
            lost[name] = size
        elif condition.is_control and size < SMALL_POOL:
            small[name] = size
    return PrepareReport(
        path=path,
        counts=_counts_word(reader),
        num_cells_in=reader.num_cells,
        num_cells=num_cells,
        dropped=dropped,
        dropped_conditions=lost,
        num_genes_in=len(reader.genes),
        num_genes=num_genes,
        num_conditions=treated,
        num_controls=pools,
        small_pools=small,
        bytes_per_cell=sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / num_cells,
        spilled_bytes=groups.spilled_bytes,
    )


def _counts_word(reader: CountReader) -> str:
    return "recovered" if reader.is_recovered else "read"


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


def _listed(sizes: dict[str, int], shown: int = 5) -> str:
    """Return how many there are and the first of them."""
    if not sizes:
        return "0"
    names = "; ".join(f"{name} {size}" for name, size in list(sizes.items())[:shown])
    return f"{len(sizes):,}: {names}{'; ...' if len(sizes) > shown else ''}"
