"""A directory that is whole or absent: written under another name, renamed when complete.

While ``DIR`` is being written there is ``DIR.partial``; its folder ``content`` gets the name in the
end, what else is in it is a matter of the writer. An error on the way removes what was written,
unless the writer can go on later. A lock tells the rest of a process that was killed from a
directory that is still being written.
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
    keep
        Name of a file in ``folder``: if it is there, what an earlier writer has left stays, else it
        is removed.

    Raises
    ------
    StoreError
        If the directory exists and may not be replaced, or another process is writing it.
    """

    def __init__(self, path: Path, *, overwrite: bool, mark: str, keep: str | None = None) -> None:
        self.path = path
        self.folder = path.with_name(path.name + ".partial")
        """Where the writer may keep files of its own."""
        self.partial = self.folder / "content"
        """What gets the name."""
        self._replaced = path.with_name(path.name + ".replaced")
        self._overwrite, self._mark = overwrite, mark
        self._lock: int | None = None
        self._claim()
        if keep is None or not (self.folder / keep).exists():
            self.clear()

    @property
    def is_open(self) -> bool:
        """Whether the directory is still being written."""
        return self._lock is not None

    def _claim(self) -> None:
        if self._replaced.exists() and not self.path.exists():
            self._replaced.rename(self.path)  # a process was killed between two renames
        self._refuse_existing()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(exist_ok=True)
        lock = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise StoreError(
                f"another process is writing {self.folder}; wait for it, or choose another name"
            ) from error
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s is not locked: %s", self.folder, error.strerror)
        self._lock = lock

    def clear(self) -> None:
        """Remove everything that was written."""
        for left in self.folder.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
        self.partial.mkdir()

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
        self.abort()
        if self._replaced.exists():
            shutil.rmtree(self._replaced)

    def abort(self) -> None:
        """Remove what was written; a directory that was to be replaced stays."""
        if self._lock is None:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._replaced.exists() and not self.path.exists():
            self._replaced.rename(self.path)
        self.leave()

    def leave(self) -> None:
        """Let go of the name, and keep what was written for a later start."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
