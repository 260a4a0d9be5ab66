"""How far a task is: a bar that moves on a terminal, whole lines in a log."""

import logging
import sys
import time

logger = logging.getLogger(__name__)

_UNITS = {"look": "files"}
"""What a stage counts, if it is not cells."""
_BAR_WIDTH = 24
_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 10.0


class CellProgress:
    """Bar, rate and time left on a terminal; one line per ten seconds in a log.

    Rate and time left are those of this start: what an earlier one has done is not counted.
    """

    def __init__(self) -> None:
        self._what = ""
        self._started = self._shown = time.monotonic()
        self._first = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Tell how much of a stage is done; a new stage starts the clock."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if what != self._what:
            self._what, self._started, self._first = what, now, done
        is_due = now - self._shown >= (_TERMINAL_SECONDS if terminal else _LOG_SECONDS)
        if not is_due and not (terminal and done == total):
            return
        self._shown = now
        text = progress_line(what, done, total, done - self._first, now - self._started)
        if terminal:
            end = "\n" if done == total else ""
            print(f"\r\033[K{_bar(done, total)} {text}", end=end, file=sys.stderr, flush=True)
        else:
            logger.info("%s", text)


def progress_line(what: str, done: int, total: int, recent: int, seconds: float) -> str:
    """Return how much is done, how fast, and the time left at this rate.

    Parameters
    ----------
    what
        The stage.
    done, total
        How much is done, and of how much.
    recent, seconds
        How much of it was done in the last so many seconds.

    Examples
    --------
    >>> progress_line("read", 40_000, 100_000, 30_000, 2.0)
    'read 40 %, 40,000/100,000 cells | 15,000 cells/s | 0:00:04 left'
    """
    unit = _UNITS.get(what, "cells")
    share = f"{what} {100 * done // max(total, 1)} %, {done:,}/{total:,} {unit}"
    if recent <= 0 or seconds <= 0:
        return share
    rate = recent / seconds
    left = round((total - done) / rate)
    clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    return f"{share} | {rate:,.0f} {unit}/s | {clock} left"


def _bar(done: int, total: int) -> str:
    filled = _BAR_WIDTH * done // max(total, 1)
    return f"[{'#' * filled}{'-' * (_BAR_WIDTH - filled)}]"
