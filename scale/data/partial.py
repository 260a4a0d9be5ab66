"""A directory that is whole or absent: written under another name, renamed when complete.

An error on the way removes what was written. A process that was killed leaves ``DIR.partial``,
which the next writer of that name clears; a lock tells it from one that is still being written.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from pathlib import Path

from scale.runtime import sync_directory
from scale.types import StoreError

logger = logging.getLogger(__name__)


class PartialDirectory:
    """Claim the name of a directory that does not exist yet, or is to be replaced.

    Parameters
    ----------
    path
        The directory.
    overwrite
        Whether it may exist. It is replaced only when the new one is complete, and only if it holds
        ``mark``: a misspelt path must not cost somebody's home directory.
    mark
        Name of the file that says that a directory is of our kind.

    Raises
    ------
    StoreError
        If the directory exists and may not be replaced, or another process is writing it.
    """

    def __init__(self, path: Path, *, overwrite: bool, mark: str) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._replaced = path.with_name(path.name + ".replaced")
        self._overwrite, self._mark = overwrite, mark
        self._lock: int | None = None
        self._claim()

    @property
    def is_open(self) -> bool:
        """Whether the directory is still being written."""
        return self._lock is not None

    def _claim(self) -> None:
        if self._replaced.exists() and not self.path.exists():
            self._replaced.rename(self.path)  # a process was killed between two renames
        self._refuse_existing()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir(exist_ok=True)
        lock = os.open(self.partial, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise StoreError(
                f"another process is writing {self.partial}; wait for it, or choose another name"
            ) from error
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s is not locked: %s", self.partial, error.strerror)
        self._lock = lock
        for left in self.partial.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()

    def _refuse_existing(self) -> None:
        if not self.path.exists():
            return
        if not self._overwrite:
            raise StoreError(f"{self.path} exists; choose another name, or set overwrite=true")
        is_ours = self.path.is_dir() and (self.path / self._mark).exists()
        if not is_ours:
            raise StoreError(
                f"{self.path} has no {self._mark}, so it is not overwritten; remove it yourself, "
                "or choose another name"
            )

    def commit(self) -> None:
        """Give the directory its name; its files must have been synced."""
        self._refuse_existing()
        sync_directory(self.partial)
        if self.path.exists():
            if self._replaced.exists():
                shutil.rmtree(self._replaced)
            self.path.rename(self._replaced)
        self.partial.rename(self.path)
        sync_directory(self.path.parent)
        self._release()
        if self._replaced.exists():
            shutil.rmtree(self._replaced)

    def abort(self) -> None:
        """Remove what was written; a directory that was to be replaced stays."""
        if self._lock is None:
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        if self._replaced.exists() and not self.path.exists():
            self._replaced.rename(self.path)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
