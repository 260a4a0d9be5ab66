"""``scale prepare``: count matrices to a store of cell sets, and what can be done with stores.

scale prepare                                            # a synthetic store in data/toy
scale prepare source=h5ad source.files=cells.h5ad store=data/mine columns.perturbation=drug \
    columns.cell_type=cell_line control=DMSO
scale prepare source=store source.files=[data/a,data/b] store=data/c genes=list \
    genes.file=genes.txt columns.perturbation=drug columns.cell_type=cell_line control=DMSO
scale prepare verify=data/mine                           # check every byte of a store, and stop
scale prepare store=data/mine export=mine.h5ad           # or mine.scdl, BioNeMo's archive; and stop
scale prepare merge=[data/a,data/b] store=data/c         # join without reading cells, and stop
"""

from pathlib import Path

from scale.config import PrepareConfig, to_yaml
from scale.data.export import export_store
from scale.data.ingest.prepare import prepare
from scale.data.merge import merge_stores
from scale.data.store import CellSetStore
from scale.runtime import RunRecord, World, start_logging
from scale.tasks.progress import CellProgress

_WORLD = World(0, 1, 0)


def run(config: PrepareConfig) -> int:
    """Write, check, export or merge, and return the exit status."""
    modes = {
        "verify": config.verify is not None,
        "export": config.export is not None,
        "merge": bool(config.merge),
    }
    chosen = [name for name, is_given in modes.items() if is_given]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} are given; do one of them at a time")
    if not chosen:
        return _prepare(config)
    if config.verify is not None:
        print(_verify(config.verify))
    elif config.export is not None:
        print(_export(config.store, Path(config.export), overwrite=config.overwrite))
    else:
        paths = [Path(path) for path in config.merge]
        print(_merge(paths, Path(config.store), overwrite=config.overwrite))
    return 0


def _prepare(config: PrepareConfig) -> int:
    run_dir = Path(config.run_dir)
    start_logging(run_dir / "prepare.log", _WORLD)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    record = RunRecord(run_dir, _WORLD, {"store": config.store, "seed": config.seed})
    report = prepare(config, progress=CellProgress())
    with CellSetStore.open(report.path) as store:
        record.close("done", num_cells=report.num_cells, store_fingerprint=store.fingerprint)
    print(report.table())
    return 0


def _verify(path: str) -> str:
    with CellSetStore.open(path, verify="full") as store:
        files = store.manifest["files"]
        size = sum(file["size"] for file in files)
        done, total, progress = 0, int(store.manifest["num_cells"]), CellProgress()
        for chunk in range(len(store.chunks)):
            done += store.read_chunk(chunk).num_cells
            progress("verify", done, total)
    return (
        f"{path}: {size:,} bytes in {len(files):,} files and {len(store.chunks):,} chunks are whole"
    )


def _export(path: str, target: Path, *, overwrite: bool) -> str:
    start_logging(None, _WORLD)
    with CellSetStore.open(path) as store:
        num_cells = export_store(store, target, overwrite=overwrite, progress=CellProgress())
        return f"{target}: {num_cells:,} cells, {store.num_genes:,} genes of {path}"


def _merge(paths: list[Path], target: Path, *, overwrite: bool) -> str:
    start_logging(None, _WORLD)
    merge_stores(paths, target, overwrite=overwrite, progress=CellProgress())
    with CellSetStore.open(target) as store:
        facts = store.manifest
        return (
            f"{target}: {facts['num_cells']:,} cells in {facts['num_conditions']:,} conditions of "
            f"{len(paths)} stores"
        )
