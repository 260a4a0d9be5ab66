"""The process a command runs in: rank, device, random draws, stop signal, log, run record.

Random draws are counter-based: a number is a pure function of (seed, purpose, counters), so that
every layout of ranks, every micro-batch size and every resumed run sees the same draws. ``data``
uses the NumPy form and ``model`` the torch form of one primitive; both live here.
"""

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

PROCESS_STARTED = time.monotonic()
"""When this module was loaded; not the age of the process, which a shell's ``exec`` hands on."""
EXIT_ERROR = 1
EXIT_AGAIN = 75
"""Stopped on request with a checkpoint written: start me again (EX_TEMPFAIL of sysexits.h)."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_MADV_HUGEPAGE, _LARGE_PAGE = 14, 1 << 21  # of mman.h; bytes on x86 and most ARM
_HEAP_BYTES, _MOST_BLOCKS = 1 << 30, 64

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = 0xFFFFFFFFFFFFFFFF


# --- counter-based random draws -----------------------------------------------------------------


def mix64(x: int) -> int:
    """Return the splitmix64 output for the 64-bit state ``x`` (Steele et al., OOPSLA 2014).

    Examples
    --------
    >>> hex(mix64(0))
    '0xe220a8397b1dcdaf'
    """
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def derive(seed: int, *words: int) -> int:
    """Return the key for one purpose: ``seed`` hashed with each word in turn.

    Examples
    --------
    >>> hex(derive(42, 1, 2, 3, 4))
    '0x4a90a635f990002d'
    """
    key = mix64(seed & _MASK)
    for word in words:
        key = mix64(key ^ (word & _MASK))
    return key


def mix64_array(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return :func:`mix64` of every element."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(_GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
    return x ^ (x >> np.uint64(31))


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def mix64_tensor(x: Tensor) -> Tensor:
    """Return :func:`mix64` of an int64 tensor, read and returned as 64 raw bits."""

    def shift_right(value: Tensor, bits: int) -> Tensor:
        # torch shifts int64 arithmetically; the mask drops the copies of the sign bit
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    x = x + _signed(_GOLDEN)
    x = (x ^ shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ shift_right(x, 31)


def uniform(index_B: Tensor, seed: int, purpose: int, draw: int = 0) -> Tensor:
    """Return one float32 in [0, 1) per index: a pure function of its arguments.

    The draw is made on the device of ``index_B`` and needs no synchronisation. It has 24 random
    bits, so that it is exact in float32 and never rounds to 1.
    """
    import torch

    key = _signed(derive(seed, purpose, draw))
    bits = mix64_tensor(mix64_tensor(index_B.to(torch.int64) ^ key))
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) / float(1 << 24)


def normal(index_B: Tensor, seed: int, purpose: int, shape: Sequence[int]) -> Tensor:
    """Return standard normal numbers [B, *shape]: a pure function of (index, place) and the key."""
    import torch

    place = torch.arange(math.prod(shape), device=index_B.device).view(1, *shape)
    index = mix64_tensor(index_B.to(torch.int64) ^ _signed(derive(seed, purpose)))
    bits = mix64_tensor(index.view(-1, *(1 for _ in shape)) ^ place)
    # Box and Muller, from two numbers of 24 bits; the first is never 0
    radius = ((((bits >> 40) & 0xFFFFFF) + 1).float() / (1 << 24)).log_().mul_(-2).sqrt_()
    return radius.mul_((((bits >> 16) & 0xFFFFFF).float() * (2 * math.pi / (1 << 24))).cos_())


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
