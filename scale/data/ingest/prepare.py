"""From count matrices to a store: look at the labels, choose the genes, spill the cells, write.

Labels come first, because their mistakes are cheap to find. Then the cells pass by once, or twice
where the genes are chosen by their variance: pieces of the input are read, packed and spilled by
bucket, and each shard is written from its buckets. The store depends on the cells, the settings and
the seed, not on how the input was cut into files of equal order, pieces and blocks, on the number
of processes, or on how often it was killed and started again.

Memory is that of the workers, ``WORKER_BYTES`` each beside Python and its libraries, and the labels
of the largest file (about 90 bytes per cell of it) while they are read.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from scale.config import PrepareConfig, Restart
from scale.data.ingest.identity import describe_identity
from scale.data.ingest.journal import Journal
from scale.data.ingest.opened import close_opened
from scale.data.ingest.report import PrepareReport
from scale.data.ingest.source import Source
from scale.data.ingest.sources import make_sources
from scale.data.ingest.stages import Progress, Sizes, Stages
from scale.data.ingest.workers import Workers
from scale.data.partial import PartialDirectory
from scale.data.store_files import MANIFEST
from scale.types import StoreError

logger = logging.getLogger(__name__)

WORKER_BYTES = 320 << 20
"""Most memory that one worker needs for cells: a piece in two copies and a block of the input, or a
bucket in two copies."""
SMALL_BYTES = 256 << 20
"""Inputs below this are done by one process: starting others takes as long."""
JOURNAL = "journal.jsonl"


def prepare(
    config: PrepareConfig, *, progress: Progress | None = None, sizes: Sizes | None = None
) -> PrepareReport:
    """Write a store.

    A run that was killed is continued by the same call, unless ``restart=discard``: finished tasks
    are not done again, and the store is the same, byte for byte.

    Parameters
    ----------
    config
        Settings of ``scale prepare``.
    progress
        Called now and then with what is being done, how much is done, and how much there is.
    sizes
        How the work is cut; changes memory and speed, never the store.

    Raises
    ------
    SourceError
        If the input cannot be used; the message says where and what to do. Nothing is written.
    StoreError
        If there is a store already, or the rest of another one.
    OSError
        If a disk is full, or a worker process is gone: what is done is kept for the next start.
    """
    path = Path(config.store)
    _check_target(path, overwrite=config.overwrite)
    sources = make_sources(config)
    identity = describe_identity(config, sources)
    directory = PartialDirectory(
        path,
        overwrite=config.overwrite,
        mark=MANIFEST,
        keep=JOURNAL if config.restart is Restart.resume else None,
    )
    try:
        journal = _open_journal(directory, identity)
        with Workers(_number_of_workers(config, sources)) as workers:
            stages = Stages(config, sizes or Sizes(), directory, journal, workers, progress)
            report = stages.report() or stages.run(sources)
        close_opened()
        _remove_scaffold(directory)
        directory.commit()
    except _OtherStoreError as error:
        directory.leave()
        raise StoreError(str(error)) from None
    except ValueError:
        directory.abort()
        raise
    except BaseException:
        if directory.is_open:
            directory.leave()
            logger.warning("%s keeps what is done; the same command goes on", directory.folder)
        raise
    finally:
        close_opened()
    return report


class _OtherStoreError(StoreError):
    """What lies in the way is not ours to remove."""


def _check_target(path: Path, *, overwrite: bool) -> None:
    """Find out now, not after hours of reading, whether the store can be written."""
    if path.exists() and not overwrite:
        raise StoreError(f"{path} exists; give another store=, or overwrite=true")
    if path.exists() and not (path / MANIFEST).exists():
        raise StoreError(f"{path} is no store and is not overwritten; give another store=")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StoreError(f"{path} cannot be written: {parent} is no writable directory")


def _open_journal(directory: PartialDirectory, identity: dict[str, object]) -> Journal:
    """Return the journal of this store, of an earlier start where there is one."""
    try:
        journal = Journal(directory.folder / JOURNAL, directory.folder, identity)
    except StoreError as error:
        raise _OtherStoreError(str(error)) from error
    if journal.is_finished and not (directory.partial / MANIFEST).exists():
        # The store got its name, and the process was killed before it removed the rest.
        directory.clear()
        journal = Journal(directory.folder / JOURNAL, directory.folder, identity)
    if journal.num_found:
        logger.info("going on: %d tasks were finished before", journal.num_found)
    return journal


def _number_of_workers(config: PrepareConfig, sources: list[Source]) -> int:
    """Return how many processes read and write; one where cells are in this process already."""
    paths = [source.path for source in sources]
    if any(path is None for path in paths):
        return 1
    wanted = config.num_workers
    if wanted is None:
        files = [file for path in paths if path is not None for file in _files_of(path)]
        is_small = sum(file.stat().st_size for file in files) < SMALL_BYTES
        wanted = 1 if is_small else len(os.sched_getaffinity(0))
    possible = max(1, config.memory_bytes // WORKER_BYTES)
    number = min(wanted, possible)
    logger.info(
        "workers: %d, each with up to %d MiB beside Python%s",
        number,
        WORKER_BYTES >> 20,
        "" if wanted <= possible else f"; memory_bytes ({config.memory_bytes:,}) allows no more",
    )
    return number


def _files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _remove_scaffold(directory: PartialDirectory) -> None:
    """Remove what only the making needed; the journal goes with the directory."""
    for file in directory.folder.iterdir():
        if file not in (directory.partial, directory.folder / JOURNAL):
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink()
