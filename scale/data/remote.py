"""A store at an address (https, s3, file, ...): its files are fetched when first needed, and kept.

The manifest and the small files come when the store is opened, a shard when its first byte is read,
as a whole and in ranges, so that a fetch that was stopped goes on where it was. What was fetched
lies in ``<cache>/<sha256 of the manifest>/`` under the names of the store and is compared with the
manifest before it gets its name there: the cache never holds half a file, and a store that changes
at its address gets another directory.

All processes of a machine share the cache. Who fetches a file holds its lock, so the others wait; a
shard in use carries a shared lock, so that making room for others leaves it alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scale.data.store_files import LARGE_FILES, MANIFEST, file_sha256, parse_manifest
from scale.runtime import atomic_path
from scale.types import StoreError

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 8 << 20
"""Of one request: large against the latency of any object storage, small against memory."""
_WAIT_SECONDS = (1.0, 3.0, 9.0)
"""Before a failed request is tried again."""
_COLLAPSED = re.compile(r"[A-Za-z][A-Za-z0-9+.]+:/[^/]")


_TRY_AGAIN = (408, 425, 429)
"""Answers below 500 that are not about the request."""


class _Unreachable(StoreError):
    """The address does not answer."""


def is_remote(path: Path | str) -> bool:
    """Return whether this is an address, not a directory."""
    if isinstance(path, Path) and _COLLAPSED.match(str(path)) and not path.exists():
        raise StoreError(f"{path}: a Path loses a slash of an address; give it as text")
    return "://" in str(path)


def default_cache_dir() -> Path:
    """Return where remote stores are kept if no setting says it."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "scale" / "stores"


