"""Memory that is handed out again as soon as nobody can see it.

A dense batch of all genes is 250 kB per cell. Fresh memory costs the kernel more time than the
decode does, so that large tensors are taken from a pool. What is handed out is a tensor like any
other, to be kept as long as one likes: its memory is taken back when the last view of it is gone.
"""

from __future__ import annotations

import threading
import weakref
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Memory = npt.NDArray[np.uint8]

_ALIGNMENT = 64  # a cache line, and the widest vector of present processors
_LARGEST_RATIO = 2  # a buffer is not spent on less than half of its size
_PATIENCE = 256  # a batch takes four buffers


class BufferPool:
    """Tensors over memory that is used again and again; safe to share between threads.

    Memory that was not needed for the last 256 requests is given back to the system.

    Examples
    --------
    >>> pool = BufferPool()
    >>> first = pool.take(100)
    >>> address, part = first.data_ptr(), first[50:]
    >>> del first
    >>> pool.take(100).data_ptr() == address  # a part of it can still be seen
    False
    >>> del part
    >>> pool.take(100).data_ptr() == address
    True
    """

    def __init__(self) -> None:
        # filled by weak references, that is at any time and in any thread: its put takes no lock
        self._returned: SimpleQueue[Memory] = SimpleQueue()
        self._lock = threading.Lock()
        self._free: list[tuple[int, Memory]] = []
        self._num_taken = 0

    def take(self, num_bytes: int) -> Tensor:
        """Return an unfilled uint8 tensor; its address is a multiple of 64."""
        with self._lock:
            self._num_taken += 1
            self._collect()
            memory = self._fitting(num_bytes)
        if memory is None:
            memory = _allocate(num_bytes)
        # the tensor's storage holds this array until its last view is gone
        lent = memory[:num_bytes]
        weakref.finalize(lent, self._returned.put, memory).atexit = False
        return torch.from_numpy(lent)

    def _collect(self) -> None:
        """Take in what came back, and let go of what was not needed for long."""
        while not self._returned.empty():
            self._free.append((self._num_taken, self._returned.get_nowait()))
        oldest = self._num_taken - _PATIENCE
        self._free = [entry for entry in self._free if entry[0] > oldest]

    def _fitting(self, num_bytes: int) -> Memory | None:
        """Return the smallest free buffer that is large enough; of equal ones the last returned."""
        most = _LARGEST_RATIO * max(num_bytes, _ALIGNMENT)
        fitting = [
            (len(memory), -i)
            for i, (_, memory) in enumerate(self._free)
            if num_bytes <= len(memory) <= most
        ]
        return self._free.pop(-min(fitting)[1])[1] if fitting else None

    def clear(self) -> None:
        """Give the free memory back to the system."""
        with self._lock:
            self._collect()
            self._free.clear()


def _allocate(num_bytes: int) -> Memory:
    """Return aligned memory with room for the next batch, which will be of a like size.

    NumPy asks the kernel for huge pages: 512 times fewer faults, and room in the address caches.
    """
    size = num_bytes + num_bytes // 8
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]
