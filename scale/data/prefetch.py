"""Work done ahead by threads and handed over in order.

Apart from the loader because it knows nothing of cells: jobs go in, results come out in the order
of the jobs, at most ``depth`` of them ahead of the consumer. An error surfaces at the turn of its
job. Threads never hold the object that the consumer holds, so that dropping it ends them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class _Ring(Generic[Job, Result]):
    """State shared by the threads and the consumer; guarded by ``turn``."""

    def __init__(self, jobs: Iterator[Job], work: Callable[[Job], Result], depth: int) -> None:
        self.jobs, self.work, self.depth = jobs, work, depth
        self.turn = threading.Condition()
        self.results: dict[int, Result | BaseException] = {}
        self.num_claimed = 0
        self.num_delivered = 0
        self.num_jobs: int | None = None
        self.is_closed = False
        self.threads: list[threading.Thread] = []

    def claim(self) -> tuple[int, Job] | None:
        """Wait for room ahead of the consumer and take the next job; None = no more work."""
        with self.turn:
            while not self.is_closed and self.num_claimed >= self.num_delivered + self.depth:
                self.turn.wait()
            if self.is_closed or self.num_jobs is not None:
                return None
            number = self.num_claimed
            try:
                job = next(self.jobs)
            except StopIteration:
                self.num_jobs = number
                self.turn.notify_all()
                return None
            except BaseException as error:  # noqa: BLE001 - raised again at its turn
                self.results[number] = error
                self.num_claimed = self.num_jobs = number + 1
                self.turn.notify_all()
                return None
            self.num_claimed += 1
            return number, job

    def put(self, number: int, result: Result | BaseException) -> None:
        with self.turn:
            if not self.is_closed:
                self.results[number] = result
            self.turn.notify_all()

    def take(self) -> Result:
        """Wait for the next result; raise StopIteration behind the last."""
        with self.turn:
            while self.num_delivered not in self.results:
                if self.is_closed or self.num_delivered == self.num_jobs:
                    raise StopIteration
                self.turn.wait()
            result = self.results.pop(self.num_delivered)
            self.num_delivered += 1
            self.turn.notify_all()
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        with self.turn:
            self.is_closed = True
            self.results.clear()
            self.turn.notify_all()
        for thread in self.threads:
            # garbage collection may run this in one of the threads
            if thread is not threading.current_thread():
                thread.join()


def _run(ring: _Ring[Job, Result]) -> None:
    while (claimed := ring.claim()) is not None:
        number, job = claimed
        try:
            ring.put(number, ring.work(job))
        except BaseException as error:  # noqa: BLE001 - raised again where the result is taken
            ring.put(number, error)


class Prefetcher(Generic[Job, Result]):
    """Iterator over ``work(job)`` for every job, in order.

    Parameters
    ----------
    jobs
        Finite or endless. It is advanced by the threads, one at a time.
    work
        Called by any thread; its result may depend on the job only.
    num_threads, depth
        Threads, and results that may be ahead of the consumer.

    Examples
    --------
    >>> with Prefetcher(iter(range(4)), lambda x: x * x, num_threads=2, depth=2) as squares:
    ...     list(squares)
    [0, 1, 4, 9]
    """

    def __init__(
        self,
        jobs: Iterator[Job],
        work: Callable[[Job], Result],
        *,
        num_threads: int,
        depth: int,
    ) -> None:
        self._ring = _Ring(jobs, work, depth)
        # called when closed, when dropped, and at interpreter exit, whichever is first
        self._close = weakref.finalize(self, self._ring.close)
        for number in range(num_threads):
            thread = threading.Thread(
                target=_run, args=(self._ring,), name=f"scale-reader-{number}", daemon=True
            )
            self._ring.threads.append(thread)
            thread.start()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        try:
            return self._ring.take()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Prefetcher[Job, Result]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; results that were not taken are dropped."""
        self._close()
