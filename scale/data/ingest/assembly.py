"""The last stage of ``prepare``: from finished shards to a store, and to the report.

Shapes: C = conditions.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scale.config import PrepareConfig
from scale.data.codec import CHUNK_CELLS
from scale.data.ingest.choice import ChosenGenes
from scale.data.ingest.conditions import ConditionTable
from scale.data.ingest.identity import content_settings
from scale.data.ingest.inputs import Inputs
from scale.data.ingest.report import ConditionFacts, PrepareReport
from scale.data.ingest.shard_task import WrittenShards, chunks_name
from scale.data.ingest.spill import Spilled
from scale.data.shard_writer import check_number
from scale.data.store_content import StoreContent, StoredCondition, write_content
from scale.data.tables import checked_gene_table

logger = logging.getLogger(__name__)

LEFT_OUT_BY_WHERE = "left out by where"
BELOW_MINIMUM = "in conditions below minimum_cells"


@dataclass(frozen=True, slots=True)
class Made:
    """What the stages have made."""

    inputs: Inputs
    genes: ChosenGenes
    spilled: Spilled
    is_kept_C: npt.NDArray[np.bool_]
    written: list[WrittenShards]

    @property
    def dropped(self) -> dict[str, int]:
        """Cells that are not stored, by reason."""
        below = int(self.spilled.num_cells_C[~self.is_kept_C].sum())
        return dict(+(self.spilled.dropped + Counter({BELOW_MINIMUM: below})))


def assemble(
    config: PrepareConfig, path: Path, folder: Path, store: Path, made: Made
) -> PrepareReport:
    """Write everything but the shards, and return what was done.

    Parameters
    ----------
    config, made
        Settings and what there is.
    path
        Name that the store will have.
    folder, store
        Where the files of tasks and of the store are.
    """
    _remove_strays(store, made.written)
    content, shards = _content(config, folder, made)
    cells = [entry for result in made.written for entry in result.cells]
    write_content(store, content, [*shards, *cells])
    num_repeated = sum(result.num_repeated for result in made.written)
    if num_repeated:
        logger.warning(
            "%d cells have the barcode of another cell of the same condition; if their file names "
            "a cell twice, remove one",
            num_repeated,
        )
    inputs, spilled = made.inputs, made.spilled
    num_cells = int(spilled.num_cells_C[made.is_kept_C].sum())
    facts = ConditionFacts.of(inputs.conditions, spilled.num_cells_C, made.is_kept_C)
    num_bytes = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    return PrepareReport(
        path=path,
        counts=_counts_word(inputs),
        num_cells_in=inputs.num_cells,
        num_cells=num_cells,
        dropped=made.dropped,
        dropped_conditions=facts.dropped_conditions,
        num_genes_in=len(inputs.genes),
        num_genes=len(content.genes),
        num_conditions=facts.num_conditions,
        num_controls=facts.num_controls,
        small_pools=facts.small_pools,
        num_repeated=num_repeated,
        bytes_per_cell=num_bytes / num_cells,
        spilled_bytes=int(spilled.segments["length"].sum()),
    )


def has_codes(conditions: ConditionTable) -> npt.NDArray[np.bool_]:
    """Return per condition whether its cells carry codes of their batches."""
    return np.array([c.batch is None and bool(conditions.batches) for c in conditions.conditions])


def source_columns(config: PrepareConfig) -> dict[str, str | None]:
    """Return what the manifest says of the columns of the source."""
    columns = config.columns
    return {
        "perturbation": columns.perturbation,
        "cell_type": columns.cell_type,
        "batch": columns.batch,
        "dose": columns.dose,
        "library": columns.library,
        "separator": columns.separator,
    }


def _content(
    config: PrepareConfig, folder: Path, made: Made
) -> tuple[StoreContent, list[dict[str, Any]]]:
    """Return what the store says, and the shards in the order of their numbers."""
    inputs, conditions = made.inputs, made.inputs.conditions
    chunks, shards = _joined_index(folder, made.written, config.shard_bytes)
    kept = np.flatnonzero(made.is_kept_C).tolist()
    size_C = made.spilled.num_cells_C.tolist()
    genes = inputs.genes.take(made.genes.columns)
    over = "all" if config.columns.library is None else f"column {config.columns.library}"
    content = StoreContent(
        genes=genes,
        gene_table=checked_gene_table(genes, made.genes.table),
        conditions=[
            StoredCondition(
                conditions.conditions[c],
                conditions.labels[c],
                size_C[c],
                -(-size_C[c] // CHUNK_CELLS),
            )
            for c in kept
        ],
        chunks=chunks,
        columns=source_columns(config),
        control=conditions.control,
        library={"over": over, "num_genes": len(inputs.genes)},
        provenance=_provenance(config, made),
        batches=conditions.batches,
        has_codes=bool(has_codes(conditions)[kept].any()),
        facts={
            "counts": _counts_word(inputs),
            "condition_by": "batch" if conditions.batch_in_key else "perturbation",
            "shuffle_seed": config.seed,
        },
    )
    return content, shards


def _joined_index(
    folder: Path, written: list[WrittenShards], shard_bytes: int
) -> tuple[npt.NDArray[np.void], list[dict[str, Any]]]:
    """Return the chunk index of all tasks, with the final numbers of shards."""
    parts: list[npt.NDArray[np.void]] = []
    shards: list[dict[str, Any]] = []
    for task, result in enumerate(written):
        part = np.load(folder / chunks_name(task), allow_pickle=False)
        check_number(len(shards) + len(result.shards) - 1, shard_bytes)
        part["shard"] += len(shards)
        parts.append(part)
        shards += result.shards
    return np.concatenate(parts), shards


def _provenance(config: PrepareConfig, made: Made) -> dict[str, Any]:
    files = [source.path for source in made.inputs.sources if source.path is not None]
    sizes = [
        sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")))
        for path in files
    ]
    inputs = [
        {"name": path.name, "size": size, "sha256": digest}
        for path, size, digest in zip(files, sizes, made.spilled.hashes, strict=True)
    ]
    return {
        "config": content_settings(config),
        "inputs": inputs,
        "location": made.inputs.location,
        "genes_fit_on": made.genes.fit_on,
        "dose_unit": config.columns.dose_unit,
        "dropped": made.dropped,
    }


def _remove_strays(store: Path, written: list[WrittenShards]) -> None:
    """Remove what a task left that was killed and then done in another way."""
    known = {f"{store.name}/{file.relative_to(store).as_posix()}": file for file in _files(store)}
    wanted = {name for result in written for name in result.files}
    for name, file in known.items():
        if name not in wanted:
            file.unlink()


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _counts_word(inputs: Inputs) -> str:
    return "recovered" if inputs.is_recovered else "read"
