"""A thread per rank that ends a training which stands still, and says where each rank stood.

A rank that hangs holds up all others: they wait in a collective for its answer. Every rank notes
what it begins to do; when nothing new began for ``parallel.timeout_seconds``, each writes its place
and the stacks of its threads into ``rank-<r>.log``, reads the places of the others there, and ends.
A rank that has ended is noticed by the others at their next collective, whose error becomes a
sentence here.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Self

import psutil
import torch.distributed as dist

from scale.runtime import EXIT_ERROR

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 3.0
"""For the places of the other ranks, which have stood still as long as this one."""
_WRITE_SECONDS = 30.0
"""For the log; a file system that does not answer must not keep the process alive."""
_MARK = "standstill "
"""Begins the line of a log that tells a place to the other ranks."""


class PeerError(ConnectionError):
    """Another rank has ended or does not answer."""


@contextmanager
def naming_lost_ranks(rank: int) -> Iterator[None]:
    """Turn the error of a collective outside of the steps of a training into a sentence.

    Raises
    ------
    PeerError
        In place of the error.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_collective(error):
            raise
        raise _lost_rank(rank, error, "outside of the steps") from error


def _lost_rank(rank: int, error: BaseException, when: str) -> PeerError:
    return PeerError(
        f"rank {rank} has lost another rank, which ended or does not answer "
        f"({_first_words(error)}), {when}; the log of that rank tells why. The same command goes "
        "on from the last checkpoint"
    )


