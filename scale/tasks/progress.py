"""How far a task is: one line that moves on a terminal, whole lines in a log."""

import logging
import sys
import time

logger = logging.getLogger(__name__)


class CellProgress:
    """A line that moves on a terminal; one line per ten seconds in a log."""

    def __init__(self) -> None:
        self._what = ""
        self._started = self._shown = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Tell how many cells of a stage are done; a new stage starts the clock."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if what != self._what:
            self._what, self._started = what, now
        is_due = now - self._shown >= (0.2 if terminal else 10.0)
        if not is_due and not (terminal and done == total):
            return
        self._shown = now
        rate = done / max(now - self._started, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((total - done) / max(rate, 1e-9)))
        text = f"{what} {done:,}/{total:,} cells | {rate:,.0f} cells/s | eta {left}"
        if terminal:
            end = "\n" if done == total else ""
            print(f"\r\033[K{text}", end=end, file=sys.stderr, flush=True)
        else:
            logger.info("%s", text)
