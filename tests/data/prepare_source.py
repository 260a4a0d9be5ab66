"""A source for ``prepare`` and its settings, for tests and for the processes that they start.

Run as a script it reads lines ``SOURCE STORE NUM_WORKERS`` and prepares each in a forked child, so
that the imports are paid once; it tells the pid of the child at its start, and at the end how it
ended, the bytes of memory it has had and the microseconds of CPU time it took.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scale.config import (
    ColumnsConfig,
    GeneChoice,
    GenesConfig,
    PrepareConfig,
    SourceConfig,
    SourceFormat,
)
from scale.data.ingest.prepare import prepare
from scale.data.ingest.stages import Sizes

LINES, PLATES, DRUGS = ("A549", "K562"), ("p1", "p2"), ("DMSO", "drugA", "drugB", "drugC")
MANY_TASKS = Sizes(block_cells=300, moment_cells=900, piece_bytes=60_000, bucket_bytes=40_000)
"""Of the source below: several pieces, several buckets of one condition, several shards."""


def write_source(
    path: Path, *, num_cells: int, num_genes: int, num_nonzero: int, seed: int = 0
) -> Path:
    """Write an h5ad with counts that are quickly made."""
    rng = np.random.default_rng(seed)
    size = rng.integers(num_nonzero // 2, num_nonzero * 3 // 2, num_cells)
    step = num_genes // (2 * num_nonzero)
    gaps = rng.integers(1, 2 * max(step, 1), (num_cells, int(size.max())), np.int32)
    columns = np.cumsum(gaps, axis=1) - 1
    is_there = (np.arange(columns.shape[1]) < size[:, None]) & (columns < num_genes)
    indptr = np.concatenate([[0], np.cumsum(is_there.sum(axis=1))])
    counts = rng.geometric(0.6, indptr[-1]).astype(np.float32)
    matrix = sp.csr_matrix((counts, columns[is_there], indptr), shape=(num_cells, num_genes))
    obs = pd.DataFrame(
        {
            "drug": pd.Categorical(rng.choice(DRUGS, num_cells, p=[0.4, 0.25, 0.25, 0.1])),
            "line": pd.Categorical(rng.choice(LINES, num_cells)),
            "plate": pd.Categorical(rng.choice(PLATES, num_cells)),
        },
        index=[f"cell{i}" for i in range(num_cells)],
    )
    var = pd.DataFrame(index=[f"gene{g}" for g in range(num_genes)])
    ad.AnnData(matrix, obs=obs, var=var).write_h5ad(path)
    return path


def settings(files: list[Path], store: Path, **changes: object) -> PrepareConfig:
    """Return settings for :func:`write_source`."""
    values: dict[str, object] = {
        "name": "test",
        "run_dir": str(store.parent / "run"),
        "store": str(store),
        "source": SourceConfig(format=SourceFormat.h5ad, files=[str(file) for file in files]),
        "columns": ColumnsConfig(perturbation="drug", cell_type="line", batch="plate"),
        "control": "DMSO",
        "genes": GenesConfig(choice=GeneChoice.hvg, num=100),
        "minimum_cells": 1,
        "shard_bytes": 20_000,
    }
    return PrepareConfig(**(values | changes))


def _warm_up(source: Path, folder: Path) -> None:
    """Load what is compiled, for all children; Arrow, whose threads do not fork, comes later."""

    def stop(what: str, done: int, total: int) -> None:
        if what == "write":
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        prepare(settings([source], folder / "warm"), progress=stop)
    shutil.rmtree(folder / "warm.partial")


def _serve() -> None:
    is_warm = False
    for line in sys.stdin:
        source, store, num_workers = line.split()
        if not is_warm:
            _warm_up(Path(source), Path(store).parent)
            is_warm = True
        child = os.fork()
        if not child:
            changes = {"num_workers": int(num_workers), "shard_bytes": 1 << 20}
            sizes = Sizes(piece_bytes=1 << 20, bucket_bytes=1 << 20)
            prepare(settings([Path(source)], Path(store), **changes), sizes=sizes)
            os._exit(0)
        _tell(child)
        _, status, usage = os.wait4(child, 0)
        seconds = usage.ru_utime + usage.ru_stime
        _tell(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, round(1e6 * seconds))


def _tell(*numbers: int) -> None:
    sys.stdout.write(" ".join(map(str, numbers)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
