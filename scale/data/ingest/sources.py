"""Which source each format of ``source.format`` is."""

from __future__ import annotations

from pathlib import Path

from scale.config import PrepareConfig, SourceFormat
from scale.data.ingest.h5ad import H5adSource
from scale.data.ingest.scdl import ScdlSource
from scale.data.ingest.source import Source, find_files
from scale.data.ingest.tahoe import TahoeSource
from scale.data.ingest.tahoe_tables import WHERE_TABLES_ARE, read_tables
from scale.data.simulate import SimulationConfig, simulate
from scale.types import SourceError


def make_sources(config: PrepareConfig) -> list[Source]:
    """Return the sources of ``prepare``, in the order that numbers their cells.

    Raises
    ------
    SourceError
        If no file is there, or the metadata that the format needs are not.
    """
    settings = config.source
    if settings.format is SourceFormat.synthetic:
        simulation = SimulationConfig(num_cells=settings.num_cells, seed=config.seed)
        adata = simulate(simulation).to_anndata()
        return [H5adSource(adata, memory_bytes=config.memory_bytes)]
    paths = find_files(settings.files)
    match settings.format:
        case SourceFormat.h5ad:
            return [H5adSource(path, memory_bytes=config.memory_bytes) for path in paths]
        case SourceFormat.scdl:
            return [ScdlSource(path) for path in paths]
        case SourceFormat.store:
            # reads what the loader reads and so imports torch, which no other source needs
            from scale.data.ingest.from_store import StoreSource

            if config.columns.library is None:
                raise SourceError(
                    "columns.library is null: the totals over all genes, which a store keeps in "
                    "its column library, would be replaced by totals over its stored genes; set "
                    "columns.library=library"
                )
            return [StoreSource(path) for path in paths]
        case SourceFormat.tahoe_parquet:
            if settings.metadata is None:
                raise SourceError(f"source.metadata is not given; {WHERE_TABLES_ARE}")
            read_tables(Path(settings.metadata))  # what is wrong with them is known before any file
            return [TahoeSource(path, Path(settings.metadata)) for path in paths]
