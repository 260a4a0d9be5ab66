"""Keyed draws without state: orders, permutations and samples as pure functions of a key.

Apart from :mod:`scale.data.sampler` because these few kernels define the order of every run: a
change here is a new ``plan_version``. NumPy generators stay out, their streams may change between
versions. Numba turns uint64 mixed with int64 into float64, therefore every constant is typed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scale.data.codec import CHUNK_CELLS, compiled

Integers = npt.NDArray[np.int64]

LARGEST_SORTED = 4096
"""Up to here an order is sorted from hashes: the Feistel network is skewed on tiny domains."""

_ADD = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_U27, _U30, _U31, _U32, _U56 = (np.uint64(bits) for bits in (27, 30, 31, 32, 56))
_ROW_SALT = np.uint64(0xC0FFEE)
_LARGEST = np.uint64(0xFFFFFFFFFFFFFFFF)


@compiled
def mix(x: np.uint64) -> np.uint64:
    """Return splitmix64 of ``x``, as :func:`scale.draws.mix64` does."""
    x = x + _ADD
    x = (x ^ (x >> _U30)) * _MIX_1
    x = (x ^ (x >> _U27)) * _MIX_2
    return x ^ (x >> _U31)


@compiled
def derive_key(seed: np.uint64, purpose: int, epoch: int, condition: int, draw: int) -> np.uint64:
    """Return ``runtime.derive(seed, purpose, epoch, condition, draw)``."""
    key = mix(seed)
    key = mix(key ^ np.uint64(purpose))
    key = mix(key ^ np.uint64(epoch))
    key = mix(key ^ np.uint64(condition))
    return mix(key ^ np.uint64(draw))


@compiled
def _argsort_hashes(hashes_N: npt.NDArray[np.uint64], bound: np.uint64) -> Integers:
    """Return the order of distinct hashes spread evenly over 0..bound.

    A bucket per hash, then an insertion sort that moves nothing far: 4 times as fast as argsort.
    """
    n = len(hashes_N)
    scale = n / (np.float64(bound) + 1.0)
    bucket_N = np.empty(n, np.int64)
    begin = np.zeros(n + 1, np.int64)
    for i in range(n):
        bucket_N[i] = min(int(np.float64(hashes_N[i]) * scale), n - 1)
        begin[bucket_N[i] + 1] += 1
    for i in range(n):
        begin[i + 1] += begin[i]
    order_N = np.empty(n, np.int64)
    for i in range(n):
        order_N[begin[bucket_N[i]]] = i
        begin[bucket_N[i]] += 1
    for i in range(1, n):
        member = order_N[i]
        at = i
        while at > 0 and hashes_N[order_N[at - 1]] > hashes_N[member]:
            order_N[at] = order_N[at - 1]
            at -= 1
        order_N[at] = member
    return order_N


@compiled
def sorted_order(n: int, key: np.uint64) -> Integers:
    """Return 0..n-1 sorted by hash; no two hashes are equal, mix is a bijection."""
    hashes_N = np.empty(n, np.uint64)
    for i in range(n):
        hashes_N[i] = mix(key ^ np.uint64(i))
    return _argsort_hashes(hashes_N, _LARGEST)


@compiled
def feistel(i: int, n: int, key: np.uint64) -> np.int64:
    """Return the image of ``i`` under a keyed bijection of 0..n-1 (8 unbalanced rounds)."""
    one = np.uint64(1)
    bits = 2
    while (1 << bits) < n:
        bits += 1
    low = np.uint64(bits // 2)
    high = np.uint64(bits - bits // 2)
    x = np.uint64(i)
    while True:
        for turn in range(8):
            right = x & ((one << low) - one)
            left = x >> low
            left = left ^ (mix(key ^ (np.uint64(turn) << _U56) ^ right) & ((one << high) - one))
            x = (right << high) | left
            low, high = high, low
        # eight rounds swap the halves an even number of times: low and high are as before
        if x < np.uint64(n):
            return np.int64(x)


@compiled
def feistel_many(index_N: Integers, n: int, key: np.uint64) -> Integers:
    """Return :func:`feistel` of every index."""
    out_N = np.empty_like(index_N)
    for i in range(len(index_N)):
        out_N[i] = feistel(index_N[i], n, key)
    return out_N


@compiled
def _smallest(n: int, need: int, key: np.uint64) -> Integers:
    """Return at least the ``need`` first of ``sorted_order(n, key)``, in that order.

    Hashes are uniform, so those below a bound just above need / n of the range are enough to
    sort: a pool of 3,000 cells costs a pass of 3,000 hashes and a sort of some 300.
    """
    wanted = need + 4.0 * np.sqrt(need) + 8.0
    index_N = np.empty(n, np.int64)
    hashes_N = np.empty(n, np.uint64)
    while True:
        everything = wanted >= n
        bound = _LARGEST if everything else np.uint64(wanted / n * 18446744073709549568.0)
        count = 0
        for i in range(n):
            value = mix(key ^ np.uint64(i))
            index_N[count] = i
            hashes_N[count] = value
            count += int(value <= bound)
        if count >= need or everything:
            member_K = _argsort_hashes(hashes_N[:count], bound)
            for k in range(count):  # an index by an array takes numba a second to compile
                member_K[k] = index_N[member_K[k]]
            return member_K
        wanted *= 2.0


@compiled
def draw_distinct(n: int, key: np.uint64, taken_M: Integers, out_N: Integers) -> None:
    """Fill ``out_N`` with the first members of a keyed order of 0..n-1 that are not taken.

    ``taken_M`` is distinct, and ``len(taken_M) + len(out_N) <= n``.
    """
    wanted, found = len(out_N), 0
    if n <= LARGEST_SORTED:
        is_taken_n = np.zeros(n, np.bool_)
        for member in taken_M:
            is_taken_n[member] = True
        order = _smallest(n, min(n, wanted + len(taken_M)), key)
        for member in order:
            if found < wanted and not is_taken_n[member]:
                out_N[found] = member
                found += 1
        return
    sorted_M = np.sort(taken_M)
    position = 0
    while found < wanted:
        candidate = int(feistel(position, n, key))
        position += 1
        at = np.searchsorted(sorted_M, candidate)
        if at == len(sorted_M) or sorted_M[at] != candidate:
            out_N[found] = candidate
            found += 1


@compiled
def cells_on_circle(n: int, first_slot: int, key: np.uint64, row_N: Integers) -> None:
    """Fill ``row_N`` with the next present cells of a condition of ``n`` cells after a slot.

    The chunks of the condition in keyed order form a circle of 64-cell slots; the ragged last
    chunk has holes. Whole chunks are taken as they are, a part of a chunk in keyed row order, so
    that two sets which share a chunk take different rows of it.
    """
    num_chunks = (n + CHUNK_CELLS - 1) // CHUNK_CELLS
    is_sorted = num_chunks <= LARGEST_SORTED
    order = sorted_order(num_chunks if is_sorted else 0, key)
    wanted = len(row_N)
    filled = 0
    at = first_slot // CHUNK_CELLS
    skip = first_slot % CHUNK_CELLS
    while filled < wanted:
        place = at % num_chunks
        chunk = int(order[place] if is_sorted else feistel(place, num_chunks, key))
        present = min(CHUNK_CELLS, n - chunk * CHUNK_CELLS)
        count = min(max(present - skip, 0), wanted - filled)
        base = chunk * CHUNK_CELLS
        if count == present:
            for i in range(count):
                row_N[filled + i] = base + i
        elif count:
            inner = sorted_order(present, mix(key ^ _ROW_SALT ^ (np.uint64(chunk) << _U32)))
            for i in range(count):
                row_N[filled + i] = base + inner[skip + i]
        filled += count
        at += 1
        skip = 0


def keyed_order(n: int, key: int) -> Integers:
    """Return a keyed order of 0..n-1, for n up to 4096.

    Examples
    --------
    >>> keyed_order(8, 42).tolist()
    [3, 2, 5, 1, 4, 0, 7, 6]
    """
    if n > LARGEST_SORTED:
        raise ValueError(f"keyed_order of {n} elements; above {LARGEST_SORTED} use permute")
    order: Integers = sorted_order(n, np.uint64(key))
    return order


def permute(i: int, n: int, key: int) -> int:
    """Return the image of ``i`` under a keyed bijection of 0..n-1, for n above 4096.

    Examples
    --------
    >>> [permute(i, 10000, 42) for i in range(5)]
    [7203, 4038, 3770, 5915, 5257]
    """
    return int(feistel(i, n, np.uint64(key)))
