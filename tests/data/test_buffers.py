"""Memory is used again, and never while anything of it can be seen."""

from __future__ import annotations

import gc
import threading
import tracemalloc

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scale.data.buffers import BufferPool


@settings(max_examples=50, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.integers(0, 5000), st.integers(0, 3), st.integers(0, 2**16)), max_size=60
    )
)
def test_what_is_held_is_never_given_to_another(turns):
    pool = BufferPool()
    held = []
    for number, (size, kind, choice) in enumerate(turns):
        taken = pool.take(size)
        assert taken.shape == (size,)
        assert taken.dtype is torch.uint8
        assert size == 0 or taken.data_ptr() % 64 == 0
        taken.fill_(number % 251)
        # the whole, a part of it, or an array over it: each keeps the memory
        part = (taken, taken[size // 3 :], taken.numpy()[: size // 2], None)[kind]
        held.append((number % 251, part))
        del taken, part
        if held and choice % 3 == 0:
            held.pop(choice % len(held))
        for value, other in held:
            if other is not None:
                assert (np.asarray(other) == value).all()


def test_dropped_memory_is_taken_again():
    pool = BufferPool()
    addresses = set()
    for turn in range(600):
        pair = [pool.take(100_000 + turn % 7) for _ in range(2)]
        addresses |= {tensor.data_ptr() for tensor in pair}
        del pair
    assert len(addresses) == 2


def test_memory_of_another_size_is_given_back():
    pool = BufferPool()
    tracemalloc.start()  # counts what NumPy allocates and frees
    try:
        large = [pool.take(1_000_000) for _ in range(5)]
        held = tracemalloc.get_traced_memory()[0]
        del large
        for _ in range(200):
            pool.take(1000)
        assert tracemalloc.get_traced_memory()[0] > held - 1e5  # it may be wanted again
        for _ in range(100):
            pool.take(1000)
        assert tracemalloc.get_traced_memory()[0] < held - 5e6
    finally:
        tracemalloc.stop()


def test_threads_never_share_what_they_hold():
    pool = BufferPool()
    faults = []

    def work(mark):
        generator = np.random.default_rng(mark)
        held = []
        for _ in range(400):
            held.append(pool.take(int(generator.integers(1, 3000))).fill_(mark))
            if len(held) > 4:
                held.pop(int(generator.integers(0, 5)))
            if not all(bool((tensor == mark).all()) for tensor in held):
                faults.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_a_tensor_outlives_its_pool():
    pool = BufferPool()
    taken = pool.take(1000).fill_(7)
    del pool
    gc.collect()
    assert bool((taken == 7).all())