class RemoteFiles:
    """The files of a store at an address.

    Parameters
    ----------
    address
        Anything that fsspec opens: ``https://``, ``s3://``, ``file://``.
    cache_dir
        Directory for what is fetched, for all stores; None = :func:`default_cache_dir`.
    cache_bytes
        Most bytes of shards in it; the ones that were opened longest ago make room, those in use
        never. None = no limit.

    Attributes
    ----------
    path
        Directory in the cache with the manifest and all small files, checked.

    Raises
    ------
    StoreError
        If the address cannot be opened or holds no store, or a file is not what the manifest says.
    """

    def __init__(
        self, address: str, *, cache_dir: Path | str | None = None, cache_bytes: int | None = None
    ) -> None:
        self.address = _without_password(address).rstrip("/")
        self._system, self._root = _file_system(address, self.address)
        self._cache = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self._cache_bytes = cache_bytes
        self._is_overfull = False
        raw = self._manifest()
        manifest = parse_manifest(raw, self.address)
        self.path: Path = self._cache / manifest["sha256"]
        self._files: dict[str, dict[str, Any]] = {f["path"]: f for f in manifest["files"]}
        with self._cache_errors():
            self._remember(raw)
        for name in self._files:
            if not name.startswith(LARGE_FILES):
                self.fetch(name, verify=True)

    # --- what the store asks for ------------------------------------------------------------------

    def open(self, name: str) -> int:
        """Return a descriptor of a file, fetched if need be; while it is open, the file stays."""
        with self._cache_errors():
            while True:
                descriptor = self._open_cached(name)
                if descriptor is not None:
                    return descriptor
                self._fetch(self._files[name])

    def fetch(self, name: str, *, verify: bool = False) -> Path:
        """Return the local path of a file, fetched if need be.

        Parameters
        ----------
        name
            As in the manifest.
        verify
            Compare a file that was here already with the manifest; fetch it again if it differs.
        """
        os.close(self.open(name))
        path = self.path / name
        if verify and file_sha256(path) != self._files[name]["sha256"]:
            logger.warning("%s is damaged and fetched again", path)
            path.unlink(missing_ok=True)
            os.close(self.open(name))
        return path

    def verify(self) -> None:
        """Fetch every file and check every byte."""
        for name in self._files:
            self.fetch(name, verify=True)

    # --- the cache --------------------------------------------------------------------------------

    def _open_cached(self, name: str) -> int | None:
        """Return a descriptor that holds a file of the cache, or None if there is none."""
        path = self.path / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits only while the file is being removed
        found = os.fstat(descriptor)
        if found.st_nlink and found.st_size == self._files[name]["size"]:
            os.utime(descriptor)
            return descriptor
        os.close(descriptor)
        if found.st_nlink:
            logger.warning("%s has %d bytes and is fetched again", path, found.st_size)
            path.unlink(missing_ok=True)
        return None

    def _fetch(self, file: dict[str, Any]) -> None:
        """Put a file into the cache, unless another process does."""
        path = self.path / file["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")):
            if path.exists():
                return
            partial = path.with_name(path.name + ".partial")
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # nobody else waits; it is not unused
                self._download(descriptor, file, partial)
                os.fsync(descriptor)
                partial.rename(path)
            finally:
                os.close(descriptor)

    def _download(self, descriptor: int, file: dict[str, Any], partial: Path) -> None:
        """Complete a file, and check it."""
        name, started = file["path"], time.monotonic()
        if name.startswith(LARGE_FILES):
            self._make_room(file["size"] - os.fstat(descriptor).st_size)
        found = self._fill(descriptor, file)
        if found != file["sha256"]:
            logger.warning("%s/%s came damaged and is fetched again", self.address, name)
            os.ftruncate(descriptor, 0)
            found = self._fill(descriptor, file)
        if found != file["sha256"]:
            partial.unlink()
            raise StoreError(
                f"{self.address}/{name} is damaged: sha256 {found[:12]}, the manifest says "
                f"{file['sha256'][:12]}; fetched twice. Put it there again from a copy; if the "
                "store was replaced meanwhile, open it anew"
            )
        if name.startswith(LARGE_FILES):
            seconds = time.monotonic() - started
            logger.info(
                "fetched %s/%s: %.1f MB in %.1f s", self.address, name, file["size"] / 1e6, seconds
            )

    def _fill(self, descriptor: int, file: dict[str, Any]) -> str:
        """Append what is missing of a file; return the sha256 of the whole."""
        size, digest = int(file["size"]), sha256()
        done = os.fstat(descriptor).st_size
        if done > size:
            os.ftruncate(descriptor, 0)
            done = 0
        for start in range(0, done, _BLOCK_BYTES):
            digest.update(os.pread(descriptor, min(_BLOCK_BYTES, done - start), start))
        while done < size:
            block = self._read(file["path"], done, min(done + _BLOCK_BYTES, size))
            digest.update(block)
            end = done + len(block)
            while done < end:
                done += os.pwrite(descriptor, block[len(block) - (end - done) :], done)
        return digest.hexdigest()

    def _make_room(self, num_bytes: int) -> None:
        """Remove what was opened longest ago, of any store, as far as nobody uses it."""
        if self._cache_bytes is None:
            return
        with _locked(self._cache / "room.lock"):
            files = {
                path: path.stat()
                for folder in LARGE_FILES
                for path in self._cache.glob(f"*/{folder}*")
            }
            excess = sum(stat.st_size for stat in files.values()) + num_bytes - self._cache_bytes
            for path in sorted(files, key=lambda path: files[path].st_mtime_ns):
                if excess > 0 and _remove_unused(path):
                    logger.info("removed %s from the cache", path)
                    excess -= files[path].st_size
        if excess > 0 and not self._is_overfull:
            self._is_overfull = True
            logger.warning(
                "%s: shards in use leave no room for data.cache_bytes=%d; they stay, and the cache "
                "grows beyond it",
                self._cache,
                self._cache_bytes,
            )

    def _remember(self, raw: bytes) -> None:
        """Keep the manifest, and which one the address had, for when it does not answer."""
        if not (self.path / MANIFEST).exists():
            with atomic_path(self.path / MANIFEST) as temporary:
                temporary.write_bytes(raw)
        with atomic_path(self._memory()) as temporary:
            temporary.write_text(json.dumps({"address": self.address, "store": self.path.name}))

    def _memory(self) -> Path:
        return self._cache / "addresses" / f"{sha256(self.address.encode()).hexdigest()}.json"

    def _manifest(self) -> bytes:
        """Return the manifest at the address, or the last one if the address does not answer."""
        try:
            return self._read(MANIFEST)
        except _Unreachable as error:
            try:
                store = self._cache / str(json.loads(self._memory().read_text())["store"])
                raw = (store / MANIFEST).read_bytes()
            except (OSError, ValueError, KeyError):
                raise error from error.__cause__
            logger.warning("%s; going on with what was fetched of it before, %s", error, store)
            return raw

    @contextmanager
    def _cache_errors(self) -> Iterator[None]:
        """Name the setting when the cache cannot be written."""
        try:
            yield
        except OSError as error:
            what = "is full" if error.errno == errno.ENOSPC else "cannot be used"
            raise StoreError(
                f"the cache of remote stores, {self._cache}, {what}: {error}; choose another "
                "directory with data.cache_dir, or less space with data.cache_bytes"
            ) from error

    # --- the address ------------------------------------------------------------------------------

    def _read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return bytes of a file, or all of it."""
        place = f"{self.address}/{name}"
        for wait in (*_WAIT_SECONDS, None):
            try:
                data: bytes = self._system.cat_file(f"{self._root}/{name}", start=start, end=stop)
            except FileNotFoundError as error:
                what = "there is no store" if name == MANIFEST else "the manifest names it"
                raise StoreError(f"{place} does not exist; {what}") from error
            except Exception as error:  # what fsspec's back ends raise has no common class
                status = getattr(error, "status", None)  # of an answer over HTTP
                is_refused = status is not None and status < 500 and status not in _TRY_AGAIN
                is_final = is_refused or isinstance(error, PermissionError)
                if wait is None or is_final:
                    text = f"{type(error).__name__}: {error}"
                    kind = StoreError if is_final else _Unreachable
                    raise kind(f"{place} cannot be fetched ({text})") from error
                logger.warning("%s: %s; trying again", place, error or type(error).__name__)
                time.sleep(wait)
            else:
                break
        if start is not None and stop is not None and len(data) != stop - start:
            raise StoreError(
                f"{place}: asked for bytes {start} to {stop}, got {len(data)}; the file is not the "
                "one that the manifest names, or the server does not answer range requests"
            )
        return data


def _file_system(address: str, shown: str) -> tuple[Any, str]:
    """Return the file system behind an address, and the path on it."""
    try:
        from fsspec.core import url_to_fs

        system, root = url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise StoreError(
            f"{shown} cannot be opened: {error}. Remote stores need pip install "
            "'scale-virtual-cell[remote]', and some addresses a package of their own (s3fs, gcsfs)"
        ) from error
    return system, root.rstrip("/")


def _without_password(address: str) -> str:
    """Return an address for messages and records."""
    parts = urlsplit(address)
    return address.replace(f"{parts.netloc}", parts.netloc.rpartition("@")[2], 1)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that no other process or thread has meanwhile; it is a file of its own.

    A lock on what is fetched would not do: who waits for it would wait for a shard that is in use.
    """
    is_held = False
    while not is_held:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            is_held = _is_at(path, descriptor)  # not if the one before us removed it
            if is_held:
                yield
        finally:
            if is_held:
                path.unlink(missing_ok=True)
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether this is the name of an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process holds it; return whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
