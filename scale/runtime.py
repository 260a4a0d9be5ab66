"""The process a command runs in: rank, device, memory, stop signal, log, run record."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PROCESS_STARTED = time.monotonic()
"""When this module was loaded; not the age of the process, which a shell's ``exec`` hands on."""
EXIT_ERROR = 1
EXIT_AGAIN = 75
"""Stopped on request with a checkpoint written: start me again (EX_TEMPFAIL of sysexits.h)."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_MADV_HUGEPAGE, _LARGE_PAGE = 14, 1 << 21  # of mman.h; bytes on x86 and most ARM
_HEAP_BYTES, _MOST_BLOCKS = 1 << 30, 64


# --- world and device ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class World:
    """Which process this is among how many."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> World:
        """Read torchrun's variables, else those of a Slurm step with several tasks, else alone.

        ``SLURM_NTASKS`` is not read: it is set in the batch script too, where a plain call would
        wait for ranks that never come.
        """
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return cls(
                int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", 0))
            )
        if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            world = cls(
                int(environ["SLURM_PROCID"]),
                int(environ["SLURM_STEP_NUM_TASKS"]),
                int(environ["SLURM_LOCALID"]),
            )
            os.environ["RANK"] = str(world.rank)
            os.environ["WORLD_SIZE"] = str(world.size)
            os.environ["LOCAL_RANK"] = str(world.local_rank)
            return world
        return cls(0, 1, 0)


def choose_device(requested: str, world: World) -> torch.device:
    """Return the device of this rank and log why it was chosen.

    Raises
    ------
    ValueError
        If CUDA was asked for and there is none.
    """
    import torch

    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise ValueError("device=cuda, but torch finds no CUDA device; use device=cpu or auto")
    if requested == "cpu" or not available:
        logger.info("device cpu (%s)", "asked for" if requested == "cpu" else "no CUDA device")
        return torch.device("cpu")
    index = world.local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    logger.info("device cuda:%d (%s)", index, torch.cuda.get_device_name(index))
    return torch.device("cuda", index)


def peak_memory_bytes() -> int:
    """Return the largest resident size this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, and the kernel back it by large pages.

    Blocks come and go: without this their pages are faulted in anew, a tenth of the CPU time of a
    conversion and of a training step on a CPU, and looked up 4 KiB at a time, another 3 % of a
    step. The room for large pages is address space until it is used. Other C libraries have no such
    calls.
    """
    library = ctypes.CDLL(None)
    mallopt = getattr(library, "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # the largest that is allowed
    mallopt(_M_TOP_PAD, _HEAP_BYTES)
    library.sbrk.restype = library.malloc.restype = ctypes.c_void_p
    start = library.sbrk(0)
    blocks: list[ctypes.c_void_p] = []
    while library.sbrk(0) == start and len(blocks) < _MOST_BLOCKS:  # until the heap has grown
        blocks.append(ctypes.c_void_p(library.malloc((1 << 25) - (1 << 12))))
    for block in blocks:
        library.free(block)
    start, end = -(-start // _LARGE_PAGE) * _LARGE_PAGE, library.sbrk(0)
    if end > start:
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)


# --- stop on request ----------------------------------------------------------------------------


class StopSignal:
    """A flag that SIGTERM and SIGUSR1 set; the training loop leaves at the end of a step.

    Leaving from inside the handler would break a collective of the other ranks.
    """

    _NAMES = ("SIGTERM", "SIGUSR1")

    def __init__(self) -> None:
        self.received: str | None = None

    def install(self) -> StopSignal:
        """Take the signals over; call it before torch is imported, an early one kills."""
        for name in self._NAMES:
            signal.signal(getattr(signal, name), self._handle)
        return self

    @classmethod
    def ignore(cls) -> None:
        """Ignore the signals from here on.

        A launcher that sees the first rank end sends SIGTERM to the others, and Python, which puts
        handlers back when it shuts down, would let it change their status.
        """
        for name in cls._NAMES:
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    def _handle(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number).name


# --- log ----------------------------------------------------------------------------------------


def start_logging(log_file: Path | None, world: World) -> None:
    """Send the package's log to the console and ``log_file`` on rank 0; elsewhere only warnings."""
    package = logging.getLogger("scale")
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()
    package.setLevel(logging.INFO if world.rank == 0 else logging.WARNING)
    package.propagate = False
    console = logging.StreamHandler()
    prefix = "" if world.rank == 0 else f"rank {world.rank}: "
    console.setFormatter(logging.Formatter(prefix + "%(message)s"))
    package.addHandler(console)
    if log_file is not None and world.rank == 0:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        written = logging.FileHandler(log_file)
        written.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        package.addHandler(written)


# --- files that are whole or absent -------------------------------------------------------------


def sync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success it is synced and renamed to ``path``.

    On an error the temporary file is removed and ``path`` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, record: object) -> None:
    """Write JSON under ``path`` by rename."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def replace_nan(value: float) -> float | None:
    """Return None for a value that JSON cannot hold."""
    return value if math.isfinite(value) else None


# --- the record of a run ------------------------------------------------------------------------

_RECORDED = ("torch", "megatron-core", "numpy", "anndata", "numba", "hydra-core")


def versions() -> dict[str, str]:
    """Return the versions that decide numbers: this package, Python and its libraries."""
    found = {"scale": package_version(), "python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def package_version() -> str:
    """Return the version of this package."""
    try:
        return metadata.version("scale-virtual-cell")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def git_state() -> dict[str, Any]:
    """Return commit and dirty flag of the source tree; an image gives ``SCALE_GIT_SHA``."""
    if sha := os.environ.get("SCALE_GIT_SHA"):
        return {"sha": sha, "dirty": None}
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {"sha": None, "dirty": None}

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"sha": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


class RunRecord:
    """``run.json``: one entry per start of a run; written by rank 0 at the start and at the end.

    Parameters
    ----------
    run_dir
        The run's directory.
    world
        Only rank 0 writes.
    facts
        What else explains the run: layout, seed, store fingerprint, split hash.
    """

    def __init__(self, run_dir: Path, world: World, facts: Mapping[str, Any]) -> None:
        self._path = run_dir / "run.json"
        self._is_writer = world.rank == 0
        self._starts: list[dict[str, Any]] = []
        if self._is_writer and self._path.exists():
            self._starts = json.loads(self._path.read_text())["starts"]
        self._entry: dict[str, Any] = {
            "started": _now(),
            "ended": None,
            "exit_reason": None,
            "argv": sys.argv,
            "host": platform.node(),
            "world_size": world.size,
            "git": git_state(),
            "versions": versions(),
            **facts,
        }
        self._write()

    def close(self, exit_reason: str, **facts: object) -> None:
        """Record why and when the run ended."""
        self._entry.update(facts)
        self._entry.update(
            ended=_now(), exit_reason=exit_reason, peak_rss_bytes=peak_memory_bytes()
        )
        self._write()

    def _write(self) -> None:
        if self._is_writer:
            write_json(self._path, {"starts": [*self._starts, self._entry]})


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
