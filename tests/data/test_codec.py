"""Chunks: bytes and back without loss, and values equal to scipy in torch and in numba."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scale.config import Codec
from scale.data.codec import CHUNK_CELLS, encode_chunk, parse_chunk
from scale.data.compact import CompactCells, Projection, decode, decode_numba
from scale.data.csr import LARGEST_COUNT, CsrCounts, checked_counts
from scale.data.expand import check_chunks, expand_chunk
from scale.data.gather import find_cells
from scale.types import SourceError, StoreError

# float32 log1p of a float32 product: half a unit in the last place of values below 16 is 4.8e-7
TOLERANCE = 1e-6
EDGE_GAPS = (0, 1, 254, 255, 256, 511, 65_535)
EDGE_COUNTS = (1, 2, 255, 256, 257, 65_536, 65_537, LARGEST_COUNT)


def random_cells(rng, num_cells, num_genes, *, with_edges=False, batch=False):
    """Cells with empty rows; with gaps and counts on both sides of every escape if asked."""
    rows = []
    for _ in range(num_cells):
        if with_edges:
            column = np.cumsum(rng.choice(EDGE_GAPS, rng.integers(0, 12)) + 1) - 1
            rows.append(column[column < num_genes])
        else:
            size = int(rng.integers(0, num_genes // 2 + 1))
            rows.append(np.sort(rng.choice(num_genes, size, replace=False)))
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    total = int(indptr[-1])
    counts = rng.choice(EDGE_COUNTS, total) if with_edges else rng.geometric(0.6, total)
    return CsrCounts(
        indptr,
        np.concatenate(rows).astype(np.int32),
        counts.astype(np.uint32),
        rng.integers(1, 1 << 31, num_cells).astype(np.uint32),
        rng.integers(0, 65_536, num_cells).astype(np.uint16) if batch else None,
    )


def to_scipy(cells, num_genes):
    data = (cells.counts_M.astype(np.float64), cells.indices_M, cells.indptr_P)
    return sp.csr_matrix(data, shape=(cells.num_cells, num_genes))


def assert_equal(left, right):
    for name in ("indptr_P", "indices_M", "counts_M", "library_N", "batch_code_N"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


def reference(cells, num_genes, target_sum, value_scale=1.0):
    dense = to_scipy(cells, num_genes).toarray()
    return np.log1p(dense * target_sum / cells.library_N[:, None]) / value_scale


def expanded(blobs):
    """Return chunks without compression, one after the other, and where each starts."""
    chunks = [parse_chunk(blob) for blob in blobs]
    room = [len(b) + 2 * c.num_nonzero + 7 & -8 for b, c in zip(blobs, chunks, strict=True)]
    start_C = np.cumsum([0, *room])
    memory = np.full(start_C[-1], 255, np.uint8)
    for blob, chunk, start in zip(blobs, chunks, start_C, strict=False):
        expand_chunk(blob, memory[start:], chunk.num_cells, chunk.num_nonzero)
    return memory, start_C[:-1]


def compact_of(blobs, chunk_N, row_N, slot_N):
    """Return some cells of some chunks as a compact batch."""
    memory, start_C = expanded(blobs)
    start_N = start_C[np.asarray(chunk_N, np.int64)]
    return find_cells([memory], np.zeros_like(start_N), start_N, np.asarray(row_N)).copy(slot_N)


def to_csr(compact):
    """Return the counts of a compact batch by whole numbers, without the decoders."""
    s = {
        name: getattr(compact.streams(), name).numpy() for name in type(compact.streams()).__slots__
    }
    step, count = s["gap_M"].astype(np.int64) + 1, s["count_M"].astype(np.int64) + 1
    np.add.at(step, s["gap_position_E"], s["gap_high_E"].astype(np.int64) * 256)
    np.add.at(count, s["count_position_F"], s["count_high_F"].astype(np.int64) * 256)
    indptr = np.concatenate([[0], np.cumsum(s["num_nonzero_N"])])
    rows = [np.cumsum(step[a:b]) - 1 for a, b in zip(indptr[:-1], indptr[1:], strict=True)]
    return indptr, np.concatenate([np.empty(0, np.int64), *rows]), count


# --- bytes --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_cells=st.sampled_from([1, 2, 63, 64]),
    num_genes=st.sampled_from([1, 7, 300, 70_000]),
    with_edges=st.booleans(),
    batch=st.booleans(),
    codec=st.sampled_from(Codec),
)
def test_encode_then_parse_is_the_identity(seed, num_cells, num_genes, with_edges, batch, codec):
    rng = np.random.default_rng(seed)
    with_edges = with_edges or num_genes > 1000
    cells = random_cells(rng, num_cells, num_genes, with_edges=with_edges, batch=batch)
    blob = encode_chunk(cells, codec=codec)
    chunk = parse_chunk(blob, num_genes=num_genes)
    assert_equal(chunk.to_csr(), cells)
    assert encode_chunk(chunk.to_csr(), codec=codec) == blob
    rows = rng.permutation(num_cells)[: int(rng.integers(1, num_cells + 1))]
    compact = compact_of([blob], np.zeros_like(rows), rows, rows)
    wanted = cells.take(rows)
    for found, expected in zip(
        to_csr(compact), (wanted.indptr_P, wanted.indices_M, wanted.counts_M), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    streams = compact.streams()
    assert streams.slot_N.tolist() == rows.tolist()
    np.testing.assert_array_equal(streams.library_N, wanted.library_N.astype(np.float32))


def test_rows_of_every_gap_and_count_that_needs_an_escape():
    gaps, counts = np.meshgrid(EDGE_GAPS, EDGE_COUNTS)
    cells = CsrCounts(
        np.arange(gaps.size + 1)[: CHUNK_CELLS + 1],
        gaps.ravel()[:CHUNK_CELLS].astype(np.int32),
        counts.ravel()[:CHUNK_CELLS].astype(np.uint32),
        np.full(min(gaps.size, CHUNK_CELLS), 2**32 - 1, np.uint32),
    )
    assert cells.num_cells == gaps.size
    assert_equal(parse_chunk(encode_chunk(cells, codec=Codec.zstd)).to_csr(), cells)


def test_layout_of_the_head_does_not_change():
    cells = CsrCounts(
        np.array([0, 2, 2]),
        np.array([1, 258], np.int32),
        np.array([257, 3], np.uint32),
        np.array([300, 7], np.uint32),
        np.array([4, 65_535], np.uint16),
    )
    expected = (
        b"SCLC\x01\x00\x00\x01" + b"\x02\x00\x00\x00"  # version, kind, codec, flags; n
        b"\x02\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00\x02\x00\x00\x00"
        b"\x2c\x01\x00\x00\x07\x00\x00\x00"  # library
        b"\x01\x00\x00\x00" + b"\x00\x00\x00\x00"  # position of the wide gap, of the large count
        b"\x02\x00\x00\x00" + b"\x04\x00\xff\xff"  # non-zeros, batch codes
        b"\x01\x00" + b"\x01\x00"  # high parts: gap 256, count - 1 = 256
        b"\x01\x00" + b"\x00\x02"  # streams
    )
    assert encode_chunk(cells, codec=Codec.none) == expected


@pytest.mark.parametrize("codec", Codec)
def test_a_blob_that_lies_is_refused(codec):
    rng = np.random.default_rng(0)
    cells = random_cells(rng, 5, 70_000, with_edges=True)
    blob = encode_chunk(cells, codec=codec)
    with pytest.raises(StoreError, match="behind the last"):
        parse_chunk(blob, num_genes=int(cells.indices_M.max()))
    with pytest.raises(StoreError, match="bytes"):
        parse_chunk(blob[:-1])
    with pytest.raises(StoreError, match="at least 32"):
        parse_chunk(blob[:20])
    for position in range(len(blob)):  # parsed or refused by StoreError, nothing else
        for flip in (1, 128):
            damaged = bytearray(blob)
            damaged[position] ^= flip
            try:
                chunk = parse_chunk(bytes(damaged), num_genes=70_000)
            except StoreError:
                chunk = None
            memory = np.empty(len(blob) + 2 * cells.counts_M.size + 8, np.uint8)
            try:
                expand_chunk(bytes(damaged), memory, cells.num_cells, cells.counts_M.size)
                fault = check_chunks(memory, np.zeros(1, np.int64), num_genes=70_000)
            except StoreError:
                fault = 0, "refused"
            # other sizes than those of the index are refused too
            assert (chunk is None) <= (fault is not None)
            if fault is None:
                decode_all(memory, cells.num_cells, 70_000)


def decode_all(memory, num_cells, num_genes):
    rows, zeros = np.arange(num_cells), np.zeros(num_cells, np.int64)
    compact = find_cells([memory], zeros, zeros, rows).copy(rows)
    library = compact.streams().library_N
    library.clamp_(min=1)  # a library of 0 with counts is refused by the writer
    return decode_numba(compact, num_rows=num_cells, num_genes=num_genes, target_sum=1e4)


# --- values -------------------------------------------------------------------------------------


def make_batch(seed, num_genes, *, with_edges):
    """Some chunks, some of them cut, scattered over more rows than there are cells."""
    rng = np.random.default_rng(seed)
    sizes = [1, 64, 17, 30]
    parts = [random_cells(rng, n, num_genes, with_edges=with_edges) for n in sizes]
    # libraries like those of cells, so that values have the size that they have in training
    parts = [
        CsrCounts(p.indptr_P, p.indices_M, p.counts_M, p.library_N % 20_000 + 1) for p in parts
    ]
    blobs = [encode_chunk(p, codec=Codec.zstd) for p in parts]
    rows = [np.arange(1), np.arange(64), rng.permutation(17)[:9], np.array([], np.int64)]
    kept = CsrCounts.concatenate([p.take(r) for p, r in zip(parts, rows, strict=True)])
    slot_N = rng.permutation(100)[: kept.num_cells]
    chunk_N = np.repeat(np.arange(4), [len(r) for r in rows])
    return compact_of(blobs, chunk_N, np.concatenate(rows), slot_N), kept, slot_N


@pytest.mark.parametrize(
    ("num_genes", "with_edges", "value_scale"),
    [(40, False, 1.0), (700, False, 10.0), (700, True, 1.0), (30_000, True, 1.0)],
)
def test_torch_and_numba_give_the_values_of_scipy(num_genes, with_edges, value_scale):
    compact, cells, slot_N = make_batch(num_genes, num_genes, with_edges=with_edges)
    expected = np.zeros((100, num_genes))
    expected[slot_N] = reference(cells, num_genes, 1e4, value_scale)
    arguments = {
        "num_rows": 100,
        "num_genes": num_genes,
        "target_sum": 1e4,
        "value_scale": value_scale,
    }
    for values in (decode(compact, **arguments), decode_numba(compact, **arguments)):
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-7, atol=TOLERANCE)
        assert not values[np.setdiff1d(np.arange(100), slot_N)].any()
    out = torch.full((100, num_genes), torch.nan)
    decode_numba(compact, **arguments, out=out)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-7, atol=TOLERANCE)


@pytest.mark.gpu
def test_values_on_a_device_are_those_on_the_host():
    device = torch.device("cuda")
    for num_genes, with_edges in ((700, False), (30_000, True)):
        compact, _, _ = make_batch(num_genes, num_genes, with_edges=with_edges)
        column = torch.arange(num_genes).flip(0)
        projection = Projection(column.clamp(max=500), 500)
        arguments = {"num_rows": 100, "num_genes": num_genes, "target_sum": 1e4}
        there = compact.to(device)
        torch.testing.assert_close(
            decode(there, **arguments).cpu(),
            decode(compact, **arguments),
            rtol=1e-6,
            atol=TOLERANCE,
        )
        torch.testing.assert_close(
            decode(there, **arguments, projection=projection.to(device)).cpu(),
            decode(compact, **arguments, projection=projection),
            rtol=1e-6,
            atol=TOLERANCE,
        )


def test_projection_reorders_drops_and_leaves_missing_genes_empty():
    compact, cells, slot_N = make_batch(5, 700, with_edges=True)
    rng = np.random.default_rng(1)
    column = np.full(700, 50)
    wanted = rng.permutation(700)[:45]
    column[wanted] = rng.permutation(50)[:45]
    projection = Projection(torch.from_numpy(column), 50)
    full = np.zeros((100, 700))
    full[slot_N] = reference(cells, 700, 1e4)
    expected = np.zeros((100, 50))
    expected[:, column[wanted]] = full[:, wanted]
    for function in (decode, decode_numba):
        values = function(
            compact, num_rows=100, num_genes=700, target_sum=1e4, projection=projection
        )
        assert values.is_contiguous()
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-7, atol=TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_genes=st.sampled_from([1, 40, 700, 30_000]),
    with_edges=st.booleans(),
    is_projected=st.booleans(),
)
def test_every_count_can_be_taken_back_from_the_values(seed, num_genes, with_edges, is_projected):
    compact, cells, slot_N = make_batch(seed, num_genes, with_edges=with_edges)
    rng = np.random.default_rng(seed)
    num_columns = max(1, num_genes // 2) if is_projected else num_genes
    column = np.arange(num_genes)
    if is_projected:  # half of the genes, in another order
        column = np.full(num_genes, num_columns)
        column[rng.permutation(num_genes)[:num_columns]] = rng.permutation(num_columns)
    projection = Projection(torch.from_numpy(column), num_columns) if is_projected else None
    everything = to_scipy(cells, num_genes).toarray()
    expected = np.zeros((100, num_columns + 1))
    expected[slot_N[:, None], column[None]] = everything
    library = np.ones((100, 1))
    library[slot_N, 0] = cells.library_N
    for function in (decode, decode_numba):
        values = function(
            compact,
            num_rows=100,
            num_genes=num_genes,
            target_sum=1e4,
            value_scale=4.0,
            projection=projection,
        )
        found = np.expm1(values.numpy().astype(np.float64) * 4.0) * library / 1e4
        # float32 holds a value to 6e-8 of itself, that is a count to a millionth of it
        is_small = expected[:, :num_columns] < 1 << 18
        assert (np.rint(found) == expected[:, :num_columns])[is_small].all()
        np.testing.assert_allclose(found, expected[:, :num_columns], rtol=4e-6, atol=1e-2)


def test_no_cells_and_cells_without_counts_are_zeros():
    empty = CsrCounts(
        np.zeros(4, np.int64), np.empty(0, np.int32), np.empty(0, np.uint32), np.ones(3, np.uint32)
    )
    blob = encode_chunk(empty, codec=Codec.zstd)
    for rows in (np.arange(3), np.empty(0, np.int64)):
        compact = compact_of([blob], np.zeros_like(rows), rows, rows)
        for function in (decode, decode_numba):
            values = function(compact, num_rows=4, num_genes=3, target_sum=1e4)
            assert values.shape == (4, 3)
            assert not values.any()


def test_numba_refuses_to_write_outside_of_the_result():
    compact, _, _ = make_batch(3, 40, with_edges=False)
    with pytest.raises(StoreError, match="row"):
        decode_numba(compact, num_rows=10, num_genes=40, target_sum=1e4)
    with pytest.raises(StoreError, match="behind the last of 20"):
        decode_numba(compact, num_rows=100, num_genes=20, target_sum=1e4)


def test_a_given_buffer_holds_the_streams():
    compact, _, _ = make_batch(3, 40, with_edges=True)
    buffer = torch.empty(compact.buffer.numel() + 100, dtype=torch.uint8)
    rng = np.random.default_rng(0)
    blob = encode_chunk(random_cells(rng, 8, 40), codec=Codec.none)
    memory, _ = expanded([blob])
    rows, zeros = np.arange(8), np.zeros(8, np.int64)
    found = find_cells([memory], zeros, zeros, rows)
    placed = found.copy(rows, out=CompactCells.empty(found.sizes, buffer=buffer))
    assert placed.buffer.data_ptr() == buffer.data_ptr()
    assert torch.equal(placed.buffer, found.copy(rows).buffer)


@pytest.mark.parametrize("batch", [False, True])
def test_single_rows_out_of_mapped_shards(batch):
    rng = np.random.default_rng(int(batch))
    shards, parts, shard_of, offset_of = [], [], [], []
    for shard in range(2):
        content = b"head" * 4
        for n in (64, 3):
            cells = random_cells(rng, n, 3000, with_edges=True, batch=batch)
            parts.append(cells)
            shard_of.append(shard)
            offset_of.append(len(content))
            blob = encode_chunk(cells, codec=Codec.none)
            content += blob + bytes(-len(blob) % 8)
        shards.append(np.frombuffer(content, np.uint8))
    chunk_N = rng.integers(0, 4, 200)
    row_N = np.array([rng.integers(0, parts[c].num_cells) for c in chunk_N])
    slot_N = rng.permutation(300)[:200]
    shard_N, offset_N = np.array(shard_of)[chunk_N], np.array(offset_of)[chunk_N]
    found = find_cells(shards, shard_N, offset_N, row_N)
    compact = found.copy(slot_N)
    code = [parts[c].batch_code_N[r] if batch else -1 for c, r in zip(chunk_N, row_N, strict=True)]
    assert found.batch_code_N.tolist() == code
    values = decode(compact, num_rows=300, num_genes=3000, target_sum=1e4).numpy()
    for chunk, row, slot in zip(chunk_N, row_N, slot_N, strict=True):
        expected = reference(parts[chunk].take(np.array([row])), 3000, 1e4)[0]
        np.testing.assert_allclose(values[slot], expected, rtol=1e-7, atol=TOLERANCE)
    with pytest.raises(StoreError, match="fewer cells"):
        find_cells(shards, shard_N[:1], offset_N[:1], np.array([64]))


# --- what the format can hold -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, "cell 1: a negative count, gene 2: -1"),
        (0.5, "cell 1: a count that is not whole"),
        (np.nan, "cell 1: a count that is not finite"),
        (np.inf, "cell 1: a count that is not finite"),
        (LARGEST_COUNT + 2.0, "cell 1: a count above 16777216"),
    ],
)
def test_counts_that_cannot_be_stored_are_refused(value, message):
    matrix = sp.csr_matrix(np.array([[1.0, 0, 0], [0, 1, value]]))
    with pytest.raises(SourceError, match=message):
        checked_counts("cells", matrix, np.array([9, 9]), None)


def test_rows_are_sorted_zeros_left_out_and_doubles_refused():
    matrix = sp.csr_matrix(
        (np.array([5.0, 0, 7]), np.array([2, 1, 0]), np.array([0, 2, 3])), shape=(2, 3)
    )
    cells = checked_counts("cells", matrix, np.array([5, 7]), np.array([-1, 3]))
    assert cells.indices_M.tolist() == [2, 0]
    assert cells.counts_M.tolist() == [5, 7]
    assert cells.batch_code_N.tolist() == [65_535, 3]
    double = sp.csr_matrix((np.ones(3), np.array([1, 0, 0]), np.array([0, 1, 3])), shape=(2, 3))
    with pytest.raises(SourceError, match="cell 1: two counts of one gene"):
        checked_counts("cells", double, np.array([1, 2]), None)
    with pytest.raises(SourceError, match="cell 1: library 0"):
        checked_counts("cells", matrix, np.array([5, 0]), None)
    full = sp.csr_matrix(np.ones((1, 65_536), np.uint32))
    with pytest.raises(SourceError, match="more than 65535 genes"):
        checked_counts("cells", full, np.array([65_536]), None)
