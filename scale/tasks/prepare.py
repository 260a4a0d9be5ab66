"""``scale prepare``: count matrices to a store of cell sets.

scale prepare                                            # a synthetic store in data/toy
scale prepare source=h5ad source.files=cells.h5ad store=data/mine columns.perturbation=drug \
    columns.cell_type=cell_line control=DMSO
scale prepare verify=data/mine                           # check every byte of a store, and stop
"""

from pathlib import Path

from scale.config import PrepareConfig, to_yaml
from scale.data.ingest.prepare import prepare
from scale.data.store import CellSetStore
from scale.runtime import RunRecord, World, start_logging
from scale.tasks.progress import CellProgress


def run(config: PrepareConfig) -> int:
    """Write or check a store and return the exit status."""
    if config.verify is not None:
        return _verify(Path(config.verify))
    run_dir = Path(config.run_dir)
    start_logging(run_dir / "prepare.log", World(0, 1, 0))
    (run_dir / "config.yaml").write_text(to_yaml(config))
    record = RunRecord(run_dir, World(0, 1, 0), {"store": config.store, "seed": config.seed})
    report = prepare(config, progress=CellProgress())
    with CellSetStore.open(report.path) as store:
        record.close("done", num_cells=report.num_cells, store_fingerprint=store.fingerprint)
    print(report.table())
    return 0


def _verify(path: Path) -> int:
    with CellSetStore.open(path, verify="full") as store:
        files = store.manifest["files"]
        size = sum(file["size"] for file in files)
        for chunk in range(len(store.chunks)):
            store.read_chunk(chunk)
    print(
        f"{path}: {size:,} bytes in {len(files):,} files and {len(store.chunks):,} chunks are whole"
    )
    return 0
