"""Packed cells are what plain NumPy says, and become the chunks that the codec makes."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp

from scale.config import Codec
from scale.data.codec import encode_chunk, encode_streams, parse_chunk
from scale.data.csr import NO_BATCH, CsrCounts
from scale.data.ingest.grouping import Buckets, plan_shards
from scale.data.ingest.kernels import (
    ALL_GENES,
    ASCENDING,
    MIXED,
    NO_COUNT,
    NO_GENE,
    NOT_ASCENDING,
    SOUND,
    check_rows,
    hash_texts,
    pack_rows,
    unpad_texts,
)
from scale.data.ingest.packing import PackedCells
from scale.data.ingest.spill import SpillIndex, read_segments, write_spill
from scale.types import Condition, Perturbation, StoreError

LARGEST = 1 << 24
NUM_GENES = 70_000


def random_counts(num_cells, *, dtype=np.float32, seed=0):
    """Rows with wide gaps, empty cells, stored zeros, and counts up to the largest."""
    rng = np.random.default_rng(seed)
    matrix = sp.random(num_cells, NUM_GENES, 2e-3, format="csr", rng=rng)
    matrix.data = rng.choice([0, 1, 1, 1, 2, 255, 256, 257, 65_536, LARGEST], len(matrix.data))
    matrix.data = matrix.data.astype(dtype)
    matrix.sort_indices()
    is_there = np.ones(num_cells)
    is_there[3::7] = 0
    matrix = sp.csr_matrix(sp.diags(is_there) @ matrix).astype(dtype)
    matrix.sort_indices()
    return matrix


def pack(matrix, rows, target, order):
    """Return the status and the packed cells, the batch of a cell being its row."""
    num_cells, num_values = len(rows), len(matrix.data)
    total = np.zeros(num_cells, np.int64)
    sizes = [np.empty(num_cells, np.uint16) for _ in range(3)]
    streams = [np.empty(num_values, np.uint8) for _ in range(2)]
    exceptions = [np.empty(num_values, np.uint16) for _ in range(4)]
    parts = (matrix.indptr, matrix.indices, matrix.data)
    status, m, e, f = pack_rows(
        rows, *parts, LARGEST, target, order, total, *sizes, *streams, *exceptions
    )
    cells = PackedCells(
        ordinal_N=rows.astype(np.uint64) * 3,
        condition_N=(rows % 5).astype(np.int32),
        library_N=(total + 1).astype(np.uint32),
        batch_N=np.where(rows % 2, rows, NO_BATCH).astype(np.uint16),
        num_nonzero_N=sizes[0],
        num_gap_high_N=sizes[1],
        num_count_high_N=sizes[2],
        gap_place_E=exceptions[0][:e],
        gap_high_E=exceptions[1][:e],
        count_place_F=exceptions[2][:f],
        count_high_F=exceptions[3][:f],
        gap_M=streams[0][:m],
        count_M=streams[1][:m],
        barcode_N=np.array([f"cell{row}".encode() for row in rows]),
    )
    return status, cells


def dense(cells, num_genes):
    """Decode packed cells one entry at a time."""
    out = np.zeros((cells.num_cells, num_genes), np.int64)
    m = e = f = 0
    for row in range(cells.num_cells):
        size = int(cells.num_nonzero_N[row])
        gap = cells.gap_M[m : m + size].astype(np.int64)
        less = cells.count_M[m : m + size].astype(np.int64)
        m += size
        for _ in range(cells.num_gap_high_N[row]):
            gap[cells.gap_place_E[e]] += int(cells.gap_high_E[e]) << 8
            e += 1
        for _ in range(cells.num_count_high_N[row]):
            less[cells.count_place_F[f]] += int(cells.count_high_F[f]) << 8
            f += 1
        out[row, np.cumsum(gap + 1) - 1] = less + 1
    assert (m, e, f) == (len(cells.gap_M), len(cells.gap_high_E), len(cells.count_high_F))
    return out


@pytest.fixture(scope="module")
def counts():
    return random_counts(150)


@pytest.fixture(scope="module")
def packed(counts):
    target = np.arange(NUM_GENES, dtype=np.int32)
    return pack(counts, np.arange(150), target, ALL_GENES)[1]


def test_packed_rows_are_the_rows(counts, packed):
    np.testing.assert_array_equal(dense(packed, NUM_GENES), counts.toarray())
    np.testing.assert_array_equal(packed.library_N, counts.astype(np.int64).sum(axis=1).A1 + 1)
    assert len(packed.gap_high_E) > 1_000
    assert len(packed.count_high_F) > 1_000


@pytest.mark.parametrize("dtype", [np.int64, np.uint16])
def test_values_of_every_type_are_taken(dtype):
    matrix = random_counts(20)
    matrix.data = np.minimum(matrix.data, np.iinfo(np.int8).max).astype(dtype)
    status, cells = pack(matrix, np.arange(20), np.arange(NUM_GENES, dtype=np.int32), ALL_GENES)
    assert status == SOUND
    np.testing.assert_array_equal(dense(cells, NUM_GENES), matrix.toarray())


@pytest.mark.parametrize("order", [ASCENDING, MIXED])
def test_chosen_genes_and_rows(counts, order):
    rng = np.random.default_rng(1)
    chosen = rng.choice(NUM_GENES, 30_000, replace=False)
    chosen = np.sort(chosen) if order == ASCENDING else chosen
    target = np.full(NUM_GENES, -1, np.int32)
    target[chosen] = np.arange(len(chosen))
    rows = np.array([5, 0, 149, 17])
    status, cells = pack(counts, rows, target, order)
    assert status == SOUND
    np.testing.assert_array_equal(dense(cells, len(chosen)), counts[rows][:, chosen].toarray())
    np.testing.assert_array_equal(cells.library_N, counts[rows].astype(np.int64).sum(axis=1).A1 + 1)


@pytest.mark.parametrize(
    ("value", "status"),
    [
        *((value, NO_COUNT) for value in (np.nan, np.inf, -np.inf, -1, 0.5, -0.5, LARGEST + 2)),
        *((value, NO_COUNT) for value in (2.0**31, 2.0**40, -(2.0**40), 1e30)),
        (0.0, SOUND),
        (float(LARGEST), SOUND),
    ],
)
def test_values_that_are_no_counts_are_found(value, status):
    matrix = random_counts(9, dtype=np.float64)
    matrix.data[len(matrix.data) // 2] = value
    target, total = np.arange(NUM_GENES, dtype=np.int32), np.empty(9, np.int64)
    rows, parts = np.arange(9), (matrix.indptr, matrix.indices, matrix.data)
    assert check_rows(rows, *parts, LARGEST, NUM_GENES, total) == status
    assert pack(matrix, rows, target, ALL_GENES)[0] == status


def test_columns_that_do_not_ascend_or_are_none_are_found():
    target, rows = np.arange(NUM_GENES, dtype=np.int32), np.arange(9)
    for spoil, status in (
        (lambda m: m.indices.__setitem__(slice(0, 2), m.indices[:2][::-1].copy()), NOT_ASCENDING),
        (lambda m: m.indices.__setitem__(1, m.indices[0]), NOT_ASCENDING),
        (lambda m: m.indices.__setitem__(0, -1), NO_GENE),
        (lambda m: m.indices.__setitem__(m.indptr[1] - 1, NUM_GENES), NO_GENE),
    ):
        matrix = random_counts(9)
        spoil(matrix)
        assert pack(matrix, rows, target, ALL_GENES)[0] == status
        parts = (matrix.indptr, matrix.indices, matrix.data)
        assert check_rows(rows, *parts, LARGEST, NUM_GENES, np.empty(9, np.int64)) == status


# --- moving -------------------------------------------------------------------------------------


def equal(first, second):
    for name in PackedCells.__slots__:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


def test_cells_are_moved_whole(packed):
    rows = np.random.default_rng(2).permutation(150)[:90]
    taken = packed.take(rows)
    np.testing.assert_array_equal(dense(taken, NUM_GENES), dense(packed, NUM_GENES)[rows])
    np.testing.assert_array_equal(taken.ordinal_N, packed.ordinal_N[rows])
    np.testing.assert_array_equal(taken.barcode_N, packed.barcode_N[rows])
    parts = list(packed.slices([0, 0, 40, 150]))
    assert [part.num_cells for part in parts] == [0, 40, 110]
    equal(PackedCells.concatenate(parts), packed)
    blob = b"".join(taken.buffers())
    equal(PackedCells.from_bytes(blob), taken)
    with pytest.raises(StoreError, match="their head says"):
        PackedCells.from_bytes(blob + b"\0")


@pytest.mark.parametrize("codec", list(Codec))
def test_chunks_are_those_of_the_codec_byte_for_byte(counts, packed, codec):
    bounds = np.array([0, 64, 70, 134, 150])
    has_codes = np.array([True, False, True, False])
    chunks = list(packed.chunks(bounds, has_codes))
    nonzero = counts.copy()
    nonzero.eliminate_zeros()
    for k, chunk in enumerate(chunks):
        part = nonzero[bounds[k] : bounds[k + 1]]
        cells = slice(bounds[k], bounds[k + 1])
        expected = encode_chunk(
            CsrCounts(
                part.indptr.astype(np.int64),
                part.indices.astype(np.int32),
                part.data.astype(np.uint32),
                packed.library_N[cells],
                packed.batch_N[cells] if has_codes[k] else None,
            ),
            codec=codec,
        )
        blob = encode_streams(chunk, codec=codec)
        assert blob == expected
        parse_chunk(blob, num_genes=NUM_GENES)
        assert chunk.num_bytes == len(encode_streams(chunk, codec=Codec.none))
    heads = 32 * len(chunks)
    assert sum(chunk.num_bytes for chunk in chunks) <= packed.num_bytes_in_chunks + heads


def test_texts_without_their_padding():
    texts = np.array(["", "a", "\u00e9t\u00e9", "bcd"]).astype(object)
    encoded = np.char.encode(np.array(texts, np.str_), "utf-8")
    byte_NW = encoded.view(np.uint8).reshape(4, -1)
    ends, out = np.zeros(5, np.int32), np.empty(byte_NW.size, np.uint8)
    assert unpad_texts(byte_NW, ends, out) == 9
    parts = [out[first:last].tobytes() for first, last in pairwise(ends.tolist())]
    assert [part.decode() for part in parts] == list(texts)
    wider = encoded.astype("S40").view(np.uint8).reshape(4, -1)
    np.testing.assert_array_equal(hash_texts(byte_NW), hash_texts(wider))
    assert len(set(hash_texts(byte_NW).tolist())) == 4


# --- buckets ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    """Conditions of two cell types, of 1 to 900 cells, in buckets of 100."""
    rng = np.random.default_rng(3)
    conditions, sizes = [], []
    for is_control in (True, False):
        for cell_type in "AB":
            for number in range(3 if is_control else 30):
                perturbation = Perturbation.parse("control" if is_control else f"drug{number}")
                conditions.append(Condition(cell_type, perturbation, f"p{number}", is_control))
                sizes.append(int(rng.integers(1, 60)) if number % 7 else 900)
    sizes = np.array(sizes)
    is_wanted = sizes != sizes[21]
    plan = Buckets.plan(conditions, sizes, is_wanted, cells_per_bucket=100, seed=5)
    return conditions, sizes, is_wanted, plan


def cells_of(sizes, is_wanted):
    condition = np.repeat(np.flatnonzero(is_wanted), sizes[is_wanted]).astype(np.int32)
    ordinal = np.random.default_rng(4).permutation(10 * len(condition))[: len(condition)]
    return condition, ordinal.astype(np.uint64)


def test_buckets_are_stretches_of_the_final_order(plan):
    conditions, sizes, is_wanted, buckets = plan
    condition, ordinal = cells_of(sizes, is_wanted)
    order = buckets.order(condition, ordinal)
    bucket = buckets.of(condition, ordinal)[order]
    assert (np.diff(bucket) >= 0).all()
    assert (np.diff(condition[order]) >= 0).all()
    in_bucket = np.bincount(bucket, minlength=buckets.num_buckets)
    split = np.unique(bucket[np.isin(condition[order], np.flatnonzero(sizes == 900))])
    shared = np.setdiff1d(np.arange(buckets.num_buckets), split)
    assert in_bucket[shared].max() <= 100
    assert in_bucket[split].max() < 160  # 100 expected, 10 standard deviations at most
    kind = np.array([(c.is_control, c.cell_type) for c in conditions], object)[condition[order]]
    for number in range(buckets.num_buckets):
        assert len({tuple(k) for k in kind[bucket == number]}) == 1


def test_shards_are_full_and_keep_conditions_whole(plan):
    conditions, sizes, is_wanted, buckets = plan
    condition, ordinal = cells_of(sizes, is_wanted)
    num_bytes = 10 * np.bincount(buckets.of(condition, ordinal), minlength=buckets.num_buckets)
    num_bytes[4] = 0
    groups = plan_shards(buckets, conditions, num_bytes, limit=3_000)
    covered = [k for group in groups for k in group]
    assert covered == sorted(set(covered))
    assert set(np.flatnonzero(num_bytes)) <= set(covered)
    for c in np.flatnonzero(is_wanted):
        own = range(buckets.first_C[c], buckets.first_C[c] + buckets.num_C[c])
        assert sum(set(own) <= set(group) for group in groups) <= 1
        assert num_bytes[own].sum() == 0 or set(own) <= set(covered)
    for group in groups:
        is_one_condition = buckets.num_C[buckets.first_C == group.start].max() == len(group)
        assert num_bytes[group].sum() <= 3_000 or is_one_condition


def test_spilled_cells_come_back_bit_for_bit(packed, tmp_path):
    conditions = [Condition("A", Perturbation.parse(f"drug{c}"), None, False) for c in range(5)]
    sizes = np.bincount(packed.condition_N, minlength=5)
    buckets = Buckets.plan(conditions, sizes, sizes > 0, cells_per_bucket=64, seed=0)
    for piece, part in enumerate(packed.slices([0, 60, 60, 150])):
        files = write_spill(tmp_path, piece, [part], buckets)
        assert files == {path.name: path.stat().st_size for path in tmp_path.glob(f"*{piece}.*")}
    indexes = [SpillIndex.read(tmp_path, piece) for piece in range(3)]
    segments = np.concatenate([index.segments for index in indexes])
    assert segments["num_bytes"].sum() == packed.num_bytes_in_chunks
    back = PackedCells.concatenate(list(read_segments(tmp_path, segments)))
    order = buckets.order(back.condition_N, back.ordinal_N)
    expected = buckets.order(packed.condition_N, packed.ordinal_N)
    equal(back.take(order), packed.take(expected))
    total = sum(np.bincount(i.condition_C, i.num_cells_C, minlength=5) for i in indexes)
    np.testing.assert_array_equal(total, sizes)