class Watchdog:
    """Ends this process when it begins nothing new for a while; a context manager.

    Parameters
    ----------
    run_dir
        Where ``rank-<r>.log`` is written, by every rank that ends this way.
    rank, world_size
        Of this process.
    timeout_seconds
        Longest time for one thing: reading a batch, a step, a checkpoint.
    step
        Last step that was done.

    Raises
    ------
    PeerError
        At the end of the ``with`` block, in place of the error of a collective.
    """

    def __init__(
        self, run_dir: Path, *, rank: int, world_size: int, timeout_seconds: float, step: int
    ) -> None:
        self._run_dir = run_dir
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout_seconds
        self._step, self._doing, self._is_limited = step, "starting", True
        self._began = time.monotonic()
        self._trains = threading.get_ident()
        self._closed = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._closed.set()
        with self._ending:  # which is never free again once the watchdog ends the process
            pass
        if error is not None and _is_of_collective(error):
            when = f"after step {self._step:,} while {self._doing}"
            raise _lost_rank(self._rank, error, when) from error

    def beat(self, step: int, doing: str, *, is_limited: bool = True) -> None:
        """Note what begins now.

        Parameters
        ----------
        step
            Last step that was done.
        doing
            In words, for the message.
        is_limited
            False for what may take as long as it needs; its collectives have a timeout still.
        """
        self._step, self._doing, self._is_limited = step, doing, is_limited
        self._began = time.monotonic()

    # --- the thread -------------------------------------------------------------------------------

    def _watch(self) -> None:
        pause = min(1.0, self._timeout / 10)
        seen = time.monotonic()
        while True:
            began = self._began
            left = began + self._timeout - time.monotonic()
            if self._closed.wait(min(pause, max(left, 0.0)) if self._is_limited else pause):
                return
            now = time.monotonic()
            if now - seen > self._timeout / 2:
                self._began = now  # the process was stopped as a whole, as by Ctrl-Z: begin anew
            seen = now
            if self._is_limited and began == self._began and now - began >= self._timeout:
                with self._ending:
                    if not self._closed.is_set():
                        self._end(now - began)

    def _end(self, seconds: float) -> None:
        """Say what is known, and end the process with its children."""
        faulthandler.dump_traceback_later(_WRITE_SECONDS, exit=True)
        try:
            own = self._place()
            log = self._write(own)
            logger.error(
                "rank %d has begun nothing new for %.0f s (parallel.timeout_seconds) and ends: %s; "
                "stacks in %s",
                self._rank,
                seconds,
                own.describe(),
                log,
            )
            if self._world_size > 1:
                self._tell_of_all(own)
        finally:
            for child in psutil.Process().children(recursive=True):
                child.kill()
            logging.shutdown()
            os._exit(EXIT_ERROR)

    # --- where the ranks stand --------------------------------------------------------------------

    def _place(self) -> _Place:
        frame = sys._current_frames().get(self._trains)
        doing = "waiting for the other ranks" if _is_waiting(frame) else self._doing
        return _Place(self._rank, self._step, doing, _where(frame), time.time())

    def _log_of(self, rank: int) -> Path:
        return self._run_dir / f"rank-{rank}.log"

    def _write(self, place: _Place) -> Path:
        log = self._log_of(self._rank)
        with log.open("a") as handle:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            handle.write(f"{stamp} rank {self._rank} stands still: {place.describe()}\n")
            handle.write(f"{_MARK}{json.dumps(asdict(place))}\n")
            handle.flush()
            faulthandler.dump_traceback(handle, all_threads=True)
        return log

    def _tell_of_all(self, own: _Place) -> None:
        """Log where every rank stands; one rank does it for all."""
        places = {own.rank: own}
        deadline = time.monotonic() + _WAIT_SECONDS
        while len(places) < self._world_size and time.monotonic() < deadline:
            time.sleep(0.1)
            for rank in set(range(self._world_size)) - set(places):
                place = _read_place(self._log_of(rank))
                if place is not None and place.time > own.time - self._timeout:
                    places[rank] = place
        if own.rank == min(places):
            silent = sorted(set(range(self._world_size)) - set(places))
            logger.error("%s", _all_places(places, silent))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a rank stands."""

    rank: int
    step: int
    """Last step that was done."""
    doing: str
    where: str
    """Function, file and line of the innermost call, and of the one in this package."""
    time: float
    """Seconds since the epoch."""

    def describe(self) -> str:
        return f"last step {self.step:,}, {self.doing}, in {self.where}"


def _read_place(log: Path) -> _Place | None:
    """Return the newest place that a log tells."""
    try:
        lines = [line for line in log.read_text().splitlines() if line.startswith(_MARK)]
        return _Place(**json.loads(lines[-1].removeprefix(_MARK)))
    except (OSError, ValueError, IndexError):  # not there yet, or half written
        return None


def _all_places(places: dict[int, _Place], silent: list[int]) -> str:
    """Return one line about all ranks: those that were not heard, then the smallest groups."""
    groups: dict[str, list[int]] = {}
    for rank, place in sorted(places.items()):
        groups.setdefault(place.describe(), []).append(rank)
    told = [f"{_ranks(group)}: {text}" for text, group in sorted(groups.items(), key=_group_size)]
    if silent:
        told.insert(0, f"{_ranks(silent)}: no word, stopped or lost")
    return "; ".join(told)


def _group_size(group: tuple[str, list[int]]) -> int:
    return len(group[1])


def _ranks(ranks: Iterable[int]) -> str:
    """Return ranks in words.

    Examples
    --------
    >>> _ranks([3]), _ranks([0, 1, 2, 5])
    ('rank 3', 'ranks 0-2, 5')
    """
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return f"rank {text}" if text.isdigit() else f"ranks {text}"


def _where(frame: FrameType | None) -> str:
    if frame is None:
        return "a thread that has ended"
    text = _line(frame)
    own: FrameType | None = frame
    while own is not None and not own.f_globals.get("__name__", "").startswith("scale."):
        own = own.f_back
    return text if own is None or own is frame else f"{text}, called by {_line(own)}"


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _is_waiting(frame: FrameType | None) -> bool:
    """Whether the innermost call is a collective."""
    return frame is not None and frame.f_globals.get("__name__", "").startswith("torch.distributed")


def _is_of_collective(error: BaseException) -> bool:
    """Whether the message came from another rank; gloo raises a plain ``RuntimeError``."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and "gloo" in str(error).lower()


def _first_words(error: BaseException) -> str:
    """Return the first line of an error of torch, without the file of its source."""
    return str(error).strip().splitlines()[0].rpartition("] ")[2] or type(error).__name__
